"""Some cases of evals/fuzz.py, in this process: a file that was tampered with ends in code 0 or in one message."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

SEED, CASES = 7, 20  # of each kind


def script() -> Any:
    spec = spec_from_file_location("evals_fuzz", Path(__file__).parents[1] / "evals" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = script()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.Base(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", fuzz.LIGHT)
def test_a_tampered_file_is_refused_or_harmless(kind: str, base: Any) -> None:
    ends = {number: fuzz.one(kind, number, SEED, base) for number in range(CASES)}
    assert {number: end for number, end in ends.items() if end[1] not in fuzz.ENDS} == {}
    assert any(end[1] == "refused" for end in ends.values())
