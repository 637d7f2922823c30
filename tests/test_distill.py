"""Distillation: losses, answers and gradients against slow twins; results that open, never worse, and can go on."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import llmsqueeze
from llmsqueeze import bitpack, blocks, blockwise, parts, teacher, training
from llmsqueeze.calibrate import calibration_rows, calibration_text, load_tokenizer
from llmsqueeze.checkpoint import open_checkpoint
from llmsqueeze.cli import app
from llmsqueeze.compensate.distill import (
    Teacher,
    distillation_loss,
    teacher_losses,
    token_losses,
    token_weights,
)
from llmsqueeze.compensate.trained import Adjusted, Trained, TrainedCodes, TrainedWeight, norm_names
from llmsqueeze.compress import quantize
from llmsqueeze.demo import stories as demo_stories
from llmsqueeze.distillation import make_distillation
from llmsqueeze.distilling import distill
from llmsqueeze.errors import RecipeError
from llmsqueeze.parts import Affine, DualBinary, Grid, LowRank, Part, Sparse
from llmsqueeze.progress import Progress
from llmsqueeze.quantize.dual_binary import in_order
from llmsqueeze.recipes import make_recipe
from llmsqueeze.skeleton import Skeleton, build_skeleton
from llmsqueeze.teacher import answers, ask, row_file

CPU = torch.device("cpu")
VOCABULARY = 626  # of the demo
SHORT = {"samples": 6, "held_back": 3, "batch_size": 2, "seq_len": 32}
OPTIONS = ["--samples", 6, "--held-back", 3, "--batch-size", 2, "--seq-len", 32, "--device", "cpu"]


def llmsqueeze_cli(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command, run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: object) -> str:
    """stderr of a call that must end with code 2, one message, and no traceback."""
    code, out, err = llmsqueeze_cli(*arguments)
    assert code == 2, f"{out}{err}"
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


@pytest.fixture(scope="module")
def stories() -> str:
    """The beginning of the demo's text; to write and cut up all of it takes as long as a short distillation."""
    return calibration_text(None, "demo").content[:60_000]


@pytest.fixture(scope="module", autouse=True)
def short_text(stories: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo_stories, "calibration_text", lambda: stories)
        yield


@pytest.fixture
def text_file(stories: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for other processes."""
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text(stories)
    return file


# the losses


def distributions(generator: torch.Generator, tokens: int = 9, vocabulary: int = 13) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's logits."""
    made = torch.randn(2, tokens, vocabulary, generator=generator) * 2
    return made[0], made[1]


def kept(logits: Tensor, k: int) -> Teacher:
    """The `k` largest of a distribution, one token and one outcome at a time."""
    index, log_p, log_rest, entropy = [], [], [], []
    for row in logits.double().log_softmax(dim=1):
        order = sorted(range(len(row)), key=lambda v, row=row: -float(row[v]))
        index.append(order[:k])
        log_p.append([float(row[v]) for v in order[:k]])
        rest = math.fsum(math.exp(row[v]) for v in order[k:])
        log_rest.append(math.log(rest) if rest else -math.inf)
        entropy.append(-math.fsum(math.exp(lp) * lp for lp in row.tolist()))
    return Teacher(torch.tensor(index), torch.tensor(log_p), torch.tensor(log_rest), torch.tensor(entropy))


def merged(logits: Tensor, index: Tensor) -> list[list[float]]:
    """Probabilities of the outcomes in `index` and, where there are others, of all of those together."""
    made = []
    for row, chosen in zip(logits.double().softmax(dim=1).tolist(), index.tolist(), strict=True):
        others = [p for v, p in enumerate(row) if v not in chosen]
        made.append([row[v] for v in chosen] + ([math.fsum(others)] if others else []))
    return made


def cross_entropies(p: list[list[float]], q: list[list[float]]) -> Tensor:
    rows = zip(p, q, strict=True)
    return torch.tensor([-math.fsum(a * math.log(b) for a, b in zip(*row, strict=True)) for row in rows])


@pytest.mark.parametrize("k", [1, 4, 12, 13])
def test_token_losses_are_the_cross_entropy_with_the_other_outcomes_merged(k: int, generator: torch.Generator) -> None:
    said, asked = distributions(generator)
    teacher_ = kept(said, k)
    expected = cross_entropies(merged(said, teacher_.index), merged(asked, teacher_.index))
    assert torch.allclose(token_losses(asked, teacher_), expected, atol=1e-5)
    if k == 13:
        full = -(said.softmax(1) * asked.log_softmax(1)).sum(1)
        assert torch.allclose(token_losses(asked, teacher_), full, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 13])
def test_the_least_loss_is_the_teachers_own_and_what_is_above_it_is_a_divergence(
    k: int, generator: torch.Generator
) -> None:
    said, asked = distributions(generator)
    teacher_ = kept(said, k)
    own = said.clone().requires_grad_(True)
    least = teacher_losses(teacher_)
    assert torch.allclose(token_losses(own, teacher_), least, atol=1e-5)
    token_losses(own, teacher_).sum().backward()
    assert own.grad is not None
    assert own.grad.abs().max() < 1e-5, "a minimum"
    p, q = merged(said, teacher_.index), merged(asked, teacher_.index)
    divergence = token_losses(asked, teacher_) - least
    assert torch.allclose(divergence, cross_entropies(p, q) - cross_entropies(p, p), atol=1e-5)
    assert (divergence > 0).all()
    full = (said.softmax(1) * (said.log_softmax(1) - asked.log_softmax(1))).sum(1)
    assert (divergence <= full + 1e-5).all(), "a lower bound"


