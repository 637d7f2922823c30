"""Layer-wise importance: which way LIM and ZD point, that they are measured at the blocks, and who gets the high width.

The paper says that few large weights and a large change of the input make a block important; at least one summary of
it has ZD the wrong way round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmsqueeze.allocation import layerwise
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.compress.decide import decide, target_nbytes, wanted_by
from llmsqueeze.compress.job import prepare
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.sweeps import Wanted, measure
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.original import Source
from llmsqueeze.model.walk import Walk
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.bundled import make_recipe
from llmsqueeze.recipe.recipe import BLOCK_ORDERS

CPU = torch.device("cpu")
HIGH, LOW = Grid(4, 16, True), Grid(2, 16, True)


def order(importance: str, lim: list[float] | None = None, zd: list[float] | None = None, seed: int = 0) -> list[int]:
    lim, zd = lim or [], zd or []
    return layerwise.order_blocks(importance, max(len(lim), len(zd)), lim, zd, seed)


def test_heavier_tails_make_a_block_more_important_by_zd(generator: torch.Generator) -> None:
    """A few outliers stretch the deviation, so that fewer weights lie beyond it."""
    plain = torch.randn(100, 100, generator=generator)
    tailed = torch.where(torch.rand(100, 100, generator=generator) < 0.01, plain * 20, plain)
    zd = [layerwise.zd([plain]), layerwise.zd([tailed])]
    assert zd[0] == pytest.approx(0.1587, abs=0.01), "a Gaussian's"
    assert zd[1] < 0.5 * zd[0]
    assert order("zd", zd=zd) == [1, 0]


def test_zd_is_one_sided_and_over_all_linears_of_the_block_together(generator: torch.Generator) -> None:
    weights = [torch.randn(8, 30, generator=generator), torch.randn(50, 5, generator=generator) * 3 + 1]
    together = torch.cat([weight.flatten() for weight in weights]).double()
    z = (together - together.mean()) / together.std(correction=0)
    assert layerwise.zd(weights) == int((z > 1).sum()) / len(z)
    assert layerwise.zd([torch.full((4, 4), 0.3)]) == 0.0, "no weight is larger than the rest"


def test_a_block_that_changes_its_input_is_more_important_by_lim(generator: torch.Generator) -> None:
    before, change = (torch.randn(1, 20, 16, generator=generator) for _ in range(2))
    lim = [-layerwise.similarity(before, before + share * change) for share in (0.1, 0.0, 2.0)]
    assert lim[1] == pytest.approx(-1.0)
    assert lim[1] < lim[0] < lim[2]
    assert order("lim", lim=lim) == [2, 0, 1]


def test_no_token_outweighs_another_in_lim(generator: torch.Generator) -> None:
    """Cosines are taken per token: a massive one that passes unchanged does not hide what happens to the rest."""
    before = torch.randn(1, 10, 16, generator=generator)
    after = -before
    before[0, 0] *= 1e4
    after[0, 0] = before[0, 0]
    assert layerwise.similarity(before, after) == pytest.approx((1 - 9) / 10, abs=1e-5)


def test_the_controls_look_at_nothing() -> None:
    lim, zd = [0.3, 0.1, 0.2, 0.5, 0.4], [0.5, 0.1, 0.3, 0.2, 0.4]
    assert order("lim", lim, zd) == [3, 4, 0, 2, 1]
    assert order("reverse", lim, zd) == [1, 2, 0, 4, 3], "the least important by LIM first"
    assert order("zd", lim, zd) == [1, 3, 2, 4, 0]
    assert order("first", lim, zd) == [0, 1, 2, 3, 4]
    assert order("last", lim, zd) == [4, 3, 2, 1, 0]
    assert order("both-ends", lim, zd) == [0, 4, 1, 3, 2]


def test_random_is_an_order_by_seed() -> None:
    orders = [layerwise.order_blocks("random", 12, [], [], seed) for seed in (1, 1, 2)]
    assert sorted(orders[0]) == list(range(12))
    assert orders[0] == orders[1] != orders[2]


def test_blocks_that_are_equally_important_stay_in_turn() -> None:
    for importance in ("lim", "zd", "reverse"):
        assert order(importance, [0.5] * 4, [0.5] * 4) == [0, 1, 2, 3]


# -------------------------------------------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    return [torch.randint(5, 300, (1, 40 + s), generator=torch.Generator().manual_seed(s)) for s in range(3)]


def measured(tokens: list[Tensor], wanted: Wanted, **settings: Any) -> Profile:
    recipe = make_recipe({"method": "layerwise", "quantizer": "rtn"} | settings)
    job = prepare(Source("demo"), recipe, Progress(), text=False)
    with Spill() as spill:
        walk = Walk(job.skeleton, tokens, spill, torch.float32, CPU)
        return measure(walk, walk.embed() if tokens else None, job.plan, recipe, wanted, Progress())


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Mean over the tokens of [1, length, width]."""
    return (nn.functional.normalize(x, dim=-1) * nn.functional.normalize(y, dim=-1)).sum(-1).mean()


