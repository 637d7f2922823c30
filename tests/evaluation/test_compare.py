"""`compare` against slow twins: every number of it by hand, the frontier by brute force, mistakes as one line."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from support import command, tensors_of
from support import refused as refused_command
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmsqueeze import parts
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.demo.task import TASK_NAME
from llmsqueeze.evaluation import bnb
from llmsqueeze.evaluation import compare as comparing
from llmsqueeze.evaluation.compare import compare, mark_frontier
from llmsqueeze.evaluation.contenders import StoredModel, find_contenders
from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.evaluation.tasks import definitions
from llmsqueeze.evaluation.tasks.paired import mcnemar, paired_differences
from llmsqueeze.evaluation.tasks.run import find_tasks
from llmsqueeze.evaluation.tasks.scores import TaskScores
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.progress import Progress
from llmsqueeze.publish.plots.draw import draw_frontier
from llmsqueeze.publish.plots.figure import available
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.document import Text
from llmsqueeze.text.source import evaluation_text
from llmsqueeze.text.tokens import load_tokenizer

CPU = torch.device("cpu")
WINDOW = 48
DOCUMENTS = 12


@pytest.fixture(scope="module")
def words() -> str:
    """Some windows, the last of them a short one."""
    return evaluation_text("demo", "demo").content[:1100]


@pytest.fixture(scope="module")
def original_dir(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(2)


@pytest.fixture(scope="module")
def folders(
    original_dir: Path, compressed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Not to be changed: both formats, a dense one, one with a linear left alone."""
    root = tmp_path_factory.mktemp("folders")
    recipe = make_recipe({"method": "rtn", "bits": 4, "group_size": 64, "skip": ["down_proj"]})
    quantize(str(original_dir), recipe, root / "skipping", verify=False)
    export(str(compressed("native")), "dense", root / "dense")
    return {kind: compressed(kind) for kind in ("portable", "native")} | {
        name: root / name for name in ("skipping", "dense")
    }


@pytest.fixture(scope="module", autouse=True)
def short_index() -> Iterator[None]:
    """Without the thousands of task definitions that lm-eval reads for seconds."""
    index = TaskManager(include_defaults=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(definitions, "task_index", lambda *_: index)
        yield


@pytest.fixture(scope="module")
def compared(original_dir: Path, folders: dict[str, Path], words: str) -> dict[str, Any]:
    """Two folders and both of bitsandbytes beside the original, on some windows and some documents."""
    names = [str(folders["portable"]), str(folders["native"])]
    return compare(
        str(original_dir),
        names,
        bnb_types=["nf4", "int8"],
        text=Text("words", (words,)),
        tasks=[TASK_NAME],
        window=WINDOW,
        limit=DOCUMENTS,  # more than there are windows
        dtype="stored",
    )


def row(compared: dict[str, Any], kind: str) -> dict[str, Any]:
    (model,) = [model for model in compared["models"] if model["kind"] == kind]
    assert isinstance(model, dict)
    return model


def tensor_bytes(folder: Path) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in tensors_of(folder).items()}


# ----------------------------------------------------------------------------------------------------- the numbers


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], original_dir: Path) -> dict[str, Any]:
    """By transformers and by hand: the original, and the original with the sums of parts for its weights."""
    opened: dict[str, Any] = {"original": AutoModelForCausalLM.from_pretrained(original_dir).eval()}
    for name, kind in (("portable", "compressed-tensors"), ("native", "llmsqueeze")):
        model = AutoModelForCausalLM.from_pretrained(original_dir).eval()
        checkpoint = open_checkpoint(folders[name])
        for linear, entry in read_entries(checkpoint).items():
            dense = parts.sum_of_parts(read_parts(checkpoint, entry))
            model.get_submodule(linear).weight.data = dense.to(torch.bfloat16)
        opened[kind] = model
    return opened


