"""A new rounding method is one file and one entry: this is the recipe of recipes/README.md, followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TEXT, command

from llmsqueeze import quantizers
from llmsqueeze.recipe import methods
from llmsqueeze.recipe.methods import ON_GRIDS, Method

TOY = '''
"""TOY: round to nearest, every scale a tenth larger."""

from llmsqueeze.quantizers.rtn import rtn


def toy(weight, grid, dtype, curvature=None, pinned=None, search=False):
    rounded = rtn(weight / 1.1, grid, dtype, curvature, pinned, search)
    return rounded.rescaled((rounded.scale * 1.1).to(dtype))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file and the entry."""
    (tmp_path / "quantizers").mkdir()
    (tmp_path / "quantizers" / "toy.py").write_text(TOY)
    monkeypatch.setattr(quantizers, "__path__", [*quantizers.__path__, str(tmp_path / "quantizers")])
    entry = Method(
        "toy",
        help="round to nearest, every scale a tenth larger",
        report="round to nearest with larger scales",
        source="this test",
        rounds=True,
        allows=ON_GRIDS,
        implies={"inputs": "original"},
        priced_by="toy",
    )
    monkeypatch.setitem(methods.METHODS, "toy", entry)
    return "toy"


def test_it_is_a_method_of_its_own(toy: str, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    code, stdout, stderr = command("quantize", demo_of(1), "--method", toy, "--out", tmp_path / "out", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["method"] == "toy"
    plain = tmp_path / "plain"
    command("quantize", demo_of(1), "--method", "rtn", "--out", plain, "--quiet")
    errors = [json.loads((folder / "llmsqueeze.json").read_text())["errors"] for folder in (tmp_path / "out", plain)]
    assert errors[0].keys() == errors[1].keys()
    assert errors[0] != errors[1], "it rounds in its own way"


@pytest.mark.parametrize("method", [{"method": "gwq"}, {"method": "budget", "bits": 3.5, "widths": "3,4"}], ids=str)
def test_it_rounds_for_other_methods_and_is_priced(
    method: dict[str, object], toy: str, demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**method, "quantizer": toy, **TEXT}))
    code, stdout, stderr = command("quantize", demo_of(1), "--recipe", recipe, "--out", tmp_path / "out", "--json")
    assert code == 0, stderr
    if method["method"] == "budget":
        assert json.loads(stdout)["predicted_loss_increase"] > 0


def test_an_unknown_quantizer_is_no_other_one_in_silence(toy: str) -> None:
    with pytest.raises(KeyError):
        methods.METHODS["toyy"].priced_by  # noqa: B018
