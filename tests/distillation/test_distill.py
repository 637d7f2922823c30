"""The command `distill`: results that open, were measured and are never worse, go on when killed, or are refused."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child
from safetensors.torch import load_file, save_file
from support import TEXT, command, refused, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsqueeze
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.demo import stories as demo_stories
from llmsqueeze.distillation import blockwise, teacher, training
from llmsqueeze.distillation import distill as distillation
from llmsqueeze.distillation.distill import distill
from llmsqueeze.distillation.losses import distillation_loss
from llmsqueeze.distillation.settings import Distillation, make_distillation
from llmsqueeze.errors import OutputError, RecipeError
from llmsqueeze.model.calibration import Earlier, read_calibration, rows_of
from llmsqueeze.model.original import Source, open_original
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import TextSettings
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.rows import Draw, mixed_rows
from llmsqueeze.text.source import calibration_texts, read_text
from llmsqueeze.text.tokens import load_tokenizer

VOCABULARY = 626  # of the demo
SHORT = {"samples": 6, "held_back": 3, "batch_size": 2, "seq_len": 32, "calibration": "demo"}
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stories() -> str:
    """The beginning of the demo's text; to write and cut up all of it takes as long as a short distillation."""
    return read_text("demo", "train").content[:20_000]


@pytest.fixture(scope="module", autouse=True)
def short_text(stories: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo_stories, "calibration_text", lambda: stories)
        yield


# the command, on compressed models

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 2, "portable": False},
    "portable": {"method": "rtn", "bits": 2, "portable": True},
    "dbllm": {"method": "dbllm", "quantizer": "rtn"},
    "gwq": {"method": "gwq", "quantizer": "rtn", "bits": 2, **TEXT},
    "mixllm": {"method": "mixllm", "quantizer": "rtn", "low_bits": 2, "high_bits": 4, **TEXT},
    "lorc": {"method": "rtn", "bits": 2, "lorc_rank": 2, **TEXT},
}


@pytest.fixture(scope="module")
def tiny(demo_of: Callable[[int], Path]) -> Path:
    """The original."""
    return demo_of(1)


@pytest.fixture(scope="module")
def options(tiny: Path) -> list[object]:
    """The same as `SHORT`, on the command line."""
    short = ["--samples", 6, "--held-back", 3, "--batch-size", 2, "--seq-len", 32, "--device", "cpu"]
    return ["--teacher", tiny, "--calibration", "demo", *short]