def windows_of(words: str, folder: Path) -> list[list[int]]:
    """Token ids of each window, each from its BOS; the last has what is left."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    step = WINDOW - 1
    return [[tokenizer.bos_token_id, *ids[i : i + step]] for i in range(0, len(ids), step)]


def log_probabilities(model: Any, windows: list[list[int]]) -> list[Tensor]:
    """float64 [predicted tokens, vocabulary] of every window, all of a length in one batch as bf16 depends on it."""
    full = [window for window in windows if len(window) == WINDOW]
    with torch.no_grad():
        logits = [*model(torch.tensor(full)).logits, model(torch.tensor(windows[-1:])).logits[0]]
    return [one.double()[:-1].log_softmax(-1) for one in logits]


def test_scores_are_those_computed_by_hand(
    compared: dict[str, Any], models: dict[str, Any], words: str, original_dir: Path
) -> None:
    windows = windows_of(words, original_dir)
    assert 4 < len(windows) < DOCUMENTS
    assert len(windows[-1]) < WINDOW, "the tail is measured as well"
    log_p = {kind: log_probabilities(model, windows) for kind, model in models.items()}
    nll = {
        kind: [
            [-float(p[i, window[i + 1]]) for i in range(len(window) - 1)]
            for p, window in zip(values, windows, strict=False)
        ]
        for kind, values in log_p.items()
    }
    count = sum(len(window) - 1 for window in windows)
    assert compared["tokens"] == count
    assert compared["window"] == WINDOW
    for kind in models:
        measured = row(compared, kind)
        mean = sum(map(sum, nll[kind])) / count
        assert measured["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        differences = [
            [a - b for a, b in zip(*pair, strict=False)] for pair in zip(nll[kind], nll["original"], strict=False)
        ]
        difference = sum(map(sum, differences)) / count
        assert measured["nll_difference"] == pytest.approx(difference, abs=1e-4)
        # a ratio of sums over windows of several lengths
        spread = sum((sum(one) - difference * len(one)) ** 2 for one in differences)
        stderr = math.sqrt(spread * len(windows) / (len(windows) - 1)) / count
        assert measured["nll_difference_stderr"] == pytest.approx(stderr, rel=1e-3, abs=1e-9)
        kl, changed = [], 0
        for p, q in zip(log_p["original"], log_p[kind], strict=False):
            for i in range(len(p)):
                kl.append(float((p[i].exp() * (p[i] - q[i])).sum()))
                changed += int(p[i].argmax() != q[i].argmax())
        assert measured["kl_mean"] == pytest.approx(sum(kl) / count, rel=1e-3, abs=1e-9)
        assert measured["kl_p99"] == pytest.approx(sorted(kl)[math.ceil(0.99 * count) - 1], rel=1e-3, abs=1e-9)
        assert measured["top1_changed"] == pytest.approx(changed / count, abs=1.01 / count)  # a tie may fall either way
    assert row(compared, "llmsqueeze")["kl_mean"] > 0.02, "there is something to measure"
    assert 0.02 < row(compared, "llmsqueeze")["top1_changed"] < 0.98
    before = row(compared, "original")
    assert [before[key] for key in ("nll_difference", "kl_mean", "kl_p99", "top1_changed")] == [0.0] * 4


def stored(original: Path, folders: Iterable[Path]) -> list[StoredModel]:
    """The original and the folders, as `compare` finds them."""
    first, others = find_contenders(str(original), [str(folder) for folder in folders], [], CPU, False, "stored")
    return [first, *(one for one in others if isinstance(one, StoredModel))]


def recorded_bits(folder: Path) -> float:
    record: dict[str, float] = json.loads((folder / "llmsqueeze.json").read_text())
    return record["bits_per_weight"]


def test_bytes_and_bits_are_those_stored(folders: dict[str, Path], original_dir: Path) -> None:
    models = stored(original_dir, folders.values())
    assert [one.name for one in models] == [str(original_dir), *map(str, folders.values())]
    assert [one.kind for one in models] == [
        *("original", "compressed-tensors", "llmsqueeze"),
        *("compressed-tensors", "dense"),
    ]
    for one, folder in zip(models, [original_dir, *folders.values()], strict=True):
        assert one.nbytes == sum(tensor_bytes(folder).values())
        assert one.bits_per_weight == (16 if one.kind in ("original", "dense") else recorded_bits(folder))


def test_biases_are_bytes_but_no_bits_of_weights(random_model: Callable[..., Path], tmp_path: Path) -> None:
    original = random_model("llama-bias")
    quantize(str(original), make_recipe({"method": "rtn", "bits": 4, "group_size": 16}), tmp_path / "out")
    dense, compressed = stored(original, [tmp_path / "out"])
    assert dense.bits_per_weight == 32
    assert compressed.nbytes == sum(tensor_bytes(tmp_path / "out").values())
    assert compressed.bits_per_weight == recorded_bits(tmp_path / "out")


def test_bits_are_counted_whatever_the_original_calls_its_weights(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2 on the Hub names them without the model's prefix."""
    original = Path(shutil.copytree(random_model("gpt2"), tmp_path / "in"))
    tensors = load_file(original / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, original / "model.safetensors", {"format": "pt"})
    quantize(str(original), make_recipe({"method": "rtn", "bits": 4, "group_size": 16}), tmp_path / "out")
    before, after = stored(original, [tmp_path / "out"])
    assert before.bits_per_weight == 32
    assert after.bits_per_weight == recorded_bits(tmp_path / "out")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_is_counted_as_it_would_be_stored(
    kind: str, compared: dict[str, Any], original_dir: Path, tmp_path: Path
) -> None:
    """Against every tensor of the state dict, the tied head left out, and against the file of transformers.

    Before it computes: on a CPU the first forward pass rewrites the tensors beside the codes.
    """
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(original_dir, quantization_config=config)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    assert "lm_head.weight" in state, "tied: once more in the state dict than in a file"
    nbytes = sum(tensor.nbytes for name, tensor in state.items() if name != "lm_head.weight")
    linears = sum(tensor.nbytes for name, tensor in state.items() if "_proj." in name)
    model.save_pretrained(tmp_path / "out")
    assert sum(tensor_bytes(tmp_path / "out").values()) == nbytes
    sizes = bnb.stored_sizes(model)
    assert sizes == (nbytes, pytest.approx(8 * linears / 393_216, abs=1e-6))
    measured = row(compared, f"bitsandbytes {kind}")
    assert measured["model"] == f"{original_dir.name} ({kind})"
    assert (measured["nbytes"], measured["bits_per_weight"]) == sizes


