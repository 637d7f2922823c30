"""The convention of rounding methods: one file with one function of its name, found by that name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

from llmsqueeze import quantizers
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import Rounder, rounder
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.rtn import rtn
from llmsqueeze.recipe.methods import rounding_methods

TOY = """
from llmsqueeze.quantizers.rtn import rtn


def toy_rounding(weight, grid, dtype, curvature, pinned=None, search=False):
    return rtn(weight.abs(), grid, dtype, curvature, pinned, search)
"""


def test_a_file_with_a_function_of_its_name_is_a_rounding_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_rounding.py").write_text(TOY)
    monkeypatch.setattr(quantizers, "__path__", [*quantizers.__path__, str(tmp_path)])
    weight, grid = -torch.ones(2, 8), Grid(4, 8)
    rounded = rounder("toy_rounding")(weight, grid, torch.float32, Curvature.flat(8, weight))
    assert torch.equal(rounded.dense(), rtn(-weight, grid, torch.float32).dense())


def test_every_file_with_a_function_of_its_name_is_in_the_table_of_methods() -> None:
    assert rounder("rtn") is rtn
    files = [module.name for module in pkgutil.iter_modules(quantizers.__path__)]
    modules = {name: importlib.import_module(f"llmsqueeze.quantizers.{name}") for name in files}
    assert {name for name, module in modules.items() if hasattr(module, name)} == set(rounding_methods())


@pytest.mark.parametrize("name", ["nearest", "grids", "coded"])
def test_a_name_without_its_file_or_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no rounding method {name}: quantizers/{name}\.py with a function {name}"):
        rounder(name)


@pytest.mark.parametrize("name", rounding_methods())
def test_every_method_has_the_one_signature(name: str) -> None:
    expected = inspect.signature(Rounder.__call__).parameters
    parameters = inspect.signature(rounder(name)).parameters
    assert ["self", *parameters] == list(expected)
    assert [parameters[p].default for p in ("pinned", "search")] == [expected[p].default for p in ("pinned", "search")]
