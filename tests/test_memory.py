"""Free memory goes back to the system when there is enough of it."""

from __future__ import annotations

import ctypes

import pytest

from llmsqueeze import memory


@pytest.mark.parametrize(
    ("sizes", "emptied"),
    [
        ([100, 80], 1),  # the first time
        ([100, 80, 80 + 47, 80 + 48, 90], 2),  # again after 48 MB more
        ([100, 80, 60, 60 + 48, 80 + 48, 90], 2),  # less in between does not count
        ([0, 0, 0, 0], 2),  # a platform that does not tell its size
    ],
)
def test_the_heap_is_emptied_if_the_process_has_grown(
    sizes: list[int], emptied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    class Library:
        def malloc_trim(self, pad: int) -> None:
            calls.append(pad)

    told = [size << 20 for size in sizes]
    monkeypatch.setattr(memory, "_after", 0)
    monkeypatch.setattr(memory, "_resident_nbytes", lambda: told.pop(0))
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Library())
    while told:
        memory.give_back()
    assert len(calls) == emptied
