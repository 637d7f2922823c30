"""A new method is one file and one entry: this is the recipe of recipes/README.md, followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TEXT, command

from llmsqueeze import allocation, quantizers
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


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALTERNATE = '''
"""ALTERNATE: every second linear gets the wide grid."""

from llmsqueeze.allocation.options import two_grids
from llmsqueeze.allocation.plan import Rows


def alternate(plan, profile, recipe, blocks, target):
    grids = two_grids(recipe)
    return plan.on({name: (Rows(grids[i % 2], w.shape[0]),) for i, (name, w) in enumerate(plan.weights.items())})
'''


def test_a_method_that_decides_is_one_file_and_one_entry(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "allocation").mkdir()
    (tmp_path / "allocation" / "alternate.py").write_text(ALTERNATE)
    monkeypatch.setattr(allocation, "__path__", [*allocation.__path__, str(tmp_path / "allocation")])
    entry = Method(
        "alternate",
        help="every second linear gets the high width",
        report="every second linear gets more bits",
        source="this test",
        decides="blocks",
        allows=(*ON_GRIDS, "quantizer", "high_bits", "low_bits"),
        implies={"quantizer": "rtn"},
    )
    monkeypatch.setitem(methods.METHODS, "alternate", entry)
    args = ("--method", "alternate", "--high-bits", "5", "--low-bits", "3")
    code, _, stderr = command("quantize", demo_of(1), *args, "--out", tmp_path / "out", "--quiet")
    assert code == 0, stderr
    _, shown, _ = command("show", tmp_path / "out", "--json")
    widths = {row["pattern"].rsplit(".", 1)[1]: row["parts"].split()[0] for row in json.loads(shown)["rows"]}
    assert widths == dict(zip(LINEARS, "5353535", strict=True))


def test_a_method_without_a_file_says_which_is_needed() -> None:
    with pytest.raises(ValueError, match=r"allocation/toyy\.py with a function toyy is needed"):
        allocation.allocator("toyy")