def test_bitsandbytes_rows_are_measured_too(compared: dict[str, Any]) -> None:
    nf4, int8 = row(compared, "bitsandbytes nf4"), row(compared, "bitsandbytes int8")
    assert 0 < int8["kl_mean"] < nf4["kl_mean"] < row(compared, "llmsqueeze")["kl_mean"]
    assert (nf4["method"], nf4["bits"]) == ("bitsandbytes nf4", 4)
    assert nf4["nbytes"] < int8["nbytes"] < row(compared, "original")["nbytes"]
    assert 0 <= nf4["top1_changed"] < 0.5
    assert all(set(model) == set(compared["models"][0]) for model in compared["models"])


def test_what_bitsandbytes_cannot_open_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(bnb.hf, "load", fails)
    message = refused("compare", "demo", "--bnb", "nf4", "--limit", 1)
    assert "bitsandbytes cannot run demo (nf4) here: no kernel" in message
    assert "for this" not in message


# ---------------------------------------------------------------------------------------------------- the frontier


def swept(points: list[tuple[int, float] | None]) -> list[bool]:
    """Every point against every other, by what being beaten means."""
    unbeaten = []
    for mine in points:
        beaten = mine is None
        for other in points:
            if mine is None or other is None:
                continue
            smaller_or_equal, better_or_equal = other[0] <= mine[0], other[1] <= mine[1]
            if smaller_or_equal and better_or_equal and other != mine:
                beaten = True
        unbeaten.append(not beaten)
    return unbeaten


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.tuples(st.integers(1, 5), st.integers(-2, 3).map(float)), max_size=8))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, float] | None]) -> None:
    models = [
        {"nbytes": 1 if point is None else point[0], "nll_difference": point and point[1], "on_frontier": False}
        for point in points
    ]
    mark_frontier(models)
    assert [model["on_frontier"] for model in models] == swept(points)


def test_the_frontier_of_a_comparison(compared: dict[str, Any]) -> None:
    points = [(model["nbytes"], model["nll_difference"]) for model in compared["models"]]
    assert [model["on_frontier"] for model in compared["models"]] == swept(points)
    assert row(compared, "llmsqueeze")["on_frontier"], "nothing is smaller"


# ------------------------------------------------------------------------------------------------------- the tasks


def test_paired_differences_by_hand() -> None:
    """Over the documents that both answered; correlated answers have a smaller error than the two apart."""
    before = TaskScores(
        {"acc": 0.6, "acc_stderr": 0.2, "f1": 0.5, "only_before": 1.0},
        {"acc": {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0, 7: 0.0}, "f1": {0: 0.5}},
    )
    after = TaskScores(
        {"acc": 0.35, "acc_stderr": 0.2, "f1": 0.25, "only_after": 1.0},
        {"acc": {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0, 9: 1.0}, "f1": {0: 0.25}},
    )
    paired = paired_differences(after, before)
    differences = [0.0, 0.0, -1.0, 0.0]  # of documents 0 to 3
    flips = {"acc_right_to_wrong", "acc_wrong_to_right", "acc_mcnemar_p"}
    assert paired.keys() == {"acc_difference", "acc_difference_stderr", "f1_difference"} | flips, "one has no spread"
    assert [paired[key] for key in ("acc_right_to_wrong", "acc_wrong_to_right", "acc_mcnemar_p")] == [1, 0, 1]
    assert paired["acc_difference"] == pytest.approx(-0.25)
    assert paired["acc_difference_stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(4))
    assert paired["f1_difference"] == -0.25
    assert paired_differences(before, before)["acc_difference_stderr"] == 0
    unlike = TaskScores({"acc": 0.1}, after.documents)
    assert paired_differences(unlike, before).keys() == {"acc_difference", *flips}, "no mean over the documents"


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (0, 8), (9, 2), (5, 6)])
def test_mcnemars_test_by_counting_every_way(lost: int, won: int) -> None:
    """Of all ways in which the changed documents could have fallen, those at least as uneven, on either side."""
    ways = itertools.product((0, 1), repeat=lost + won)
    uneven = sum(abs(2 * sum(way) - lost - won) >= abs(lost - won) for way in ways)
    assert mcnemar(lost, won) == mcnemar(won, lost) == uneven / 2 ** (lost + won)


