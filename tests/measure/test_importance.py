"""Importance of blocks: which way LIM and ZD point, and that they are measured at the blocks.

The paper says that few large weights and a large change of the input make a block important; at least one summary of
it has ZD the wrong way round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmsqueeze.measure.importance import similarity, zd
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.request import Request
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.original import Source, open_original
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress

CPU = torch.device("cpu")


def test_heavier_tails_lower_zd(generator: torch.Generator) -> None:
    """A few outliers stretch the deviation, so that fewer weights lie beyond it."""
    plain = torch.randn(100, 100, generator=generator)
    tailed = torch.where(torch.rand(100, 100, generator=generator) < 0.01, plain * 20, plain)
    shares = [zd([plain]), zd([tailed])]
    assert shares[0] == pytest.approx(0.1587, abs=0.01), "a Gaussian's"
    assert shares[1] < 0.5 * shares[0]


def test_zd_is_one_sided_and_over_all_linears_of_the_block_together(generator: torch.Generator) -> None:
    weights = [torch.randn(8, 30, generator=generator), torch.randn(50, 5, generator=generator) * 3 + 1]
    together = torch.cat([weight.flatten() for weight in weights]).double()
    z = (together - together.mean()) / together.std(correction=0)
    assert zd(weights) == int((z > 1).sum()) / len(z)
    assert zd([torch.full((4, 4), 0.3)]) == 0.0, "no weight is larger than the rest"


def test_a_block_that_changes_its_input_has_more_lim(generator: torch.Generator) -> None:
    before, change = (torch.randn(1, 20, 16, generator=generator) for _ in range(2))
    lim = [-similarity(before, before + share * change) for share in (0.1, 0.0, 2.0)]
    assert lim[1] == pytest.approx(-1.0)
    assert lim[1] < lim[0] < lim[2]


def test_no_token_outweighs_another_in_lim(generator: torch.Generator) -> None:
    """Cosines are taken per token: a massive one that passes unchanged does not hide what happens to the rest."""
    before = torch.randn(1, 10, 16, generator=generator)
    after = -before
    before[0, 0] *= 1e4
    after[0, 0] = before[0, 0]
    assert similarity(before, after) == pytest.approx((1 - 9) / 10, abs=1e-5)


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    return [torch.randint(5, 300, (1, 40 + s), generator=torch.Generator().manual_seed(s)) for s in range(3)]


@pytest.fixture(scope="module")
def folder(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(2)


def measured(folder: Path, tokens: list[Tensor], request: Request) -> Profile:
    skeleton = open_original(Source(str(folder))).skeleton
    linears = {name: torch.bfloat16 for names in skeleton.linears for name in names}
    with Spill() as spill:
        walk = Walk(skeleton, tokens, spill, torch.float32, CPU)
        return measure(walk, walk.embed() if tokens else Activations(walk.spill), linears, request, Progress())


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


def test_measured_lim_is_that_of_the_block_modules(folder: Path, tokens: list[Tensor]) -> None:
    lim = measured(folder, tokens, Request(lim=True)).lim
    expected, behind_norm = hooked_lim(folder, tokens)
    assert lim == pytest.approx(expected, abs=1e-5)
    assert abs(lim[-1] - behind_norm) > 1e-3, "the final norm is not in the last block"


def test_lim_is_the_same_beside_gradients(folder: Path, tokens: list[Tensor]) -> None:
    alone = measured(folder, tokens, Request(lim=True)).lim
    beside = measured(folder, tokens, Request(salience=(Grid(4, 128, False),), lim=True)).lim
    assert beside == alone


def test_measured_zd_is_that_of_the_blocks_linears_and_needs_no_text(folder: Path, tokens: list[Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for block in model.model.layers:
        linears = [m.weight.detach().flatten().double() for m in block.modules() if isinstance(m, nn.Linear)]
        weights = torch.cat(linears)
        expected.append(float((weights > weights.mean() + weights.std(correction=0)).double().mean()))
    assert list(measured(folder, [], Request(zd=True)).zd) == pytest.approx(expected, abs=1e-5)
    assert (
        measured(folder, tokens, Request(zd=True, salience=(Grid(4, 128, False),))).zd
        == measured(folder, [], Request(zd=True)).zd
    )


@pytest.mark.parametrize("text", [True, False], ids=["of the text", "of random tokens"])
def test_fusion_groups_are_known_without_gradients(text: bool, folder: Path, tokens: list[Tensor]) -> None:
    expected = measured(folder, tokens[:1], Request(salience=(Grid(4, 128, False),))).groups
    assert measured(folder, tokens[:1] if text else [], Request(groups=True)) == Profile(groups=expected)
    assert measured(folder, tokens[:1], Request(lim=True)).groups == expected
    assert len(expected) == 8