@pytest.mark.parametrize(("weight", "gamma"), [(0.0, 1.0), (3.0, 0.0), (0.0, 0.0)])
def test_without_weight_or_gamma_it_is_plain_distillation_exactly(
    weight: float, gamma: float, generator: torch.Generator
) -> None:
    said, asked = distributions(generator)
    teacher_ = kept(said, 5)
    plain = token_losses(asked, teacher_).mean()
    assert torch.equal(distillation_loss(asked, teacher_, weight, gamma), plain)
    assert torch.equal(distillation_loss(asked, teacher_), plain)
    assert not torch.isclose(distillation_loss(asked, teacher_, 3.0, 1.0), plain, rtol=1e-4)


def test_ambiguous_tokens_weigh_more() -> None:
    certain, open_ = torch.zeros(13), torch.zeros(13)
    certain[2] = 30.0
    logits = torch.stack([certain, open_])
    weights = token_weights(logits, kept(logits, 5), weight=4.0, gamma=2.0)
    assert weights.tolist() == pytest.approx([1.0, 5.0], abs=1e-4), "Hn is 0 and 1"


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_weights_are_the_formulas_and_carry_no_gradient(gamma: float, generator: torch.Generator) -> None:
    said, asked = distributions(generator)
    teacher_ = kept(said, 5)
    asked.requires_grad_(True)
    rows = list(zip(merged(said, torch.arange(13).expand(9, 13)), asked.softmax(1).tolist(), strict=True))
    entropies = [[-math.fsum(p * math.log(p) for p in one) / math.log(13) for one in pair] for pair in rows]
    expected = torch.tensor([1 + 2.0 * math.sqrt(hp * hq) ** gamma for hp, hq in entropies])
    weights = token_weights(asked, teacher_, 2.0, gamma)
    assert torch.allclose(weights, expected, atol=1e-5)
    assert not weights.requires_grad
    fixed = (token_losses(asked, teacher_) * (expected / expected.mean())).mean()
    loss = distillation_loss(asked, teacher_, 2.0, gamma)
    assert torch.allclose(loss, fixed, atol=1e-5)
    found, wanted = (torch.autograd.grad(one, asked)[0] for one in (loss, fixed))
    assert torch.allclose(found, wanted, atol=1e-6)


# the teacher's answers


@pytest.fixture(scope="module")
def original() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llmsqueeze.demo.MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture
def skeleton(demo_dir: Path) -> Skeleton:
    return build_skeleton(open_checkpoint(demo_dir), False)


@pytest.fixture
def samples() -> list[Tensor]:
    make = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (1, 20), generator=make) for _ in range(3)]


