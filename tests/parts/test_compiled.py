"""Compiled loops are compiled again when a file changes that they call."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from llmsqueeze.parts import compiled

CALLER = """
from called_loops import twice
from llmsqueeze.parts.compiled import compiled


@compiled
def caller(x):
    return twice(x)
"""
CALLED = """
from llmsqueeze.parts.compiled import compiled


@compiled
def twice(x):
    return {} * x
"""


def test_a_change_of_a_neighbour_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "caller_loops.py").write_text(CALLER)
    for factor, expected in (("2", 6), ("20", 60)):
        (tmp_path / "called_loops.py").write_text(CALLED.format(factor))
        for name in ("called_loops", "caller_loops"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        compiled._stamps.cache_clear()
        module = importlib.import_module("caller_loops")
        assert module.caller(3) == expected
        assert list(tmp_path.glob("__pycache__/caller_loops.caller*.nbi")), "it is cached"
