"""The scripts in evals/ import, and the names that they patch exist."""

from __future__ import annotations

import pkgutil
import re
import sys
from argparse import Namespace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from llmsqueeze.recipe.resolve import make_recipe

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


def test_the_recipes_of_the_scripts_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    methods, coded, matrix, below_three, allocation, two_bits, self_calibration = map(
        import_module, ("methods", "coded", "matrix", "below_three", "allocation", "two_bits", "self_calibration")
    )
    text = Namespace(calibration="demo", samples=2, window=32)
    rows = [{"bits": 3, **settings} for settings in methods.ROWS.values()]
    rows += [{"method": "descent", "bits": 2, **settings} for settings in two_bits.GRIDS.values()]
    rows += [{"bits": coded.SIZES.get(name, (2.5,))[0], **settings} for name, settings in coded.ROWS.items()]
    rows += [settings for table in allocation.TABLES.values() for settings in table([2.5, 4.5]).values()]
    rows += [settings for bits in (2.25, 2.5, 3.25) for settings, _ in below_three.rows(bits).values()]
    rows += self_calibration.ROWS.values()
    for settings in rows:
        assert methods.recipe_of(settings, text).method == settings["method"]
    for settings in (*matrix.RECIPES.values(), *matrix.REAL_RECIPES.values()):
        assert make_recipe(settings).method == settings["method"]
