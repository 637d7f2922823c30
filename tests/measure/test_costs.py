"""Costs in nats per token: their ingredients against ordinary backward passes, and a weight by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import correlated_moments, shrunk_moments
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmsqueeze import quantizers
from llmsqueeze.measure import costs
from llmsqueeze.measure.costs import Option, Rounding
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.request import Request
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.head import drawn_labels
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.original import Source, open_original
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers.curvature import Curvature, factorize
from llmsqueeze.quantizers.descent import descent
from llmsqueeze.quantizers.gptq import gptq
from llmsqueeze.quantizers.outliers import row_outliers
from llmsqueeze.quantizers.rtn import rtn

CPU = torch.device("cpu")
PRICED = (Option(Grid(2, 64, True, True)), Option(Grid(4, 128, False)), Option(Grid(3, 64, True), 0.02))


@pytest.fixture(scope="module")
def folder(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(2)


@pytest.fixture(scope="module")
def skeleton(folder: Path) -> Skeleton:
    return open_original(Source(str(folder))).skeleton


@contextmanager
def walking(skeleton: Skeleton, tokens: list[Tensor]) -> Iterator[Walk]:
    """A walk in float64."""
    with Spill() as spill:
        yield Walk(skeleton, tokens, spill, torch.float64, CPU)


def measured(skeleton: Skeleton, tokens: list[Tensor], options: tuple[Option, ...], **settings: Any) -> Profile:
    linears = {name: torch.bfloat16 for names in skeleton.linears for name in names}
    with walking(skeleton, tokens) as walk:
        return measure(walk, walk.embed(), linears, Request(options, **settings), Progress())


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    return [torch.randint(5, 300, (1, 30 + s), generator=torch.Generator().manual_seed(s)) for s in range(4)]


@pytest.fixture(scope="module")
def profile(skeleton: Skeleton, tokens: list[Tensor]) -> Profile:
    return measured(skeleton, tokens, PRICED)


@pytest.fixture(scope="module")
def drawn(skeleton: Skeleton, tokens: list[Tensor]) -> Profile:
    """Labels from the model, by seed 1."""
    return measured(skeleton, tokens, PRICED[1:2], labels="model", seed=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def hooked(model: nn.Module, tokens: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every linear's input and output gradient, [tokens of all samples, features], of the loss summed over labels."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []

    def keep(name: str, x: Tensor, output: Tensor) -> None:
        output.register_hook(lambda gradient: seen.setdefault(name, []).append((x.detach()[0], gradient[0])))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            handles.append(module.register_forward_hook(lambda _m, a, out, name=name: keep(name, a[0], out)))
    for row in tokens:
        logits = model(input_ids=row, use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in seen.items()}


def test_row_gradients_are_mean_squares_of_an_ordinary_backward_pass(
    profile: Profile, hooked: dict[str, tuple[Tensor, Tensor]], tokens: list[Tensor]
) -> None:
    """Of the summed loss, per label, with the text itself as labels."""
    labels = sum(row.shape[1] - 1 for row in tokens)
    assert profile.row_gradient.keys() == hooked.keys()
    for name, (_, gradient) in hooked.items():
        expected = gradient.square().sum(dim=0) / labels
        assert torch.allclose(profile.row_gradient[name].double(), expected, rtol=1e-5), name


def test_the_profiles_loss_is_the_texts_whatever_the_labels(
    profile: Profile, drawn: Profile, model: nn.Module, tokens: list[Tensor]
) -> None:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:]).item() for row in tokens]
    assert profile.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert drawn.loss == pytest.approx(profile.loss, rel=1e-9)


def test_costs_are_half_the_gradient_times_the_output_error(
    profile: Profile, model: nn.Module, hooked: dict[str, tuple[Tensor, Tensor]], tokens: list[Tensor]
) -> None:
    """1/2 * g[r] * d H d^T with H the shrunk mean of x x^T, row by row, for a grid without outliers."""
    for at in (0, 1):
        for name, (x, gradient) in hooked.items():
            weight = model.get_submodule(name).weight.detach()
            d = weight - rtn(weight, PRICED[at].grid, torch.bfloat16).dense()
            labels = len(x) - 4
            H = shrunk_moments(x.split([row.shape[1] for row in tokens]))
            g = gradient.square().sum(dim=0) / labels
            expected = torch.stack([0.5 * g[r] * (d[r] @ H @ d[r]) for r in range(len(d))])
            assert torch.allclose(profile.costs[name][at].double(), expected, rtol=1e-4, atol=1e-12), name


def test_costs_by_the_trace_are_half_the_average_diagonal_times_the_squared_rounding_error(
    skeleton: Skeleton,
    profile: Profile,
    model: nn.Module,
    hooked: dict[str, tuple[Tensor, Tensor]],
    tokens: list[Tensor],
) -> None:
    """tr(G x A) / numel with G and A the mean squares of output gradients and inputs; no input is known to rounding."""
    by_trace = measured(skeleton, tokens, PRICED[:2], trace=True)
    for name, (x, gradient) in hooked.items():
        weight, labels = model.get_submodule(name).weight.detach(), len(x) - 4
        average = gradient.square().sum(dim=0).mean() / labels * x.square().mean()
        for at in (0, 1):
            d = weight - rtn(weight, PRICED[at].grid, torch.bfloat16).dense()
            expected = 0.5 * average * d.square().sum(dim=1)
            assert torch.allclose(by_trace.costs[name][at].double(), expected, rtol=1e-4), name
        assert torch.equal(by_trace.row_gradient[name], profile.row_gradient[name])


# ----------------------------------------------------------------------------------------------- a weight by itself


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(60, 96, generator=generator) * 0.05


@pytest.fixture
def moments(generator: torch.Generator) -> Tensor:
    return correlated_moments(96, generator, 300)


@pytest.fixture
def curvature(moments: Tensor) -> Curvature:
    return factorize(moments.clone())


def prices(weight: Tensor, curvature: Curvature, quantizer: str, options: tuple[Option, ...] = PRICED) -> Tensor:
    return costs.price(weight, torch.ones(len(weight)), curvature, options, Rounding(quantizer, torch.float32, True))


def test_what_stays_as_it_is_costs_nothing(weight: Tensor, moments: Tensor, curvature: Curvature) -> None:
    """Outliers leave both the range that is rounded and the error: against a slow loop."""
    option = Option(Grid(3, 32, True), 0.05)
    priced = costs.price(weight, torch.arange(60.0), curvature, [option], Rounding("rtn", torch.float32, False))[0]
    assert option.kept(96) == 5
    kept = row_outliers(weight, curvature, 5)
    rounded = rtn(weight, option.grid, torch.float32, None, kept).dense()
    for r in range(0, 60, 9):
        d = [0.0 if kept[r, j] else float(weight[r, j] - rounded[r, j]) for j in range(96)]
        cost = sum(d[i] * float(moments[i, j]) * d[j] for i in range(96) for j in range(96))
        assert float(priced[r]) == pytest.approx(0.5 * r * cost, rel=1e-3, abs=1e-9)


def test_gptq_prices_are_its_own_errors(weight: Tensor, moments: Tensor, curvature: Curvature) -> None:
    d = weight - gptq(weight, PRICED[0].grid, torch.float32, curvature, None, True).dense()
    expected = 0.5 * ((d @ moments) * d).sum(dim=1)
    assert torch.allclose(prices(weight, curvature, "gptq")[0], expected, rtol=1e-3)


def test_descent_prices_are_gptqs_lowered_by_what_descent_saves_on_some_rows(
    weight: Tensor, moments: Tensor, curvature: Curvature
) -> None:
    """With no more rows than are tried their sum is that of descent itself."""
    few = weight[: costs.TRIED_ROWS]
    priced, start = prices(few, curvature, "descent"), prices(few, curvature, "gptq")
    for at in (0, 1):
        d = few - descent(few, PRICED[at].grid, torch.float32, curvature, None, True).dense()
        assert float(priced[at].sum()) == pytest.approx(float(0.5 * ((d @ moments) * d).sum()), rel=1e-3)
        ratio = priced[at] / start[at]
        assert torch.allclose(ratio, ratio[0].expand(len(few)), rtol=1e-4), "one factor for all rows"
        assert 0.2 < float(ratio[0]) < 1


def test_more_rows_than_are_tried_share_the_factor(weight: Tensor, curvature: Curvature) -> None:
    ratio = prices(weight, curvature, "descent") / prices(weight, curvature, "gptq")
    assert torch.allclose(ratio, ratio[:, :1].expand(3, 60), rtol=1e-4)
    assert (ratio[:, 0] < 1).all()


def test_pricing_some_rows_at_a_time_changes_nothing(
    weight: Tensor, curvature: Curvature, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prices(weight, curvature, "descent")
    monkeypatch.setitem(quantizers.ROUNDING_BYTES, "cpu", 7 * 4 * 96)
    assert torch.allclose(prices(weight, curvature, "descent"), whole, rtol=1e-5)


def test_an_option_reads_as_tables_write_it() -> None:
    assert [str(option) for option in PRICED] == [
        "2 bit g64 half",
        "4 bit g128 asymmetric",
        "3 bit g64 + 2 % outliers",
    ]
    assert str(Option(Grid(1, -1, True, True), 0.005)) == "1 bit row half + 0.5 % outliers"


# ---------------------------------------------------------------------------------------- labels that the model draws


@contextmanager
def embedded(walk: Walk) -> Iterator[None]:
    """The walk knows the calls of its blocks, which the head has to skip."""
    walk.embed()
    yield


@pytest.mark.parametrize("logits_bytes", [1 << 26, 1 << 12], ids=["whole", "sliced"])
def test_the_gradient_is_that_of_labels_drawn_from_the_whole_softmax(
    logits_bytes: int, skeleton: Skeleton, model: nn.Module, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsqueeze.model.blockwise.head.LOGITS_BYTES", logits_bytes)
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 31, 128, generator=make, dtype=torch.float64)
    draw = torch.rand(30, generator=make)
    row = tokens[1]
    with walking(skeleton, tokens) as walk, embedded(walk), walk.head.resident():
        assert len(walk.head._tokens(30)) == {1 << 26: 1, 1 << 12: 30}[logits_bytes]
        assert len(walk.head._slices(128)) > 1 or logits_bytes == 1 << 26
        loss, gradient = walk.head.gradient(hidden, row, draw)
        plain, on_text = walk.head.gradient(hidden, row)
    start = hidden.clone().requires_grad_(True)
    logits = model.lm_head(model.model.norm(start))[0, :-1]
    reached = logits.softmax(dim=-1).cumsum(dim=-1)
    labels = (reached <= draw[:, None]).sum(dim=-1)
    assert len(set(labels.tolist())) > 10
    nn.functional.cross_entropy(logits, labels).backward()
    assert torch.allclose(gradient, start.grad, atol=1e-12)
    assert loss == plain, "the loss is the text's"
    assert not torch.allclose(gradient, on_text, atol=1e-6)


def test_labels_are_as_frequent_as_they_are_probable(generator: torch.Generator) -> None:
    """Evenly spread draws give every label its share, to one draw."""
    count = 4000
    probability = torch.randn(50, generator=generator, dtype=torch.float64).mul(2).softmax(dim=0)
    draw = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    frequency = torch.bincount(drawn_labels(probability.expand(count, -1), draw), minlength=50) / count
    assert (frequency - probability).abs().max() <= 1 / count


def test_a_draw_beyond_all_rounding_is_the_last_label() -> None:
    """The sum of probabilities may end a little below one."""
    probability = torch.tensor([[0.5, 0.2, 0.2, 0.0999]])
    assert drawn_labels(probability, torch.tensor([0.9999999])).tolist() == [3]


def test_drawn_labels_are_a_matter_of_the_seed(
    profile: Profile, drawn: Profile, skeleton: Skeleton, tokens: list[Tensor]
) -> None:
    same, other = (measured(skeleton, tokens, PRICED[1:2], labels="model", seed=seed) for seed in (1, 2))
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(drawn.row_gradient[name], same.row_gradient[name])
    assert not torch.equal(drawn.row_gradient[name], other.row_gradient[name])
    assert not torch.equal(drawn.row_gradient[name], profile.row_gradient[name])


def test_the_draw_is_uniform_over_all_samples_not_the_same_for_each(skeleton: Skeleton, tokens: list[Tensor]) -> None:
    """The same text twice is labelled differently."""
    once, twice, text_once, text_twice = (
        measured(skeleton, tokens[:1] * count, PRICED[1:2], labels=labels).row_gradient
        for labels in ("model", "text")
        for count in (1, 2)
    )
    assert all(not torch.allclose(once[name], twice[name], rtol=1e-3) for name in once)
    assert all(torch.allclose(text_once[name], text_twice[name], rtol=1e-4) for name in once)


def test_costs_fall_with_the_width_for_nearly_all_rows(demo_of: Callable[[int], Path], tokens: list[Tensor]) -> None:
    skeleton = open_original(Source(str(demo_of(1)))).skeleton
    options = tuple(Option(Grid(bits, 128, True, bits < 3)) for bits in (1, 2, 3, 4, 5, 6, 8))
    profile = measured(skeleton, tokens, options, quantizer="gptq", search=True, labels="model")
    costs = torch.cat(list(profile.costs.values()), dim=1)
    assert (costs[1:] < costs[:-1]).double().mean(dim=1).min() > 0.97
    assert (costs[-1] < costs[0] / 100).all()