def hooked_lim(folder: Path, tokens: list[Tensor]) -> tuple[list[float], float]:
    """LIM by hooks on the block modules of the whole model, and what the last would be behind the final norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for module in (*model.model.layers, model.model.norm):
        module.register_forward_hook(
            lambda _module, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
    lim = []
    for row in tokens:
        seen.clear()
        with torch.no_grad():
            model(row)
        behind_norm = cosine(seen[-2][0], seen[-1][1])
        lim.append([float(-cosine(*pair)) for pair in seen[:-1]] + [float(-behind_norm)])
    means = torch.tensor(lim).mean(dim=0).tolist()
    return means[:-1], means[-1]


def test_measured_lim_is_that_of_the_block_modules(demo_dir: Path, tokens: list[Tensor]) -> None:
    lim = measured(tokens, Wanted(lim=True)).lim
    expected, behind_norm = hooked_lim(demo_dir, tokens)
    assert lim == pytest.approx(expected, abs=1e-5)
    assert abs(lim[-1] - behind_norm) > 1e-3, "the final norm is not in the last block"


def test_lim_is_the_same_beside_gradients(tokens: list[Tensor]) -> None:
    alone = measured(tokens, Wanted(lim=True)).lim
    beside = measured(tokens, Wanted(salience=(4,), lim=True)).lim
    assert beside == alone


def test_measured_zd_is_that_of_the_blocks_linears_and_needs_no_text(demo_dir: Path, tokens: list[Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)
    expected = []
    for block in model.model.layers:
        linears = [m.weight.detach().flatten().double() for m in block.modules() if isinstance(m, nn.Linear)]
        weights = torch.cat(linears)
        expected.append(float((weights > weights.mean() + weights.std(correction=0)).double().mean()))
    assert list(measured([], Wanted(zd=True)).zd) == pytest.approx(expected, abs=1e-5)
    assert measured(tokens, Wanted(zd=True, salience=(4,))).zd == measured([], Wanted(zd=True)).zd


# ------------------------------------------------------------------------------------------------------ the plan

BLOCKS = [[f"b{i}.attn", f"b{i}.mlp"] for i in range(5)]


@pytest.fixture
def plan() -> Plan:
    """Five equal blocks of two linears."""
    shapes = {"attn": (32, 64), "mlp": (96, 64)}
    names = [name for block in BLOCKS for name in block]
    return Plan(
        {
            name: WeightPlan(name, shapes[name[3:]], torch.bfloat16, "rtn", (Rows(Grid(3), shapes[name[3:]][0]),))
            for name in names
        }
    )


def widths(plan: Plan) -> list[set[int]]:
    """The widths in every block."""
    return [{rows.grid.bits for name in block for rows in plan.weights[name].grids} for block in BLOCKS]


ORDER = [3, 0, 4, 1, 2]


@pytest.mark.parametrize("count", range(6))
def test_the_most_important_blocks_get_the_high_width(plan: Plan, count: int) -> None:
    """With room for exactly `count` of them, and for one byte less than the next."""
    low = layerwise.allocate(plan, BLOCKS, [], HIGH, LOW, 10**9)
    step = 128 * 64 * 2 // 8
    for room in (0, step - 1):
        made = layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, low.nbytes + count * step + room)
        assert widths(made) == [{4} if i in ORDER[:count] else {2} for i in range(5)]
        assert made.nbytes == low.nbytes + count * step


def test_a_smaller_block_may_still_fit_where_a_larger_one_does_not(plan: Plan) -> None:
    blocks = [[*BLOCKS[0], *BLOCKS[1]], *BLOCKS[2:]]
    low = layerwise.allocate(plan, blocks, [], HIGH, LOW, 10**9)
    made = layerwise.allocate(plan, blocks, [0, 1, 2, 3], HIGH, LOW, low.nbytes + 128 * 64 * 2 // 8)
    assert widths(made) == [{2}, {2}, {4}, {2}, {2}]


def test_linears_that_are_skipped_stay_out(plan: Plan) -> None:
    plan = Plan({name: weight for name, weight in plan.weights.items() if name != "b3.mlp"})
    made = layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, 10**9)
    assert set(made.weights) == set(plan.weights)
    assert made.weights["b3.attn"].grid == HIGH


def test_a_budget_below_the_low_width_is_refused(plan: Plan) -> None:
    smallest = layerwise.allocate(plan, BLOCKS, [], HIGH, LOW, 10**9)
    assert layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, smallest.nbytes).nbytes == smallest.nbytes
    with pytest.raises(RecipeError, match=rf"{smallest.bits_per_weight:.3f}, everything counted.*--low-bits"):
        layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, smallest.nbytes - 1)


@pytest.mark.parametrize("importance", BLOCK_ORDERS)
def test_every_order_spends_the_same_budget_on_the_demo(importance: str) -> None:
    """All its blocks are equal: `--bits 3.2` is 2 or 4 bits per block whatever the order, and everything counted."""
    recipe = make_recipe({"method": "layerwise", "importance": importance, "bits": 3.2, "quantizer": "rtn"})
    job = prepare(Source("demo"), recipe, Progress(), text=False)
    wanted = wanted_by(recipe)
    assert (wanted.lim, wanted.zd) == (importance in ("lim", "reverse"), importance == "zd")
    profile = Profile(lim=(-0.2, -0.9, -0.8, -0.5), zd=(0.1, 0.2, 0.15, 0.3))
    target = target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
    assert target is not None
    made = decide(job.plan, profile, recipe, job.skeleton.linears, target).plan
    order = layerwise.order_blocks(importance, 4, profile.lim, profile.zd, recipe.seed)
    for index, names in enumerate(job.skeleton.linears):
        assert {made.weights[name].grid.bits for name in names} == {4 if index in order[:2] else 2}
    assert made.bits_per_weight <= 3.2