@pytest.fixture(scope="module")
def squeezed(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(method, blocks) -> the original of so many blocks, compressed badly; made when it is asked for."""
    folder = tmp_path_factory.mktemp("squeezed")

    def make(name: str, blocks: int = 1) -> Path:
        out = folder / f"{name}-{blocks}"
        if not out.exists():
            quantize(str(demo_of(blocks)), make_recipe(METHODS[name]), out, verify=False)
        return out

    return make


@pytest.fixture(scope="module")
def original_of(demo_of: Callable[[int], Path]) -> Callable[[Path], Path]:
    """folder -> the original of as many blocks."""
    return lambda folder: demo_of(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


@pytest.fixture(scope="module")
def run(original_of: Callable[[Path], Path]) -> Run:
    """(folder, out, progress, settings ...) -> the summary of its distillation."""

    def distilled(source: Path, out: Path, progress: Progress | None = None, **settings: Any) -> dict[str, Any]:
        chosen = make_distillation({**SHORT, **settings})
        return distill(str(source), str(original_of(source)), chosen, out, device="cpu", progress=progress)

    return distilled


def same(first: Path, second: Path) -> bool:
    """Whether the weights of two folders are the same to the bit."""
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    return all(a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


@pytest.fixture(scope="module")
def measured(original_of: Callable[[Path], Path]) -> Callable[[Path], float]:
    """folder -> KL(original || folder) on the held-back rows, from whole distributions of the opened models."""

    @functools.cache
    def divergence(folder: Path) -> float:
        original = AutoModelForCausalLM.from_pretrained(original_of(folder), dtype=torch.float32).eval()
        texts = calibration_texts(None, "demo")
        tokenizer = load_tokenizer(original_of(folder))
        earlier = Earlier.of(json.loads((folder / "llmsqueeze.json").read_text()))
        seen = rows_of(earlier, texts, tokenizer) if earlier else ()
        of = SHORT["samples"], SHORT["seq_len"], 0, SHORT["held_back"]
        rows = mixed_rows(texts, tokenizer, Draw(*of, seen)).held_back
        assert len(rows) == 3
        opened = llmsqueeze.load(str(folder), dtype=torch.float32)
        per_token = []
        with torch.no_grad():
            for row in rows:
                p, q = (model(row).logits[0, :-1].double().log_softmax(1) for model in (original, opened))
                per_token.append((p.exp() * (p - q)).sum(1))
        return float(torch.cat(per_token).mean())

    return divergence


def test_it_learns_from_rows_that_the_rounding_has_not_seen(tiny: Path, squeezed: Callable[..., Path]) -> None:
    """Of the same text and seed, at other counts; a text that is used up gives the same rows again."""
    record = json.loads((squeezed("gwq") / "llmsqueeze.json").read_text())
    earlier, original = Earlier.of(record), open_original(Source(str(tiny)))
    assert earlier is not None
    assert earlier.draw.seed == 0
    settings = TextSettings("demo", 6, TEXT["seq_len"], 0)
    drawn = {count: read_calibration(original, settings, Progress(), 3, earlier=count) for count in (earlier, None)}
    first = read_calibration(original, replace(settings, samples=earlier.draw.samples), Progress())
    assert first.sha256 == earlier.sha256
    old, new = ({tuple(row[0].tolist()) for row in one.rows + one.held_back} for one in (first, drawn[earlier]))
    assert len(new) == 9
    assert not old & new
    assert old & {tuple(row[0].tolist()) for row in drawn[None].rows}, "without the record they would be among them"
    other = replace(earlier, sha256="of another text")
    assert read_calibration(original, settings, Progress(), 3, earlier=other).sha256 == drawn[None].sha256


@pytest.mark.parametrize("record", [{}, {"calibration": None}, {"calibration": {"samples": 3}, "recipe": {"seed": 0}}])
def test_a_record_that_tells_of_no_text(record: dict[str, Any]) -> None:
    assert Earlier.of(record) is None


CONTINUOUS_NAMES = ("scale", "weight_scale", "zero", "alpha1", "alpha2", "left", "right")


@pytest.mark.parametrize("name", METHODS)
def test_results_are_no_worse_and_as_measured(
    run: Run, name: str, squeezed: Callable[..., Path], measured: Callable[[Path], float], tmp_path: Path
) -> None:
    """Opened by transformers, on every kind of part: nearer to the original, by the amount in the summary."""
    source, out = squeezed(name), tmp_path / "out"
    summary = run(source, out, steps=3, top_k=VOCABULARY, lr=2e-3)
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_before"] == pytest.approx(measured(source), rel=2e-3)
    assert summary["kl_after"] == pytest.approx(measured(out), rel=2e-3)
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
    assert record[0]["teacher"] == "demo-1"


@pytest.mark.parametrize("name", ["portable", "lorc"])
def test_enough_steps_make_it_better(run: Run, name: str, squeezed: Callable[..., Path], tmp_path: Path) -> None:
    summary = run(squeezed(name), tmp_path / "out", steps=8, samples=16)
    assert summary["best_step"] > 0
    assert summary["kl_after"] < summary["kl_before"]
    again = run(tmp_path / "out", tmp_path / "again", steps=1, samples=16)
    assert again["kl_before"] == pytest.approx(summary["kl_after"], rel=1e-4), "it goes on from its own result"
    record = json.loads((tmp_path / "again" / "llmsqueeze.json").read_text())["distillation"]
    assert len(record) == 2


@pytest.mark.parametrize(
    ("train", "folders", "may"),
    [
        ("scales", ("gwq", "dbllm", "portable"), ("scale", "weight_scale", "zero", "alpha1", "alpha2")),
        ("norms", ("portable",), ("weight",)),
        (
            "scales,codes",
            ("gwq", "dbllm", "portable"),
            (*CONTINUOUS_NAMES, "codes", "weight_packed", "plane1", "plane2"),
        ),
    ],
)
def test_only_what_is_named_is_trained(
    run: Run,
    train: str,
    folders: tuple[str, ...],
    may: tuple[str, ...],
    squeezed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a measurement that likes every step, so that the last one is kept."""
    liked = iter(range(100, 0, -1))
    monkeypatch.setattr(training, "held_back_kl", lambda *_: float(next(liked)))
    for name in folders:
        summary = run(squeezed(name), tmp_path / name, steps=3, train=train)
        assert summary["best_step"] == 3
        before, after = tensors_of(squeezed(name)), tensors_of(tmp_path / name)
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert {n.rsplit(".")[-1] for n in changed} <= set(may)
        assert changed
        assert all("norm" in n for n in changed) == (train == "norms")
        assert any(n.endswith(("codes", "weight_packed", "plane1")) for n in changed) == ("codes" in train)
        assert (summary["codes_moved"] > 0) == ("codes" in train)


@pytest.mark.parametrize("settings", [{}, {"train": "scales,norms,codes", "moves": 0.5}, {"blockwise": True}], ids=str)
def test_a_huge_learning_rate_ends_no_worse(
    run: Run,
    settings: dict[str, Any],
    squeezed: Callable[..., Path],
    measured: Callable[[Path], float],
    tmp_path: Path,
) -> None:
    source, out = squeezed("dbllm"), tmp_path / "out"
    summary = run(source, out, steps=3, lr=1.0, top_k=VOCABULARY, **settings)
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_after"] == pytest.approx(measured(out), rel=2e-3)
    assert summary["best_step"] > 0 or same(source, out)


class Notes(Progress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("bad", [1, 4])
def test_a_loss_that_is_no_number_stops_it(
    run: Run,
    bad: int,
    squeezed: Callable[..., Path],
    measured: Callable[[Path], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    assert summary["stopped"] in notes.texts
    assert summary["best_step"] < bad
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_after"] == pytest.approx(measured(tmp_path / "out"), rel=2e-3)
    if bad == 1:
        assert same(squeezed("rtn"), tmp_path / "out")
    assert not (tmp_path / "out.distill").exists()


def test_a_measurement_that_is_no_number_is_never_the_best(
    run: Run, squeezed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = training.held_back_kl
    values = iter([False, True, True])

    def spoiled(*arguments: Any) -> float:
        return math.inf if next(values) else measure(*arguments)

    monkeypatch.setattr(training, "held_back_kl", spoiled)
    summary = run(squeezed("rtn"), tmp_path / "out", steps=2)
    assert summary["best_step"] == 0
    assert math.isfinite(summary["kl_after"])
    assert same(squeezed("rtn"), tmp_path / "out")


def test_a_block_whose_loss_is_no_number_stops_there(
    run: Run, squeezed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, steps = blockwise.block_loss, []

    def spoiled(walk: Any, index: int, *rest: Any) -> Tensor:
        loss = right(walk, index, *rest)
        if index == 1 and loss.requires_grad:
            steps.append(index)
            return loss * math.nan if len(steps) == 3 else loss
        return loss

    monkeypatch.setattr(blockwise, "block_loss", spoiled)
    summary = run(squeezed("rtn", 2), tmp_path / "out", steps=5, batch_size=1, blockwise=True)
    assert "block 1 became nan at step 3" in summary["stopped"]
    assert len(steps) == 3
    assert summary["kl_after"] <= summary["kl_before"]


# block by block


@pytest.mark.parametrize("name", ["portable", "gwq"])
def test_blockwise_is_no_worse_and_as_measured(
    run: Run, name: str, squeezed: Callable[..., Path], measured: Callable[[Path], float], tmp_path: Path
) -> None:
    source, out = squeezed(name, 2), tmp_path / "out"
    notes = Notes()
    summary = run(source, out, notes, steps=5, blockwise=True, top_k=VOCABULARY, lr=1e-3)
    assert summary["loss"] == "blockwise"
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["kl_before"] == pytest.approx(measured(source), rel=2e-3)
    assert summary["kl_after"] == pytest.approx(measured(out), rel=2e-3)
    errors = [note.split(" text ")[1].split(" -> ") for note in notes.texts if note.startswith("block ")]
    assert len(errors) == 2
    assert all(float(after) <= float(before) for before, after in errors)
    assert any(float(after) < float(before) for before, after in errors)
    if summary["best_step"] == 0:
        assert same(source, out)
        assert any("the same folder again" in note for note in notes.texts)


def test_blocks_may_learn_from_their_own_inputs(
    run: Run, options: list[object], demo_of: Callable[[int], Path], squeezed: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ["distill", squeezed("rtn", 2), "--blockwise", "--targets", "inputs", "--steps", 2, "--json", *options]
    code, stdout, stderr = command(*arguments, "--teacher", demo_of(2), "--out", tmp_path / "out")
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert summary["kl_after"] <= summary["kl_before"]
    other = run(squeezed("rtn", 2), tmp_path / "other", steps=2, blockwise=True)
    assert summary["kl_before"] == pytest.approx(other["kl_before"], rel=1e-6)
    assert summary["kl_after"] != other["kl_after"], "it is another target"
    assert not (tmp_path / "out.distill").exists()


# runs that were killed


@contextmanager
def killed(module: Any, function: str, after: int, work: Path) -> Iterator[None]:
    """A run in it dies where it calls a function once more than `after` times. Its folder stays as it is then: nothing
    is cleared away, as if the process had been killed."""
    right, calls, left = getattr(module, function), itertools.count(), work.with_name("left")

    def dies(*arguments: Any) -> Any:
        if next(calls) < after:
            return right(*arguments)
        shutil.copytree(work, left)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, function, dies)
        with pytest.raises(KeyboardInterrupt):
            yield
    shutil.rmtree(work, ignore_errors=True)
    left.rename(work)


def dying(folders: tuple[str, str], settings: dict[str, Any], out: Path) -> None:
    """Distils in a process that kills itself, as the kernel does, where it would take its fourth step."""
    steps, step = itertools.count(), training.optimizer_step

    def dies(*given: Any) -> float:
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*given)

    training.optimizer_step = dies
    distill(*folders, make_distillation(settings), out, device="cpu")


SAME_AT_THE_END = ("kl_before", "kl_after", "best_step", "steps", "codes_moved", "guarded")


def test_a_killed_run_goes_on_to_the_same_end(
    run: Run,
    squeezed: Callable[..., Path],
    original_of: Callable[[Path], Path],
    stories: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With codes, wishes, norms and both alphas in the state; behind its last measurement, not at the step that it had
    come to; and other settings do not go on with it."""
    out, work = tmp_path / "out", tmp_path / "out.distill"
    (tmp_path / "text.txt").write_text(stories)
    settings = {"steps": 6, "train": "scales,norms,codes", "loss": "dad", "lr": 0.002, "batch_size": 1}
    settings |= {"calibration": str(tmp_path / "text.txt"), "held_back": 2}  # measured at every other step
    settings["products"] = "float32"
    folders = str(squeezed("dbllm")), str(original_of(squeezed("dbllm")))
    child = Child(tmp_path, dying, folders, SHORT | settings, out)
    assert child.ended() == (-signal.SIGKILL, "")
    assert not out.exists()
    for other, difference in (
        ({"lr": 0.01}, "lr 0.002, not 0.01"),
        ({"train": "scales"}, "train ['scales', 'norms', 'codes'], not ['scales']"),
    ):
        with pytest.raises(OutputError, match=rf"{work.name} belongs .*{re.escape(difference)}"):
            run(squeezed("dbllm"), out, **{**settings, **other})
    assert (work / "state.safetensors").exists(), "and they leave it alone"
    taken, step = [], training.optimizer_step

    def watched(student: Any, optimizer: Any, batch: Any, settings: Any, answers: Any, state: Any) -> float:
        taken.append(state.step)
        return step(student, optimizer, batch, settings, answers, state)

    monkeypatch.setattr(training, "optimizer_step", watched)
    first = run(squeezed("dbllm"), out, **settings)
    assert taken == [2, 3, 4, 5], "measured and kept every second"
    assert not work.exists()
    second = run(squeezed("dbllm"), tmp_path / "whole", **settings)
    assert taken[4:] == [0, 1, 2, 3, 4, 5]
    assert same(out, tmp_path / "whole")
    assert (out / "llmsqueeze.json").read_text() == (tmp_path / "whole" / "llmsqueeze.json").read_text()
    assert [first[key] for key in SAME_AT_THE_END] == [second[key] for key in SAME_AT_THE_END]
    assert second["codes_moved"] > 0


def test_a_killed_run_goes_on_in_the_dtype_that_it_had_chosen(
    run: Run, squeezed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is busy now may choose another."""
    out, work = tmp_path / "out", tmp_path / "out.distill"
    settings = {"steps": 2, "batch_size": 3}
    monkeypatch.setattr(distillation, "fastest_dtype", lambda _device: torch.bfloat16)
    with killed(training, "optimizer_step", 1, work):
        run(squeezed("rtn"), out, **settings)
    monkeypatch.setattr(distillation, "fastest_dtype", lambda _device: torch.float32)
    run(squeezed("rtn"), out, **settings)
    (entry,) = json.loads((out / "llmsqueeze.json").read_text())["distillation"]
    assert entry["settings"]["products"] == "bfloat16"
    run(squeezed("rtn"), tmp_path / "new", **settings)
    (entry,) = json.loads((tmp_path / "new" / "llmsqueeze.json").read_text())["distillation"]
    assert entry["settings"]["products"] == "float32"


def test_a_killed_blockwise_run_goes_on_behind_its_last_block(
    run: Run, squeezed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes that it moved belong to the summary of the run that continues it."""
    out, work = tmp_path / "out", tmp_path / "out.distill"
    settings = {"steps": 2, "blockwise": True, "train": "scales,codes"}
    with killed(blockwise, "train_block", 1, work):
        run(squeezed("rtn", 2), out, **settings)
    with pytest.raises(OutputError, match="steps 2, not 61"):
        run(squeezed("rtn", 2), out, **{**settings, "steps": 61})
    trained, train = [], blockwise.train_block

    def watched(walk: Any, index: int, *rest: Any) -> Any:
        trained.append(index)
        return train(walk, index, *rest)

    monkeypatch.setattr(blockwise, "train_block", watched)
    first = run(squeezed("rtn", 2), out, **settings)
    assert trained == [1]
    assert not work.exists()
    second = run(squeezed("rtn", 2), tmp_path / "whole", **settings)
    assert trained == [1, 0, 1]
    assert same(out, tmp_path / "whole")
    assert [first[key] for key in SAME_AT_THE_END] == [second[key] for key in SAME_AT_THE_END]
    assert second["codes_moved"] > 0


def test_a_damaged_state_is_refused(options: list[object], squeezed: Callable[..., Path], tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.distill"
    arguments = ["distill", squeezed("rtn"), "--steps", 2, "--out", out, *options]
    saved = training.load_state
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "load_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*arguments)[0] == 130
    assert training.load_state is saved
    (work / "state.safetensors").write_bytes(b"cut sho")
    assert "state.safetensors is damaged" in refused(*arguments)
    (work / "state.safetensors").unlink()
    assert command(*arguments)[0] == 0


# what is refused

BAD_OPTIONS = [
    (["--steps", 0], "steps is 0; it must be a whole number from 1"),
    (["--loss", "dda"], "unknown --loss 'dda'; did you mean 'dad'?"),
    (["--loss", "nonsense"], "choose from kd, dad"),
    (["--train", "scale,norms"], "unknown --train 'scale'; did you mean 'scales'?"),
    (["--train", ""], "train"),
    (["--lr", 2], "lr is 2.0; it must be a number from"),
    (["--lr", "nan"], "lr is nan"),
    (["--weight", 2], "--weight 2 does not apply to --loss kd"),
    (["--gamma", 2], "--gamma 2 does not apply to --loss kd"),
    (["--blockwise", "--loss", "dad"], "--blockwise contradicts --loss dad"),
    (["--blockwise", "--products", "bfloat16"], "--products bfloat16 contradicts --blockwise"),
    (["--targets", "inputs"], "--targets inputs needs --blockwise"),
    (["--blockwise", "--targets", "outputs"], "did you mean 'inputs'?"),
    (["--moves", 0.1], "--moves 0.1 needs --train codes"),
    (["--train", "codes", "--moves", 0.9], "moves is 0.9"),
    (["--top-k", 0], "top-k is 0"),
    (["--held-back", 0], "held-back is 0"),
    (["--batch-size", 0], "batch-size is 0"),
    (["--samples", 0], "samples is 0"),
    (["--seq-len", 1], "seq-len is 1"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--calibration", "nowhere.txt"], "no text file nowhere.txt"),
    (["--teacher", "./nowhere"], "there is no folder ./nowhere"),
    (["--step", 3], "distill has no option --step; did you mean '--steps'?"),
]


@pytest.mark.parametrize(
    ("bad", "message"), BAD_OPTIONS, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else ""
)
def test_bad_options(
    bad: list[object], message: str, tiny: Path, squeezed: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ["distill", squeezed("rtn"), "--out", tmp_path / "out", "--teacher", tiny]
    assert message in refused(*arguments, *bad)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_nothing_to_train_is_refused_and_does_not_stand_in_the_way_of_the_next_run(
    squeezed: Callable[..., Path], options: list[object], tmp_path: Path
) -> None:
    arguments = ["distill", squeezed("rtn"), "--steps", 1, "--out", tmp_path / "out", *options]
    assert "holds no low-rank parts" in refused(*arguments, "--train", "lowrank")
    assert not (tmp_path / "out").exists()
    code, _, stderr = command(*arguments, "--train", "scales")
    assert code == 0, stderr


def test_another_teacher_is_refused(
    options: list[object],
    squeezed: Callable[..., Path],
    random_model: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
) -> None:
    arguments = ["distill", squeezed("rtn"), "--out", tmp_path / "out", *options, "--teacher"]
    message = refused(*arguments, random_model("llama-tied"))
    assert "has a vocabulary of 96 tokens" in message
    assert "one of 626" in message
    assert "was made from demo-1" in message
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    (name,) = (name for name in tensors if "embed_tokens" in name)
    tensors[name][17, 5] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    message = refused(*arguments, other)
    assert "is another model: its embeddings are not those" in message
    assert str(other.name) in message
    message = refused(*arguments, squeezed("dbllm"))
    assert "already quantized" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_teacher_of_another_shape_is_refused(
    options: list[object], squeezed: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(llmsqueeze.demo.MODEL_DIR)
    config.intermediate_size = 256
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    message = refused("distill", squeezed("rtn"), "--out", tmp_path / "out", *options, "--teacher", tmp_path / "narrow")
    assert "is another model: it has no model.layers.0.mlp" in message


def test_folders_that_cannot_be_distilled(
    options: list[object], squeezed: Callable[..., Path], demo_dir: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "out", *options]
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


def test_a_folder_that_does_not_name_its_original(
    tiny: Path, options: list[object], squeezed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(squeezed("rtn"), tmp_path / "folder"))
    arguments = ["distill", folder, "--steps", 1, "--out", tmp_path / "out", *options[2:]]
    record = json.loads((folder / "llmsqueeze.json").read_text())
    (folder / "llmsqueeze.json").write_text(json.dumps(record | {"model": "somewhere-else"}))
    assert "local folder somewhere-else; give its path with --teacher" in refused(*arguments)
    (folder / "llmsqueeze.json").unlink()
    assert "name it with --teacher" in refused(*arguments)
    assert command(*arguments, "--teacher", tiny)[0] == 0


def test_a_portable_folder_without_its_record_is_trained_all_the_same(
    run: Run, squeezed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(squeezed("portable"), tmp_path / "folder"))
    (folder / "llmsqueeze.json").unlink()
    without, with_record = (
        run(one, tmp_path / f"{one.name}-out", steps=3, train="scales") for one in (folder, squeezed("portable"))
    )
    assert without["kl_after"] == pytest.approx(with_record["kl_after"], rel=1e-6)


def test_too_little_text_is_refused(options: list[object], squeezed: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Tom has a red ball. " * 8)
    arguments = ["distill", squeezed("rtn"), "--out", tmp_path / "out", *options, "--seq-len", 64]
    message = refused(*arguments, "--calibration", tmp_path / "short.txt", "--samples", 500)
    assert "too few to hold some back" in message
    assert not (tmp_path / "out").exists()


def test_a_replaced_folder_is_the_new_one(
    options: list[object], squeezed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onto itself: what is read must all be read before it is replaced."""
    liked = iter(range(100, 0, -1))
    monkeypatch.setattr(training, "held_back_kl", lambda *_: float(next(liked)))
    folder = Path(shutil.copytree(squeezed("rtn"), tmp_path / "folder"))
    arguments = ["distill", folder, "--steps", 2, *options, "--out"]
    assert command(*arguments, tmp_path / "apart")[0] == 0
    code, _, stderr = command(*arguments, folder, "--overwrite")
    assert code == 0, stderr
    assert same(folder, tmp_path / "apart")
    assert not same(folder, squeezed("rtn"))


def test_kept_answers_serve_the_next_run(
    options: list[object], squeezed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["distill", squeezed("rtn"), "--steps", 2, *options, "--teacher-cache", tmp_path / "cache", "--out"]
    assert command(*arguments, tmp_path / "first")[0] == 0
    assert len(list((tmp_path / "cache").iterdir())) == 9
    monkeypatch.setattr(teacher, "Walk", None)
    assert command(*arguments, tmp_path / "second")[0] == 0
    assert same(tmp_path / "first", tmp_path / "second")


# with quantize


def test_quantize_distils_afterwards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "fastest_dtype", lambda _device: torch.bfloat16)
    out = tmp_path / "out"
    few = ["--calibration", "demo", "--samples", 4, "--seq-len", 32, "--device", "cpu"]
    arguments = ["quantize", tiny, "--method", "dbllm", "--quantizer", "rtn", "--distill-steps", 3, *few]
    arguments += ["--distill-loss", "dad", "--products", "float32"]
    code, stdout, stderr = command(*arguments, "--out", out, "--json")
    assert code == 0, stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    summary = json.loads(stdout)
    assert summary["out"] == str(out)
    assert summary["kl_after"] <= summary["kl_before"]
    assert summary["method"] == "dbllm"
    record = json.loads((out / "llmsqueeze.json").read_text())
    assert record["model"] == "demo-1"
    assert record["recipe"]["distill_steps"] == 3
    (about,) = record["distillation"]
    assert about["settings"]["loss"] == "dad"
    assert about["settings"]["steps"] == 3
    assert about["settings"]["products"] == "float32", "as it was asked for"
    assert about["teacher"] == "demo-1"
    assert about["kl_after"] == summary["kl_after"]
    assert str(tmp_path) not in json.dumps(record), "no paths"
    assert summary["nbytes"] == sum(t.nbytes for t in tensors_of(out).values())


@pytest.mark.parametrize(
    ("steps", "batch_size", "held_back", "every"),
    [(100, 4, 32, 10), (16, 4, 32, 8), (3, 1, 32, 3), (1000, 4, 32, 100), (1, 4, 1, 1), (7, 2, 7, 3)],
)
def test_measuring_reads_no_more_than_training(steps: int, batch_size: int, held_back: int, every: int) -> None:
    settings = Distillation(steps=steps, batch_size=batch_size, held_back=held_back)
    assert settings.every == every
    assert steps // every <= 10
    assert (steps // every) * held_back <= max(steps * batch_size, held_back)


def test_blocks_have_defaults_of_their_own() -> None:
    """In steps of four samples; what is asked for stays."""
    whole, blocks = make_distillation({}), make_distillation({"blockwise": True})
    assert (whole.steps, whole.batch_size, whole.lr) == (100, 1, 3e-3)
    assert (blocks.steps, blocks.batch_size, blocks.lr) == (200, 4, 5e-3)
    asked = make_distillation({"blockwise": True, "batch_size": 2, "lr": 1e-3})
    assert (asked.steps, asked.batch_size, asked.lr) == (200, 2, 1e-3)


def test_a_bound_on_quality_is_not_distilled() -> None:
    with pytest.raises(RecipeError, match="--distill-steps 5 contradicts a bound on quality"):
        make_recipe({"method": "budget", "max_kl": 0.1, "distill_steps": 5})
