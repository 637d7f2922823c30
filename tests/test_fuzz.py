"""Some cases of evals/fuzz.py, in this process: a file that was tampered with ends in code 0 or in one message."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from support import thorough

SEED, CASES, FEW = 7, 20, 5  # of each kind


def script() -> Any:
    folder = Path(__file__).parents[1] / "evals"
    spec = spec_from_file_location("evals_fuzz", folder / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)  # as for a script
        spec.loader.exec_module(module)
    return module


fuzz = script()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.Base(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("cases", [range(FEW), thorough(range(FEW, CASES))], ids=["few", "others"])
@pytest.mark.parametrize("kind", fuzz.LIGHT)
def test_a_tampered_file_is_refused_or_harmless(kind: str, cases: range, base: Any) -> None:
    ends = {number: fuzz.one(kind, number, SEED, base) for number in cases}
    assert {number: end for number, end in ends.items() if end[1] not in fuzz.ENDS} == {}
    assert any(end[1] == "refused" for end in ends.values())