def test_mcnemars_test_of_many_documents() -> None:
    """Where floats overflow: against the normal distribution with continuity correction."""
    z = (abs(1350 - 1250) - 1) / math.sqrt(2600)
    assert mcnemar(1350, 1250) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(5000, 0) == 0
    assert mcnemar(20000, 20000) == 1


def answers(model: Any, folder: Path) -> list[float]:
    """Right (1) or wrong (0) by document."""
    opened = OpenModel("", model, load_tokenizer(folder), torch.bfloat16)
    right = find_tasks([TASK_NAME], limit=DOCUMENTS).run(opened, Progress())[TASK_NAME].documents["acc"]
    return [right[i] for i in range(DOCUMENTS)]


def test_task_differences_are_paired_by_document(
    compared: dict[str, Any], models: dict[str, Any], original_dir: Path
) -> None:
    right = {kind: answers(model, original_dir) for kind, model in models.items()}
    for kind in models:
        measured = row(compared, kind)["tasks"][TASK_NAME]
        differences = [a - b for a, b in zip(right[kind], right["original"], strict=False)]
        assert measured["acc"] == pytest.approx(statistics.mean(right[kind]))
        assert measured["acc_difference"] == pytest.approx(statistics.mean(differences))
        assert measured["acc_difference_stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(DOCUMENTS))
        assert measured["acc_right_to_wrong"] == differences.count(-1)
        assert measured["acc_wrong_to_right"] == differences.count(1)
        assert measured["acc_mcnemar_p"] == mcnemar(differences.count(-1), differences.count(1))
    assert row(compared, "original")["tasks"][TASK_NAME]["acc_difference"] == 0


# -------------------------------------------------------------------------------------------------------- the verb


def refused(*arguments: object) -> str:
    """The message of a call that is refused."""
    return refused_command(*arguments, "--quiet", "--device", "cpu")


@pytest.fixture(scope="module")
def text_file(words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(words)
    return file


@pytest.fixture
def copies(folders: dict[str, Path], original_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """Folders to write into, and one of nobody's."""
    copies = {name: Path(shutil.copytree(folders[name], tmp_path / name)) for name in ("portable", "dense")}
    return copies | {"foreign": Path(shutil.copytree(original_dir, tmp_path / "foreign"))}


def test_a_comparison_is_kept_in_our_folders(
    original_dir: Path, copies: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    arguments = ["compare", original_dir, *copies.values(), "--text", text_file, "--seq-len", WINDOW, "--device", "cpu"]
    code, out, err = command(*arguments, "--limit", 2, "--json", "--quiet")
    assert code == 0, err
    ours = [copies["portable"], copies["dense"]]
    assert json.loads(out)["kept_in"] == [str(folder) for folder in ours]
    assert json.loads((ours[0] / "comparison.json").read_text())["limit"] == 2
    assert json.loads((ours[0] / "evaluation.json").read_text()).keys() == {"limited"}

    code, out, err = command(*arguments, "--json", "--quiet", "--html", tmp_path / "page.html")
    assert code == 0, err
    result = json.loads(out)
    assert result["kept_in"] == [str(folder) for folder in ours]
    assert {path.parent for path in tmp_path.rglob("comparison.json")} == set(ours)
    assert {path.parent for path in tmp_path.rglob("frontier.png")} == (set(ours) if available() else set())
    for number, folder in enumerate(ours, 1):
        written = (folder / "comparison.json").read_text()
        assert str(tmp_path) not in written
        kept = json.loads(written)
        assert kept["text"] == "words.txt"
        assert kept["limit"] is None
        assert kept["tokens"] == result["tokens"] > 0
        assert [model["model"] for model in kept["models"]] == [
            original_dir.name,
            *(path.name for path in copies.values()),
        ]
        assert [model["this"] for model in kept["models"]] == [i == number for i in range(4)]
        for printed, model in zip(result["models"], kept["models"], strict=True):
            assert printed | {"model": model["model"], "this": model["this"]} == model
    page = (tmp_path / "page.html").read_text()
    assert page.startswith(("<!DOCTYPE html>", "<!doctype html>"))
    assert all(path.name in page for path in copies.values())
    assert str(tmp_path) not in page
    (dense, foreign) = (next(m for m in result["models"] if m["model"] == str(copies[n])) for n in ("dense", "foreign"))
    assert foreign["kind"] == dense["kind"] == "dense"
    assert foreign["kl_mean"] == 0
    assert command(*arguments, "--limit", 2, "--json", "--quiet")[0] == 0
    assert json.loads((ours[0] / "comparison.json").read_text())["limit"] is None, "a part replaces no whole"
    assert json.loads((ours[0] / "evaluation.json").read_text())["tokens"] == result["tokens"]


def test_a_page_that_cannot_be_made_costs_no_scores(
    original_dir: Path, copies: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("llmsqueeze.publish.page.comparison.write_page", fails)
    text = ("--text", text_file, "--limit", 1, "--seq-len", WINDOW, "--device", "cpu")
    code, out, err = command(
        "compare", original_dir, copies["portable"], *text, "--json", "--html", tmp_path / "p.html"
    )
    assert code == 0, err
    assert len(json.loads(out)["models"]) == 2
    assert "no page" in err
    assert "no space left" in " ".join(err.split())


def test_people_read_a_table(original_dir: Path, folders: dict[str, Path], text_file: Path) -> None:
    arguments = ["compare", original_dir, folders["portable"], "--text", text_file, "--limit", 2, "--seq-len", WINDOW]
    code, out, _ = command(*arguments, "--device", "cpu")
    assert code == 0
    assert "portable" in out
    assert "demo-2" in out
    assert "rtn, 4 bits:" in out, "how it was made, not only its format"
    assert "On the frontier, the smallest first: rtn, 4 bits: " in out
    assert max(map(len, out.splitlines())) <= 100


def test_nothing_is_drawn_without_losses(compared: dict[str, Any], tmp_path: Path) -> None:
    """Tasks alone say nothing of the text."""
    silent = [model | {"nll_difference": None} for model in compared["models"]]
    assert not draw_frontier(compared | {"models": silent}, tmp_path / "frontier.png")
    assert not draw_frontier(compared | {"models": compared["models"][:1]}, tmp_path / "frontier.png")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_mistakes_are_one_line(folders: dict[str, Path], tmp_path: Path, text_file: Path) -> None:
    given = folders["portable"]
    quick = ["--text", text_file, "--limit", 1]
    assert f"{given} is named twice" in refused("compare", "demo", given, given, *quick)
    assert "demo is named twice" in refused("compare", "demo", "demo", *quick)
    assert "nothing to compare the original with" in refused("compare", "demo", *quick)
    message = refused("compare", "demo", given.with_name("portabel"), *quick)
    assert "there is no folder" in message
    assert "did you mean 'portable'?" in message
    assert "unknown --bnb 'nf5'; did you mean 'nf4'?" in refused("compare", "demo", "--bnb", "nf5", *quick)
    message = refused("compare", "demo", given, "--tasks", "demo_story")
    assert "unknown task 'demo_story'; did you mean 'demo_stories'?" in message
    assert "--tasks is empty" in refused("compare", "demo", given, "--tasks", ",")
    assert "there is no text file" in refused("compare", "demo", given, "--text", tmp_path / "nowhere.txt")
    page = tmp_path / "nowhere" / "page.html"
    assert f"--html {page} cannot be written" in refused(
        "compare", "demo", given, *quick, "--seq-len", WINDOW, "--html", page
    )


def test_a_folder_of_another_model_is_refused(
    folders: dict[str, Path], random_model: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is opened."""

    def opened(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(comparing, "open_model", opened)
    other = random_model("llama")
    message = refused("compare", "demo", folders["native"], other, "--text", text_file)
    assert f"{other} has a vocabulary of 96 tokens and demo one of 626" in message


def test_a_damaged_folder_is_refused(folders: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folders["native"], tmp_path / "broken"))
    file = sorted(broken.glob("*.safetensors"))[1]
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith(".scale")))
    save_file(tensors, file, {"format": "pt"})
    assert "scale" in refused("compare", "demo", broken, "--text", text_file, "--limit", 1, "--seq-len", WINDOW)
