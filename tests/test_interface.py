"""The functions of the package: their examples run, their names are sorted, and they check their options."""

from __future__ import annotations

import doctest
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import llmsqueeze
from llmsqueeze.errors import RecipeError, UnsupportedError


def test_the_examples_of_the_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which a user calls them: `load` and `evaluate` read the folder of `quantize`."""
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    finder = doctest.DocTestFinder(recurse=False)
    for function in (llmsqueeze.quantize, llmsqueeze.plan, llmsqueeze.load, llmsqueeze.evaluate):
        (example,) = finder.find(function, globs=vars(llmsqueeze).copy())
        assert len(example.examples) >= 1
        report: list[str] = []
        assert runner.run(example, out=report.append).failed == 0, "".join(report)
    assert (tmp_path / "demo-plan" / "plan.yaml").is_file()


def test_the_public_names_are_sorted_and_exist() -> None:
    public = llmsqueeze.__all__
    assert public == sorted(set(public))
    assert all(hasattr(llmsqueeze, name) for name in public)
    assert {"evaluate", "load", "plan", "quantize"} <= set(public)


def test_an_option_is_checked_by_name_and_a_recipe_gives_the_others(
    demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="did you mean 'group_size'"):
        llmsqueeze.quantize("demo", tmp_path / "out", groupsize=64)
    with pytest.raises(RecipeError, match="there is no recipe file gwq-3bti"):
        llmsqueeze.plan("demo", tmp_path / "out", recipe="gwq-3bti")
    (tmp_path / "recipe.yaml").write_text("method: rtn\nbits: 4\n")
    summary = llmsqueeze.quantize(demo_of(1), tmp_path / "out", recipe=tmp_path / "recipe.yaml", bits=3)
    assert (summary["method"], summary["bits"]) == ("rtn", 3)


def test_without_compressed_tensors_the_extra_is_named(
    compressed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a folder of another tool needs the package. The extras plots and gguf are tested in their rooms."""
    module = "transformers.quantizers.quantizer_compressed_tensors"
    monkeypatch.setattr(f"{module}.is_compressed_tensors_available", lambda: False)
    other = Path(shutil.copytree(compressed("portable"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["type"] = "float"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"pip install 'llmsqueeze\[compressed-tensors\]'"):
        llmsqueeze.load(other)
