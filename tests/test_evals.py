"""The scripts in evals/ import, and the names that they patch exist."""

from __future__ import annotations

import pkgutil
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

EVALS = Path(__file__).parents[1] / "evals"


@pytest.mark.parametrize("script", sorted(path.name for path in EVALS.glob("*.py")))
def test_the_script_imports(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    spec = spec_from_file_location(f"evals_{script.removesuffix('.py')}", EVALS / script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    assert callable(module.main)
    patched = re.findall(r"""mock\.patch\(\s*"([\w.]+)\"""", (EVALS / script).read_text())
    assert all(pkgutil.resolve_name(name) is not None for name in patched)
