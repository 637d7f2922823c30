"""Trained weights and codes against their slow twins: values, gradients, moves, and the tensors that are stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmsqueeze import parts
from llmsqueeze.distillation.adjusted import Adjusted
from llmsqueeze.distillation.trained import Trained, TrainedWeight, norm_names
from llmsqueeze.distillation.trained_parts import TrainedCodes
from llmsqueeze.parts import Affine, DualBinary, Grid, LowRank, Part, Sparse, bitpack
from llmsqueeze.quantizers.dual_binary import in_order

ROWS, COLS = 12, 64
ODD, EVEN = torch.arange(ROWS) % 2 == 1, torch.arange(ROWS) % 2 == 0
ALL = frozenset(("scales", "norms", "lowrank", "codes"))
CONTINUOUS = ALL - {"codes"}


def grid_part(
    grid: Grid, rows: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 1, cols: int = COLS
) -> Part:
    make = torch.Generator().manual_seed(seed)
    count = ROWS if rows is None else int(rows.sum())
    codes = torch.randint(0, grid.max_code + 1, (count, cols), generator=make, dtype=torch.uint8)
    size = (count, grid.groups(cols))
    scale = torch.rand(size, generator=make) * 0.5 + 0.2
    scale = scale * torch.where(torch.rand(size, generator=make) < 0.5, -1.0, 1.0)
    second = torch.randint(0, grid.max_code + 1, size, generator=make, dtype=torch.uint8)
    if grid.dual:
        second = (-scale * (torch.rand(size, generator=make) * 0.6 + 0.2)).to(dtype)
    return parts.of_codes(codes, scale.to(dtype), second, grid, rows)


def outliers(share: float = 0.1) -> Sparse:
    make = torch.Generator().manual_seed(7)
    mask = torch.rand(ROWS, COLS, generator=make) < share
    return Sparse.from_mask(mask, (torch.randn(ROWS, COLS, generator=make) * 5).bfloat16())


def low_rank() -> LowRank:
    make = torch.Generator().manual_seed(8)
    factors = torch.randn(ROWS, 2, generator=make) * 0.3, torch.randn(2, COLS, generator=make)
    return LowRank.from_factors(*factors, torch.bfloat16)


SYMMETRIC, ASYMMETRIC, HALF = Grid(3, 16, True), Grid(3, 16, False), Grid(2, 24, True, half=True)
DUAL = Grid(2, 16, True, dual=True)
KINDS: dict[str, Callable[[], list[Part]]] = {
    "symmetric": lambda: [grid_part(SYMMETRIC)],
    "symmetric float16": lambda: [grid_part(SYMMETRIC, dtype=torch.float16)],
    "asymmetric": lambda: [grid_part(ASYMMETRIC)],
    "asymmetric 8 bit rows": lambda: [grid_part(Grid(8, -1, False), dtype=torch.float32)],
    "half": lambda: [grid_part(HALF)],
    "one bit": lambda: [grid_part(Grid(1, -1, True, half=True))],
    "some rows": lambda: [grid_part(ASYMMETRIC, ODD)],
    "mixed rows": lambda: [grid_part(ASYMMETRIC, ODD), grid_part(Grid(5, 16, False), EVEN, seed=2)],
    "dual": lambda: [grid_part(DUAL)],
    "dual rows": lambda: [grid_part(DUAL, ODD), grid_part(SYMMETRIC, EVEN)],
    "outliers": lambda: [grid_part(ASYMMETRIC), outliers()],
    "low rank": lambda: [grid_part(SYMMETRIC), low_rank()],
    "everything": lambda: [
        grid_part(DUAL, ODD),
        grid_part(ASYMMETRIC, EVEN),
        low_rank(),
        outliers(),
    ],
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def trained_weight(summands: Sequence[Part], train: frozenset[str], opened: torch.dtype | None = None) -> TrainedWeight:
    """`opened`: the float dtype that the tensors were opened in, which is not that of the file."""
    tensors = [dict(part.tensors()) for part in summands]
    if opened is not None:
        tensors = [{n: t.to(opened) if t.is_floating_point() else t for n, t in one.items()} for one in tensors]
    return TrainedWeight((ROWS, COLS), [part.spec() for part in summands], tensors, train)


def as_stored(weight: TrainedWeight) -> Tensor:
    with Trained({"w": weight}, {}, {}).as_stored():
        return weight.dense()


def shaken(weight: TrainedWeight, seed: int = 3) -> None:
    """Everything continuous moved somewhere else, as a step with its repairs might."""
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in weight.named_parameters():
            if name.endswith("delta"):
                drawn = torch.rand(parameter.shape, generator=make) * 2 - 1
                if name.split(".")[-2] in ("left", "right"):  # not beyond 1, which is the most that they store
                    drawn = -drawn.abs() * weight.get_submodule(name.rpartition(".")[0]).start
                parameter += drawn * (2.5 if ".zero." in name and weight_has_grid_zero(weight, name) else 0.3)
    for member in weight.members:
        if isinstance(member, TrainedCodes):
            member.keep_valid()


def weight_has_grid_zero(weight: TrainedWeight, name: str) -> bool:
    member = weight.get_submodule(name.rsplit(".", 2)[0])
    return isinstance(member, TrainedCodes) and isinstance(member.part, Affine)


@every_kind
@pytest.mark.parametrize("train", [CONTINUOUS, ALL, frozenset(("norms",))], ids=["continuous", "codes", "nothing"])
def test_before_any_step_a_weight_is_that_of_the_file(kind: str, train: frozenset[str]) -> None:
    summands = KINDS[kind]()
    for opened in (None, torch.float32):
        weight = trained_weight(summands, train, opened)
        expected = parts.sum_of_parts(summands)
        assert torch.allclose(weight.dense(), expected, atol=1e-6)
        assert torch.allclose(as_stored(weight), expected, atol=1e-6)
        if not any(isinstance(part, LowRank) for part in summands):
            assert torch.equal(weight.dense(), expected)
        stored = weight.stored()
        in_file = {f"parts.{i}.{name}": t for i, part in enumerate(summands) for name, t in part.tensors().items()}
        for name, tensor in stored.items():
            assert tensor.dtype == in_file[name].dtype
            assert torch.equal(tensor, in_file[name]), name
        names = {"scale", "zero", "alpha1", "alpha2", "left", "right"} if "scales" in train else set()
        names |= {"codes", "plane1", "plane2"} if "codes" in train else set()
        assert set(stored) == {n for n in in_file if n.rsplit(".")[-1] in names}
        assert torch.equal(weight.overlay(stored), expected)


@every_kind
def test_gradients_are_finite_differences(kind: str, generator: torch.Generator) -> None:
    """Of a linear function of the weight, which is linear in every single number that is trained."""
    weight = trained_weight(KINDS[kind](), CONTINUOUS)
    direction = torch.randn(ROWS, COLS, generator=generator)

    def value() -> float:
        return float((weight.dense().detach().double() * direction).sum())

    (weight.dense() * direction).sum().backward()
    checked = 0
    for name, parameter in weight.named_parameters():
        assert parameter.grad is not None, name
        of_grid = ".zero." in name and weight_has_grid_zero(weight, name)
        size = float(parameter.grad.abs().max())
        assert size > 0, name
        adjusted = weight.get_submodule(name.rpartition(".")[0])
        assert isinstance(adjusted, Adjusted)
        for i in itertools.islice(itertools.product(*map(range, parameter.shape)), 0, None, 3):
            step = 1.0 if of_grid else 0.25  # zeros are rounded: only whole levels show
            here = float(adjusted.start[i])
            ahead, back = step, step
            if of_grid:  # not off the grid
                member: Any = weight.get_submodule(name.rsplit(".", 2)[0])
                ahead, back = min(step, member.part.grid.max_code - here), min(step, here)
            parameter.data[i] = ahead
            up = value()
            parameter.data[i] = -back
            slope = (up - value()) / (ahead + back)
            parameter.data[i] = 0.0
            assert slope == pytest.approx(float(parameter.grad[i]), abs=2e-3 * size), f"{name} {i}"
            checked += 1
    assert checked >= 4


@every_kind
@pytest.mark.parametrize("train", [CONTINUOUS, ALL], ids=["continuous", "codes"])
def test_the_stored_values_are_those_measured(kind: str, train: frozenset[str]) -> None:
    summands = KINDS[kind]()
    weight = trained_weight(summands, train)
    before = weight.dense().detach()
    shaken(weight)
    exact = weight.dense().detach()
    assert (exact - before).abs().max() > 0.05
    measured, overlaid = as_stored(weight), weight.overlay(weight.stored())
    assert torch.allclose(measured, overlaid, atol=1e-6)
    if not any(isinstance(part, LowRank) for part in summands):
        assert torch.equal(measured, overlaid)
    assert torch.equal(weight.dense(), exact), "only measured so"
    assert (measured - exact).abs().max() < 0.05 * exact.abs().max()
    for part in summands:
        if isinstance(part, Sparse):
            mask = part.dense() != 0
            assert mask.any()
            assert torch.equal(overlaid[mask], part.dense()[mask])
            assert torch.equal(exact[mask], part.dense()[mask])


def test_factors_stay_within_their_range() -> None:
    """Every column of them begins with an entry at 1, which is the most that eight bits hold."""
    weight = trained_weight(KINDS["low rank"](), CONTINUOUS)
    with torch.no_grad():
        weight.get_parameter("members.1.left.delta").add_(weight.get_buffer("members.1.left.start") * 0.5)
    Trained({"w": weight}, {}, {}).after_step(0.01, 1.0)
    assert torch.allclose(weight.dense(), as_stored(weight), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_scale_that_became_0_is_stored_as_measured(dtype: torch.dtype) -> None:
    weight = trained_weight([grid_part(SYMMETRIC, dtype=dtype)], CONTINUOUS)
    with torch.no_grad():
        weight.get_parameter("members.0.scale.delta")[3, 1] = -weight.get_buffer("members.0.sign")[3, 1]
    assert torch.allclose(as_stored(weight), weight.overlay(weight.stored()), atol=1e-5)


@pytest.mark.parametrize("kind", ["asymmetric", "asymmetric 8 bit rows", "mixed rows"])
def test_zeros_stay_whole_and_on_the_grid(kind: str) -> None:
    summands = KINDS[kind]()
    weight = trained_weight(summands, CONTINUOUS)
    zeros = []
    for member in weight.members:
        assert isinstance(member, TrainedCodes)
        assert member.zero is not None
        most = member.part.grid.max_code
        with torch.no_grad():
            member.zero.delta.uniform_(-2.0 * most, 2.0 * most, generator=torch.Generator().manual_seed(1))
            zeros.append(member.zero.forward())
    overlaid = weight.overlay(weight.stored())
    assert torch.equal(as_stored(weight), overlaid)
    for member, zero in zip(weight.members, zeros, strict=True):
        assert isinstance(member, TrainedCodes)
        assert isinstance(member.part, Affine)
        member.keep_valid()
        grid, count = member.part.grid, len(member.part.codes)
        stored = bitpack.unpack(member.stored()["zero"], grid.bits, count).T.float()
        assert torch.equal(stored, zero.round().clamp(0, grid.max_code))
        assert (stored == 0).any(), "some were beyond"
        assert (stored == grid.max_code).any()
        assert member.zero is not None
        assert member.zero.forward().min() >= 0
        assert member.zero.forward().max() <= grid.max_code
    assert torch.equal(weight.overlay(weight.stored()), overlaid), "putting them back changes nothing that is stored"


def crossed() -> tuple[TrainedWeight, TrainedCodes, Tensor]:
    """A dual weight some of whose alphas have crossed, and which."""
    weight = trained_weight(KINDS["dual"](), CONTINUOUS)
    (member,) = weight.members
    assert isinstance(member, TrainedCodes)
    assert member.zero is not None
    with torch.no_grad():
        sign = member.sign
        member.scale.delta[0, 0] = -1.2 * sign[0, 0]  # alpha1 through zero
        member.scale.delta[2, 1] = -0.9 * sign[2, 1]  # less than alpha2
        member.zero.delta[4, 2] = 1.1 * sign[4, 2]  # alpha2 through zero
        member.zero.delta[7, 0] = -6.0 * sign[7, 0]  # more than alpha1
        member.zero.delta[9, 1] = 0.05  # stays where it may be
    ordered = in_order(member.scale.forward(), member.zero.forward())
    return weight, member, ~ordered


def test_alphas_that_would_cross_are_put_in_order_and_counted() -> None:
    weight, member, wrong = crossed()
    assert member.zero is not None
    assert wrong.nonzero().tolist() == [[0, 0], [2, 1], [4, 2], [7, 0]]
    before = member.scale.delta.detach().clone(), member.zero.delta.detach().clone()
    member.keep_valid()
    assert member.reordered == Trained({"w": weight}, {}, {}).reordered == 4
    assert in_order(member.scale.forward(), member.zero.forward()).all()
    assert torch.equal(member.scale.forward().sign(), member.sign)
    assert torch.equal(member.scale.delta[~wrong], before[0][~wrong])
    assert torch.equal(member.zero.delta[~wrong], before[1][~wrong])
    part = weight.stored()
    assert in_order(part["parts.0.alpha1"].float(), part["parts.0.alpha2"].float()).all(), "in the file as well"


def test_alphas_in_order_are_left_alone() -> None:
    _, member, _ = crossed()
    assert member.zero is not None
    member.keep_valid()
    before = member.scale.delta.detach().clone(), member.zero.delta.detach().clone()
    member.keep_valid()
    assert member.reordered == 4
    assert torch.equal(member.scale.delta, before[0])
    assert torch.equal(member.zero.delta, before[1])


# codes that move


def codes_of(part: Part) -> TrainedCodes:
    assert isinstance(part, (Affine, DualBinary))
    return TrainedCodes(part, True, True)


MOVING = {"symmetric": SYMMETRIC, "asymmetric": ASYMMETRIC, "half": HALF, "dual": DUAL}
every_moving = pytest.mark.parametrize("grid", MOVING.values(), ids=MOVING)


def hand_over(member: TrainedCodes, gradient: Tensor) -> None:
    assert member.pending is not None
    member.pending.grad = gradient.clone()


@every_moving
def test_only_the_largest_changes_beyond_half_a_level_move(grid: Grid, generator: torch.Generator) -> None:
    """Against the rule written out, code by code, over several steps."""
    member = codes_of(grid_part(grid))
    assert member.codes is not None
    pending = [0.0] * (ROWS * COLS)
    moved = 0
    for _ in range(6):
        gradient = torch.randn(ROWS, COLS, generator=generator)
        rms = math.sqrt(math.fsum(float(g) ** 2 for g in gradient.flatten()) / gradient.numel())
        before = member.codes.flatten().tolist()
        expected, strength = list(before), []
        for i, (code, g) in enumerate(zip(before, gradient.flatten().tolist(), strict=True)):
            pending[i] -= g * 0.3 / rms
            target = code + (1 if pending[i] > 0 else -1)
            if not 0 <= target <= grid.max_code:
                pending[i] = max(-0.5, min(0.5, pending[i]))
            elif abs(pending[i]) > 0.5:
                strength.append((abs(pending[i]), i))
        for _, i in sorted(strength, reverse=True)[: round(0.05 * len(before))]:
            expected[i] += 1 if pending[i] > 0 else -1
            pending[i] -= 1 if pending[i] > 0 else -1
        hand_over(member, gradient)
        count = member.move_codes(0.05, 0.3)
        assert member.codes.flatten().tolist() == expected
        assert count == sum(a != b for a, b in zip(before, expected, strict=True)) <= round(0.05 * len(before))
        assert member.pending is not None
        assert member.pending.flatten().tolist() == pytest.approx(pending, abs=1e-4)
        assert member.pending.grad is None
        moved += count
    assert moved > 10


@every_moving
def test_codes_never_leave_the_grid_and_go_where_the_loss_falls(grid: Grid, generator: torch.Generator) -> None:
    weight = trained_weight([grid_part(grid)], ALL)
    (member,) = weight.members
    assert isinstance(member, TrainedCodes)
    assert member.codes is not None
    direction = torch.randn(ROWS, COLS, generator=generator)
    for _ in range(40):
        before, codes = weight.dense().detach(), member.codes.clone().int()
        (weight.dense() * direction).sum().backward()
        assert member.pending is not None
        assert member.pending.grad is not None
        member.move_codes(0.2, 0.8)
        change = member.codes.int() - codes
        assert change.abs().max() <= 1
        assert member.codes.max() <= grid.max_code
        assert torch.equal(change != 0, weight.dense().detach() != before)
        assert ((weight.dense() - before) * direction <= 1e-6).all(), "every single move lowers this loss"
    expected = torch.where(direction * expanded_sign(member) > 0, 0, grid.max_code)
    assert (member.codes == expected).float().mean() > 0.9, "in the end all are where it is least"
    assert torch.equal(as_stored(weight), weight.overlay(weight.stored()))


def expanded_sign(member: TrainedCodes) -> Tensor:
    return member.part.grid.expand(member.sign, COLS)


def test_the_gradient_of_a_code_is_that_of_its_level(generator: torch.Generator) -> None:
    """A level of an even grid is a scale wide; behind outliers there is nothing to win."""
    weight = trained_weight(KINDS["outliers"](), ALL)
    direction = torch.randn(ROWS, COLS, generator=generator)
    (weight.dense() * direction).sum().backward()
    (member,) = weight.members
    assert isinstance(member, TrainedCodes)
    assert member.pending is not None
    assert member.pending.grad is not None
    mask = outliers().dense() != 0
    scale = member.part.grid.expand(member.scale.start, COLS)
    assert torch.allclose(member.pending.grad, (direction * scale).masked_fill(mask, 0.0), atol=1e-6)


def test_dual_codes_count_along_the_levels() -> None:
    """Also mirrored, and where only the codes are handed over."""
    part = grid_part(DUAL)
    assert isinstance(part, DualBinary)
    member = codes_of(part)
    assert member.codes is not None
    levels = []
    for code in range(4):
        member.codes.fill_(code)
        levels.append(member.dense().detach() * expanded_sign(member))
    assert all((b > a).all() for a, b in itertools.pairwise(levels))
    assert expanded_sign(member).unique().tolist() == [-1, 1]


def test_a_step_without_a_gradient_moves_nothing() -> None:
    member = codes_of(grid_part(ASYMMETRIC))
    assert member.move_codes(0.5, 1.0) == 0
    hand_over(member, torch.zeros(ROWS, COLS))
    assert member.move_codes(0.5, 1.0) == 0
    hand_over(member, torch.ones(ROWS, COLS))
    assert member.move_codes(0.0, 1.0) == 0, "and none where none may"


@pytest.mark.parametrize("cols", [40, 33])
def test_codes_of_rows_that_do_not_fill_their_words_move(cols: int) -> None:
    member = codes_of(grid_part(ASYMMETRIC, cols=cols))
    assert member.codes is not None
    before = member.codes.int()
    hand_over(member, -torch.ones(ROWS, cols))
    assert member.move_codes(0.5, 0.8) > 0
    assert (member.codes.int() - before).unique().tolist() == [0, 1]


def test_a_state_comes_back_whole(generator: torch.Generator) -> None:
    weight, twin = (trained_weight(KINDS["everything"](), ALL) for _ in range(2))
    norm = nn.Parameter(torch.rand(4))
    trained = Trained({"w": weight}, {"n": norm}, {"n": torch.bfloat16})
    shaken(weight)
    for part in trained.codes:
        hand_over(part, torch.randn(part.codes.shape, generator=generator))  # type: ignore[union-attr]
    assert trained.after_step(0.1, 30.0) > 0
    other = Trained({"w": twin}, {"n": nn.Parameter(torch.zeros(4))}, {"n": torch.bfloat16})
    other.restore({name: tensor.clone() for name, tensor in trained.state().items()})
    assert torch.equal(twin.dense(), weight.dense())
    assert torch.equal(other.norms["n"], norm)
    first, second = trained.stored(), other.stored()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["n"].dtype == torch.bfloat16


def test_training_codes_alone_leaves_the_scales_alone() -> None:
    """`train` names what is trained, and nothing else is."""
    weight = trained_weight(KINDS["asymmetric"](), frozenset(("codes",)))
    groups = Trained({"w": weight}, {}, {}).parameter_groups(0.1)
    assert groups == [], "codes move by their own rule"


def test_norms_learn_in_proportion_to_their_size(original: Any) -> None:
    names = norm_names(original)
    assert len(names) == 9
    assert all("norm" in name for name in names)
    norms = {name: nn.Parameter(torch.full((3,), 2.0 * (i + 1))) for i, name in enumerate(names[:2])}
    groups = Trained({}, norms, dict.fromkeys(norms, torch.bfloat16)).parameter_groups(0.1)
    assert [group["lr"] for group in groups] == pytest.approx([0.2, 0.4])