@pytest.mark.parametrize("k", [1, 7, VOCABULARY, 1000])
@pytest.mark.parametrize("at_once", [VOCABULARY, 100, 20])
def test_answers_are_the_models(
    k: int,
    at_once: int,
    skeleton: Skeleton,
    samples: list[Tensor],
    original: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the vocabulary comes in slices, smaller and larger than k."""
    monkeypatch.setattr(blocks, "LOGITS_BYTES", at_once * 19 * 4)
    key = ask(skeleton, samples, tmp_path / "cache", k, CPU, Progress())
    for row in samples:
        said = answers(tmp_path / "cache", key, row)
        with torch.no_grad():
            log_p = original(row).logits[0, :-1].double().log_softmax(dim=1)
        width = min(k, VOCABULARY)
        assert said.index.shape == said.log_p.shape == (19, width)
        assert torch.allclose(said.log_p.double(), log_p.topk(width, dim=1).values, atol=2e-5)
        assert torch.allclose(log_p.gather(1, said.index.long()), said.log_p.double(), atol=2e-5), "of these tokens"
        assert all(len(set(chosen)) == width for chosen in said.index.tolist())
        assert torch.allclose(said.entropy.double(), -(log_p.exp() * log_p).sum(1), atol=1e-3)
        mass = 1 - log_p.exp().topk(width, dim=1).values.sum(1)
        assert torch.allclose(said.log_rest.double().exp(), mass.clamp(min=0), atol=3e-5)


def test_where_all_is_kept_nothing_is_left(skeleton: Skeleton, samples: list[Tensor], tmp_path: Path) -> None:
    key = ask(skeleton, samples, tmp_path, VOCABULARY, CPU, Progress())
    for row in samples:
        said = answers(tmp_path, key, row)
        assert (said.log_rest == -math.inf).all()


def test_answers_that_are_there_are_not_made_again(
    skeleton: Skeleton, samples: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ask(skeleton, samples, tmp_path, 9, CPU, Progress())
    files = [row_file(tmp_path, key, row) for row in samples]
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing else is left"
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files}
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "Walk", None)  # cannot be called
        assert ask(skeleton, samples, tmp_path, 9, CPU, Progress()) == key
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files}
    files[1].rename(files[1].with_suffix(".half"))  # as a run leaves it that was killed while it wrote
    files[1].with_suffix(".half").write_bytes(b"cut sho")
    walked = []
    whole = teacher.Walk
    monkeypatch.setattr(teacher, "Walk", lambda s, rows, *rest: walked.append(list(rows)) or whole(s, rows, *rest))
    ask(skeleton, samples, tmp_path, 9, CPU, Progress())
    assert len(walked) == 1
    assert [torch.equal(row, samples[1]) for row in walked[0]] == [True], "only what was missing"
    assert all(file.read_bytes() == before[file][2] for file in files)
    assert files[0].stat().st_ino == before[files[0]][1]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert ask(skeleton, samples[:1], tmp_path, 8, CPU, Progress()) != key, "other answers have another key"


# weights that are trained

ROWS, COLS = 12, 64
ODD, EVEN = torch.arange(ROWS) % 2 == 1, torch.arange(ROWS) % 2 == 0
ALL = frozenset(("scales", "norms", "lowrank", "codes"))
CONTINUOUS = ALL - {"codes"}


def grid_part(
    grid: Grid, rows: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 1, cols: int = COLS
) -> Part:
    make = torch.Generator().manual_seed(seed)
    held = ROWS if rows is None else int(rows.sum())
    codes = torch.randint(0, grid.max_code + 1, (held, cols), generator=make, dtype=torch.uint8)
    size = (held, grid.groups(cols))
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


def trained_weight(made: Sequence[Part], train: frozenset[str], opened: torch.dtype | None = None) -> TrainedWeight:
    """`opened`: the float dtype that the tensors were opened in, which is not that of the file."""
    tensors = [dict(part.tensors()) for part in made]
    if opened is not None:
        tensors = [{n: t.to(opened) if t.is_floating_point() else t for n, t in held.items()} for held in tensors]
    return TrainedWeight((ROWS, COLS), [part.spec() for part in made], tensors, train)


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
def test_before_any_step_a_weight_is_the_files(kind: str, train: frozenset[str]) -> None:
    made = KINDS[kind]()
    for opened in (None, torch.float32):
        weight = trained_weight(made, train, opened)
        expected = parts.sum_of_parts(made)
        assert torch.allclose(weight.dense(), expected, atol=1e-6)
        assert torch.allclose(as_stored(weight), expected, atol=1e-6)
        if not any(isinstance(part, LowRank) for part in made):
            assert torch.equal(weight.dense(), expected)
        stored = weight.stored()
        held = {f"parts.{i}.{name}": t for i, part in enumerate(made) for name, t in part.tensors().items()}
        for name, tensor in stored.items():
            assert tensor.dtype == held[name].dtype
            assert torch.equal(tensor, held[name]), name
        wanted = {"scale", "zero", "alpha1", "alpha2", "left", "right"} if "scales" in train else set()
        wanted |= {"codes", "plane1", "plane2"} if "codes" in train else set()
        assert set(stored) == {n for n in held if n.rsplit(".")[-1] in wanted}
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
            found = (up - value()) / (ahead + back)
            parameter.data[i] = 0.0
            assert found == pytest.approx(float(parameter.grad[i]), abs=2e-3 * size), f"{name} {i}"
            checked += 1
    assert checked >= 4


@every_kind
@pytest.mark.parametrize("train", [CONTINUOUS, ALL], ids=["continuous", "codes"])
def test_what_is_stored_is_what_was_measured(kind: str, train: frozenset[str]) -> None:
    made = KINDS[kind]()
    weight = trained_weight(made, train)
    before = weight.dense().detach()
    shaken(weight)
    exact = weight.dense().detach()
    assert (exact - before).abs().max() > 0.05
    measured, overlaid = as_stored(weight), weight.overlay(weight.stored())
    assert torch.allclose(measured, overlaid, atol=1e-6)
    if not any(isinstance(part, LowRank) for part in made):
        assert torch.equal(measured, overlaid)
    assert torch.equal(weight.dense(), exact), "only measured so"
    assert (measured - exact).abs().max() < 0.05 * exact.abs().max()
    for part in made:
        if isinstance(part, Sparse):
            mask = part.dense() != 0
            assert mask.any()
            assert torch.equal(overlaid[mask], part.dense()[mask])
            assert torch.equal(exact[mask], part.dense()[mask])


def test_factors_stay_within_what_they_can_store() -> None:
    """Every column of them begins with an entry at 1, which is the most that eight bits hold."""
    weight = trained_weight(KINDS["low rank"](), CONTINUOUS)
    with torch.no_grad():
        weight.get_parameter("members.1.left.delta").add_(weight.get_buffer("members.1.left.start") * 0.5)
    Trained({"w": weight}, {}, {}).after_step(0.01, 1.0)
    assert torch.allclose(weight.dense(), as_stored(weight), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_scale_that_came_to_nothing_is_stored_as_measured(dtype: torch.dtype) -> None:
    weight = trained_weight([grid_part(SYMMETRIC, dtype=dtype)], CONTINUOUS)
    with torch.no_grad():
        weight.get_parameter("members.0.scale.delta")[3, 1] = -weight.get_buffer("members.0.sign")[3, 1]
    assert torch.allclose(as_stored(weight), weight.overlay(weight.stored()), atol=1e-5)


@pytest.mark.parametrize("kind", ["asymmetric", "asymmetric 8 bit rows", "mixed rows"])
def test_zeros_stay_whole_and_on_the_grid(kind: str) -> None:
    made = KINDS[kind]()
    weight = trained_weight(made, CONTINUOUS)
    wanted = []
    for member in weight.members:
        assert isinstance(member, TrainedCodes)
        assert member.zero is not None
        most = member.part.grid.max_code
        with torch.no_grad():
            member.zero.delta.uniform_(-2.0 * most, 2.0 * most, generator=torch.Generator().manual_seed(1))
            wanted.append(member.zero.forward())
    overlaid = weight.overlay(weight.stored())
    assert torch.equal(as_stored(weight), overlaid)
    for member, zero in zip(weight.members, wanted, strict=True):
        assert isinstance(member, TrainedCodes)
        assert isinstance(member.part, Affine)
        member.keep_valid()
        grid, held = member.part.grid, len(member.part.codes)
        stored = bitpack.unpack(member.stored()["zero"], grid.bits, held).T.float()
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
    assert member.guarded == Trained({"w": weight}, {}, {}).guarded == 4
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
    assert member.guarded == 4
    assert torch.equal(member.scale.delta, before[0])
    assert torch.equal(member.zero.delta, before[1])


# codes that move


def codes_of(part: Part) -> TrainedCodes:
    assert isinstance(part, (Affine, DualBinary))
    return TrainedCodes(part, True, True)


MOVING = {"symmetric": SYMMETRIC, "asymmetric": ASYMMETRIC, "half": HALF, "dual": DUAL}
every_moving = pytest.mark.parametrize("grid", MOVING.values(), ids=MOVING)


def hand_over(member: TrainedCodes, gradient: Tensor) -> None:
    assert member.wish is not None
    member.wish.grad = gradient.clone()


@every_moving
def test_only_wishes_beyond_half_a_level_move_and_the_strongest_of_them(grid: Grid, generator: torch.Generator) -> None:
    """Against the rule written out, code by code, over several steps."""
    member = codes_of(grid_part(grid))
    assert member.codes is not None
    wish = [0.0] * (ROWS * COLS)
    moved = 0
    for _ in range(6):
        gradient = torch.randn(ROWS, COLS, generator=generator)
        rms = math.sqrt(math.fsum(float(g) ** 2 for g in gradient.flatten()) / gradient.numel())
        before = member.codes.flatten().tolist()
        expected, strength = list(before), []
        for i, (code, g) in enumerate(zip(before, gradient.flatten().tolist(), strict=True)):
            wish[i] -= g * 0.3 / rms
            target = code + (1 if wish[i] > 0 else -1)
            if not 0 <= target <= grid.max_code:
                wish[i] = max(-0.5, min(0.5, wish[i]))
            elif abs(wish[i]) > 0.5:
                strength.append((abs(wish[i]), i))
        for _, i in sorted(strength, reverse=True)[: round(0.05 * len(before))]:
            expected[i] += 1 if wish[i] > 0 else -1
            wish[i] -= 1 if wish[i] > 0 else -1
        hand_over(member, gradient)
        count = member.move_codes(0.05, 0.3)
        assert member.codes.flatten().tolist() == expected
        assert count == sum(a != b for a, b in zip(before, expected, strict=True)) <= round(0.05 * len(before))
        assert member.wish is not None
        assert member.wish.flatten().tolist() == pytest.approx(wish, abs=1e-4)
        assert member.wish.grad is None
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
        assert member.wish is not None
        assert member.wish.grad is not None
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
    assert member.wish is not None
    assert member.wish.grad is not None
    mask = outliers().dense() != 0
    scale = member.part.grid.expand(member.scale.start, COLS)
    assert torch.allclose(member.wish.grad, (direction * scale).masked_fill(mask, 0.0), atol=1e-6)


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


def test_norms_are_found_and_learn_by_their_size(original: Any) -> None:
    names = norm_names(original)
    assert len(names) == 9
    assert all("norm" in name for name in names)
    norms = {name: nn.Parameter(torch.full((3,), 2.0 * (i + 1))) for i, name in enumerate(names[:2])}
    groups = Trained({}, norms, dict.fromkeys(norms, torch.bfloat16)).parameter_groups(0.1)
    assert [group["lr"] for group in groups] == pytest.approx([0.2, 0.4])


# the command, on compressed models

MADE: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 2},
    "dbllm": {"method": "dbllm", "quantizer": "rtn"},
    "gwq": {"method": "gwq", "quantizer": "rtn", "bits": 2},
    "mixllm": {"method": "mixllm", "quantizer": "rtn", "low_bits": 2, "high_bits": 4},
    "auto": {"method": "auto", "quantizer": "rtn", "bits": 2.5, "widths": "1,2,3"},
    "lorc": {"method": "rtn", "bits": 2, "lorc_rank": 2},
}


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo, compressed badly, by each of the methods; made when it is asked for."""
    folder = tmp_path_factory.mktemp("squeezed")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            quantize("demo", make_recipe({**MADE[name], "samples": 2, "seq_len": 32}), folder / name)
        return folder / name

    return make


def run(source: Path, out: Path, progress: Progress | None = None, **settings: Any) -> dict[str, Any]:
    return distill(str(source), "demo", make_distillation({**SHORT, **settings}), out, device="cpu", progress=progress)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(first: Path, second: Path) -> bool:
    """Whether the weights of two folders are the same to the bit."""
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    return all(
        a[n].dtype == b[n].dtype and a[n].numpy(force=True).tobytes() == b[n].numpy(force=True).tobytes()
        if a[n].dtype != torch.bfloat16
        else torch.equal(a[n].view(torch.int16), b[n].view(torch.int16))
        for n in a
    )


@functools.cache
def measured(folder: Path, original: Any) -> float:
    """KL(original || folder) on the held-back rows, from whole distributions of the opened models."""
    tokenizer = load_tokenizer(llmsqueeze.demo.MODEL_DIR)
    text = calibration_text(None, "demo")
    apart = calibration_rows(text, tokenizer, SHORT["samples"], SHORT["seq_len"], 0, SHORT["held_back"]).held_back
    assert len(apart) == 3
    opened = llmsqueeze.load(str(folder), dtype=torch.float32)
    divergences = []
    with torch.no_grad():
        for row in apart:
            p, q = (model(row).logits[0, :-1].double().log_softmax(1) for model in (original, opened))
            divergences.append((p.exp() * (p - q)).sum(1))
    return float(torch.cat(divergences).mean())


CONTINUOUS_NAMES = ("scale", "zero", "alpha1", "alpha2", "left", "right")


@pytest.mark.parametrize("name", MADE)
def test_results_are_no_worse_and_what_was_measured(
    name: str, squeezed: Callable[[str], Path], original: Any, tmp_path: Path
) -> None:
    """Opened by transformers, on every kind of part: nearer to the original, by what the summary says."""
    source, out = squeezed(name), tmp_path / "out"
    summary = run(source, out, steps=3, top_k=VOCABULARY, lr=2e-3)
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_before"] == pytest.approx(measured(source, original), rel=2e-3)
    assert summary["kl_after"] == pytest.approx(measured(out, original), rel=2e-3)
    assert summary["stopped"] is None
    assert {"out", "teacher", "steps", "best_step", "nbytes", "calibration", "seconds"} <= summary.keys()
    sizes = [{file.name: file.stat().st_size for file in folder.glob("*.safetensors")} for folder in (source, out)]
    assert sizes[0] == sizes[1]
    assert {file.name for file in out.iterdir()} == {file.name for file in source.iterdir()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    allowed = {n for n in before if n.rsplit(".")[-1] in CONTINUOUS_NAMES or "norm" in n}
    assert changed <= allowed, "codes, rows, outliers and embeddings are the same to the bit"
    assert bool(changed) == (summary["best_step"] > 0)
    record = json.loads((out / "llmsqueeze.json").read_text())["distillation"]
    assert [entry["kl_after"] for entry in record] == [summary["kl_after"]]
    assert record[0]["settings"]["steps"] == 3
    assert record[0]["teacher"] == "demo"


@pytest.mark.parametrize("name", ["rtn", "lorc"])
def test_enough_steps_make_it_better(name: str, squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    summary = run(squeezed(name), tmp_path / "out", steps=8, samples=16)
    assert summary["best_step"] > 0
    assert summary["kl_after"] < summary["kl_before"]
    again = run(tmp_path / "out", tmp_path / "again", steps=1, samples=16)
    assert again["kl_before"] == pytest.approx(summary["kl_after"], rel=1e-4), "it goes on from its own result"
    record = json.loads((tmp_path / "again" / "llmsqueeze.json").read_text())["distillation"]
    assert len(record) == 2


@pytest.mark.parametrize(
    ("train", "may"),
    [
        ("scales", ("scale", "zero", "alpha1", "alpha2")),
        ("norms", ("weight",)),
        ("scales,codes", (*CONTINUOUS_NAMES, "codes", "plane1", "plane2")),
    ],
)
def test_only_what_is_named_is_trained(
    train: str, may: tuple[str, ...], squeezed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a measurement that likes every step, so that the last one is kept."""
    liked = iter(range(100, 0, -1))
    monkeypatch.setattr(training, "held_back_divergence", lambda *_: float(next(liked)))
    for name in ("gwq", "dbllm"):
        summary = run(squeezed(name), tmp_path / name, steps=3, train=train)
        assert summary["best_step"] == 3
        before, after = tensors_of(squeezed(name)), tensors_of(tmp_path / name)
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert {n.rsplit(".")[-1] for n in changed} <= set(may)
        assert changed
        assert all("norm" in n for n in changed) == (train == "norms")
        assert any(n.endswith(("codes", "plane1")) for n in changed) == ("codes" in train)
        assert (summary["codes_moved"] > 0) == ("codes" in train)


@pytest.mark.parametrize("settings", [{}, {"train": "scales,norms,codes", "moves": 0.5}, {"blockwise": True}], ids=str)
def test_a_huge_learning_rate_ends_no_worse(
    settings: dict[str, Any], squeezed: Callable[[str], Path], original: Any, tmp_path: Path
) -> None:
    source, out = squeezed("dbllm"), tmp_path / "out"
    summary = run(source, out, steps=3, lr=1.0, top_k=VOCABULARY, **settings)
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_after"] == pytest.approx(measured(out, original), rel=2e-3)
    assert summary["best_step"] > 0 or same(source, out)


class Notes(Progress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("bad", [1, 4])
def test_a_loss_that_is_no_number_stops_it(
    bad: int, squeezed: Callable[[str], Path], original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def spoiled(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return distillation_loss(*arguments) * (math.nan if calls == bad else 1.0)

    monkeypatch.setattr(training, "distillation_loss", spoiled)
    notes = Notes()
    summary = run(squeezed("rtn"), tmp_path / "out", notes, steps=6, top_k=VOCABULARY)
    assert calls == bad, "no step after it"
    assert f"nan at step {bad}" in summary["stopped"]
    assert summary["stopped"] in notes.said
    assert summary["best_step"] < bad
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_after"] == pytest.approx(measured(tmp_path / "out", original), rel=2e-3)
    if bad == 1:
        assert same(squeezed("rtn"), tmp_path / "out")
    assert not (tmp_path / "out.distill").exists()


def test_a_measurement_that_is_no_number_is_never_the_best(
    squeezed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = training.held_back_divergence
    values = iter([False, True, True])

    def spoiled(*arguments: Any) -> float:
        return math.inf if next(values) else measure(*arguments)

    monkeypatch.setattr(training, "held_back_divergence", spoiled)
    summary = run(squeezed("rtn"), tmp_path / "out", steps=2)
    assert summary["best_step"] == 0
    assert math.isfinite(summary["kl_after"])
    assert same(squeezed("rtn"), tmp_path / "out")


def test_a_block_whose_loss_is_no_number_stops_there(
    squeezed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, steps = blockwise.mismatch, []

    def spoiled(walk: Any, index: int, *rest: Any) -> Tensor:
        loss = right(walk, index, *rest)
        if index == 1 and loss.requires_grad:
            steps.append(index)
            return loss * math.nan if len(steps) == 3 else loss
        return loss

    monkeypatch.setattr(blockwise, "mismatch", spoiled)
    summary = run(squeezed("rtn"), tmp_path / "out", steps=5, batch_size=1, blockwise=True)
    assert "block 1 became nan at step 3" in summary["stopped"]
    assert len(steps) == 3
    assert summary["kl_after"] <= summary["kl_before"]


# block by block


@pytest.mark.parametrize("name", ["rtn", "gwq"])
def test_blockwise_is_no_worse_and_what_was_measured(
    name: str, squeezed: Callable[[str], Path], original: Any, tmp_path: Path
) -> None:
    source, out = squeezed(name), tmp_path / "out"
    notes = Notes()
    summary = run(source, out, notes, steps=5, blockwise=True, top_k=VOCABULARY, lr=1e-3)
    assert summary["loss"] == "blockwise"
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_before"] == pytest.approx(measured(source, original), rel=2e-3)
    assert summary["kl_after"] == pytest.approx(measured(out, original), rel=2e-3)
    errors = [note.split(" text ")[1].split(" -> ") for note in notes.said if note.startswith("block ")]
    assert len(errors) == 4
    assert all(float(after) <= float(before) for before, after in errors)
    assert any(float(after) < float(before) for before, after in errors)
    if summary["best_step"] == 0:
        assert same(source, out)
        assert any("the same folder again" in note for note in notes.said)


def test_blocks_may_learn_from_their_own_inputs(squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["distill", squeezed("rtn"), "--blockwise", "--targets", "inputs", "--steps", 4, "--json", *OPTIONS]
    code, stdout, stderr = llmsqueeze_cli(*arguments, "--out", tmp_path / "out")
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert summary["kl_after"] <= summary["kl_before"]
    other = run(squeezed("rtn"), tmp_path / "other", steps=4, blockwise=True)
    assert summary["kl_before"] == pytest.approx(other["kl_before"], rel=1e-6)
    assert summary["kl_after"] != other["kl_after"], "it is another target"
    assert not (tmp_path / "out.distill").exists()


# runs that were killed


def killed_when(there: Callable[[], bool], arguments: Sequence[object]) -> None:
    """Runs the command in a process of its own, which is killed as soon as something is `there`."""
    command = [sys.executable, "-m", "llmsqueeze.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not there():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "it never came"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"


def test_a_killed_run_goes_on_to_the_same_end(squeezed: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """With codes, wishes, norms and both alphas in the state; and other settings do not go on with it."""
    out, work = tmp_path / "out", tmp_path / "out.distill"
    train = ["--train", "scales,norms,codes", "--loss", "dad", "--lr", 0.002, "--calibration", text_file]
    arguments = ["distill", squeezed("dbllm"), "--steps", 20, "--out", out, "--json", *OPTIONS, *train]
    arguments += ["--batch-size", 1]
    killed_when((work / "state.safetensors").exists, arguments)
    assert not out.exists()
    for other, said in (
        (["--lr", 0.01], "lr 0.002, not 0.01"),
        (["--train", "scales"], "train ['scales', 'norms', 'codes'], not ['scales']"),
    ):
        message = refused(*arguments, *other)
        assert said in message
        assert str(work.name) in message.replace(" ", "")
    assert (work / "state.safetensors").exists(), "and they leave it alone"
    code, stdout, stderr = llmsqueeze_cli(*arguments)
    assert code == 0, stderr
    assert not work.exists()
    whole = tmp_path / "whole"
    code, uninterrupted, _ = llmsqueeze_cli(*arguments, "--out", whole)
    assert code == 0
    assert same(out, whole)
    assert (out / "llmsqueeze.json").read_text() == (whole / "llmsqueeze.json").read_text()
    first, second = json.loads(stdout), json.loads(uninterrupted)
    for key in ("kl_before", "kl_after", "best_step", "steps", "codes_moved", "guarded"):
        assert first[key] == second[key], key
    assert second["codes_moved"] > 0


def test_a_killed_run_goes_on_behind_its_last_step_in_one_process(
    squeezed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two measurements, at a step that is known; no step before the last measurement is taken again."""
    taken, step = [], training.step

    def dies(student: Any, optimizer: Any, batch: Any, settings: Any, answered: Any, state: Any) -> float:
        taken.append(state.step)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(student, optimizer, batch, settings, answered, state)

    monkeypatch.setattr(training, "CHECKS", 5)
    monkeypatch.setattr(training, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(squeezed("gwq"), tmp_path / "out", steps=10)
    run(squeezed("gwq"), tmp_path / "out", steps=10)
    assert taken == [*range(8), *range(6, 10)], "measured and kept every second"
    monkeypatch.setattr(training, "step", step)
    run(squeezed("gwq"), tmp_path / "whole", steps=10)
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_killed_blockwise_run_goes_on_behind_its_last_block(
    squeezed: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.distill"
    arguments = ["distill", squeezed("rtn"), "--blockwise", "--steps", 30, "--out", out, "--json", *OPTIONS]
    arguments += ["--calibration", text_file]
    killed_when(lambda: any(work.glob("block-*.safetensors")), arguments)
    finished = len(list(work.glob("block-*.safetensors")))
    assert "steps 30, not 61" in refused(*arguments, "--steps", 61)
    trained, train = [], blockwise.train_block

    def watched(walk: Any, index: int, *rest: Any) -> dict[str, Tensor]:
        trained.append(index)
        made: dict[str, Tensor] = train(walk, index, *rest)
        return made

    monkeypatch.setattr(blockwise, "train_block", watched)
    code, stdout, stderr = llmsqueeze_cli(*arguments)
    assert code == 0, stderr
    assert trained == list(range(finished, 4))
    assert not work.exists()
    code, uninterrupted, _ = llmsqueeze_cli(*arguments, "--out", tmp_path / "whole")
    assert code == 0
    assert same(out, tmp_path / "whole")
    first, second = json.loads(stdout), json.loads(uninterrupted)
    assert {k: first[k] for k in ("kl_before", "kl_after", "steps", "best_step")} == {
        k: second[k] for k in ("kl_before", "kl_after", "steps", "best_step")
    }


def test_blocks_taken_up_are_counted(
    squeezed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed blockwise run had moved belongs to the summary of the one that goes on."""
    settings = {"steps": 1, "blockwise": True, "train": "scales,codes"}
    train = blockwise.train_block

    def dies(walk: Any, index: int, *rest: Any) -> dict[str, Tensor]:
        if index == 2:
            raise KeyboardInterrupt
        made: dict[str, Tensor] = train(walk, index, *rest)
        return made

    monkeypatch.setattr(blockwise, "train_block", dies)
    with pytest.raises(KeyboardInterrupt):
        run(squeezed("rtn"), tmp_path / "out", **settings)
    monkeypatch.setattr(blockwise, "train_block", train)
    first, second = (run(squeezed("rtn"), tmp_path / name, **settings) for name in ("out", "whole"))
    assert first["codes_moved"] == second["codes_moved"] > 0


def test_a_damaged_state_is_refused(squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.distill"
    arguments = ["distill", squeezed("rtn"), "--steps", 2, "--out", out, *OPTIONS]
    saved = training.resume
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "resume", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert llmsqueeze_cli(*arguments)[0] == 130
    assert training.resume is saved
    (work / "state.safetensors").write_bytes(b"cut sho")
    assert "state.safetensors is damaged" in refused(*arguments)
    (work / "state.safetensors").unlink()
    assert llmsqueeze_cli(*arguments)[0] == 0


# what is refused

BAD_OPTIONS = [
    (["--steps", 0], "steps is 0; it must be a whole number from 1"),
    (["--loss", "dda"], "unknown loss 'dda'; did you mean 'dad'?"),
    (["--loss", "nonsense"], "choose from kd, dad"),
    (["--train", "scale,norms"], "unknown train 'scale'; did you mean 'scales'?"),
    (["--train", ""], "train"),
    (["--lr", 2], "lr is 2.0; it must be a number from"),
    (["--lr", "nan"], "lr is nan"),
    (["--weight", 2], "weight goes with loss dad, not with kd"),
    (["--gamma", 2], "gamma goes with loss dad, not with kd"),
    (["--blockwise", "--loss", "dad"], "blockwise contradicts loss dad"),
    (["--targets", "inputs"], "targets inputs goes with blockwise"),
    (["--blockwise", "--targets", "outputs"], "did you mean 'inputs'?"),
    (["--moves", 0.1], "moves 0.1 goes with train codes"),
    (["--train", "codes", "--moves", 0.9], "moves is 0.9"),
    (["--top-k", 0], "top k is 0"),
    (["--held-back", 0], "held back is 0"),
    (["--batch-size", 0], "batch size is 0"),
    (["--samples", 0], "samples is 0"),
    (["--seq-len", 1], "seq len is 1"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--calibration", "nowhere.txt"], "no text file nowhere.txt"),
    (["--teacher", "./nowhere"], "there is no folder ./nowhere"),
    (["--step", 3], "No such option: --step"),
]


@pytest.mark.parametrize(
    ("options", "said"), BAD_OPTIONS, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else ""
)
def test_bad_options(options: list[object], said: str, squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    assert said in refused("distill", squeezed("rtn"), "--out", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_what_the_folder_has_nothing_of_cannot_be_trained(squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["distill", squeezed("rtn"), "--steps", 1, "--out", tmp_path / "out", *OPTIONS]
    assert "holds no low-rank parts" in refused(*arguments, "--train", "lowrank")
    assert not (tmp_path / "out").exists()


def test_a_refused_run_does_not_stand_in_the_way_of_the_next(squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["distill", squeezed("rtn"), "--steps", 1, "--out", tmp_path / "out", *OPTIONS]
    refused(*arguments, "--train", "lowrank")
    code, _, stderr = llmsqueeze_cli(*arguments, "--train", "scales")
    assert code == 0, stderr


def test_another_teacher_is_refused(
    squeezed: Callable[[str], Path], random_model: Callable[..., Path], demo_dir: Path, tmp_path: Path
) -> None:
    arguments = ["distill", squeezed("rtn"), "--out", tmp_path / "out", *OPTIONS, "--teacher"]
    message = refused(*arguments, random_model("llama-tied"))
    assert "has a vocabulary of 96 tokens" in message
    assert "one of 626" in message
    assert "was made from demo" in message
    other = Path(shutil.copytree(demo_dir, tmp_path / "other"))
    held = load_file(other / "model.safetensors")
    (name,) = (name for name in held if "embed_tokens" in name)
    held[name][17, 5] += 1.0
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    message = refused(*arguments, other)
    assert "is another model: its embeddings are not those" in message
    assert str(other.name) in message
    message = refused(*arguments, squeezed("dbllm"))
    assert "already quantized" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_teacher_of_another_shape_is_refused(squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig.from_pretrained(llmsqueeze.demo.MODEL_DIR)
    config.intermediate_size = 256
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    message = refused("distill", squeezed("rtn"), "--out", tmp_path / "out", "--teacher", tmp_path / "narrow", *OPTIONS)
    assert "is another model: it has no model.layers.0.mlp" in message


def test_folders_that_cannot_be_distilled(squeezed: Callable[[str], Path], demo_dir: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out", *OPTIONS]
    assert "was not compressed by llmsqueeze" in refused("distill", demo_dir, *out)
    assert "no folder" in refused("distill", tmp_path / "nowhere", *out)
    assert "no folder" in refused("distill", "demo", *out)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("distill", tmp_path / "empty", *out)
    for file in ("out", "out.distill"):
        assert not (tmp_path / file).exists()
    (tmp_path / "out").mkdir()
    assert "exists already; choose another --out" in refused("distill", squeezed("rtn"), *out)
    assert "was not written by llmsqueeze" not in refused("distill", squeezed("rtn"), *out)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "leaves it alone" in refused("distill", squeezed("rtn"), *out, "--overwrite")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_folder_that_does_not_say_what_it_was_made_from(squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(squeezed("rtn"), tmp_path / "folder"))
    arguments = ["distill", folder, "--steps", 1, "--out", tmp_path / "out", *OPTIONS]
    record = json.loads((folder / "llmsqueeze.json").read_text())
    (folder / "llmsqueeze.json").write_text(json.dumps(record | {"model": "somewhere-else"}))
    assert "local folder somewhere-else; say where it is with --teacher" in refused(*arguments)
    (folder / "llmsqueeze.json").unlink()
    assert "name it with --teacher" in refused(*arguments)
    assert llmsqueeze_cli(*arguments, "--teacher", "demo")[0] == 0


def test_too_little_text_is_refused(squeezed: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Tom has a red ball. " * 8)
    arguments = ["distill", squeezed("rtn"), "--out", tmp_path / "out", *OPTIONS, "--seq-len", 64]
    message = refused(*arguments, "--calibration", tmp_path / "short.txt", "--samples", 500)
    assert "too few to hold some back" in message
    assert not (tmp_path / "out").exists()


def test_a_replaced_folder_is_the_new_one(
    squeezed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onto itself: what is read must all be read before it is replaced."""
    liked = iter(range(100, 0, -1))
    monkeypatch.setattr(training, "held_back_divergence", lambda *_: float(next(liked)))
    folder = Path(shutil.copytree(squeezed("rtn"), tmp_path / "folder"))
    arguments = ["distill", folder, "--steps", 2, *OPTIONS, "--out"]
    assert llmsqueeze_cli(*arguments, tmp_path / "apart")[0] == 0
    code, _, stderr = llmsqueeze_cli(*arguments, folder, "--overwrite")
    assert code == 0, stderr
    assert same(folder, tmp_path / "apart")
    assert not same(folder, squeezed("rtn"))


def test_kept_answers_serve_the_next_run(
    squeezed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["distill", squeezed("rtn"), "--steps", 2, *OPTIONS, "--teacher-cache", tmp_path / "cache", "--out"]
    assert llmsqueeze_cli(*arguments, tmp_path / "first")[0] == 0
    assert len(list((tmp_path / "cache").iterdir())) == 9
    monkeypatch.setattr(teacher, "Walk", None)
    assert llmsqueeze_cli(*arguments, tmp_path / "second")[0] == 0
    assert same(tmp_path / "first", tmp_path / "second")


# with quantize


def test_quantize_distils_afterwards(tmp_path: Path, original: Any) -> None:
    out = tmp_path / "out"
    few = ["--samples", 4, "--seq-len", 32, "--device", "cpu"]
    arguments = ["quantize", "demo", "--method", "dbllm", "--quantizer", "rtn", "--distill-steps", 5, *few]
    arguments += ["--distill-loss", "dad"]
    code, stdout, stderr = llmsqueeze_cli(*arguments, "--out", out, "--json")
    assert code == 0, stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    summary = json.loads(stdout)
    assert summary["out"] == str(out)
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["method"] == "dbllm"
    record = json.loads((out / "llmsqueeze.json").read_text())
    assert record["model"] == "demo"
    assert record["recipe"]["distill_steps"] == 5
    (about,) = record["distillation"]
    assert about["settings"]["loss"] == "dad"
    assert about["settings"]["steps"] == 5
    assert about["teacher"] == "demo"
    assert about["kl_after"] == summary["kl_after"]
    assert str(tmp_path) not in json.dumps(record), "no paths"
    assert summary["nbytes"] == sum(t.nbytes for t in tensors_of(out).values())


def test_a_bound_on_quality_is_not_distilled() -> None:
    with pytest.raises(RecipeError, match="distill steps 5 contradict a bound on quality"):
        make_recipe({"method": "auto", "max_kl": 0.1, "distill_steps": 5})
