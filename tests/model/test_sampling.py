"""Calibration without a text: rows that the model draws itself, and when it has to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from llmsqueeze.cli.app import app
from llmsqueeze.compress.job import prepare
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.errors import CalibrationError, HubError
from llmsqueeze.formats import load
from llmsqueeze.model import sampling
from llmsqueeze.model.calibration import text_or_self
from llmsqueeze.model.original import Source
from llmsqueeze.model.sampling import continued, first_tokens, sample_rows
from llmsqueeze.model.text import Calibration, Text, hashed, load_tokenizer
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.bundled import make_recipe

CPU = torch.device("cpu")
VOCABULARY = 626


def llmsqueeze(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command, run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


class Notes(Progress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Tokens:
    """As much of a tokenizer as first tokens ask for."""

    def __init__(self, size: int, special: list[int], bos: int | None) -> None:
        self.size, self.all_special_ids, self.bos_token_id = size, special, bos

    def __len__(self) -> int:
        return self.size


@pytest.fixture(scope="module")
def model() -> Any:
    return load.load("demo", dtype=torch.float32)


def drawn(folder: Path, count: int = 5, length: int = 12, seed: int = 0) -> list[Tensor]:
    return sample_rows(folder, load_tokenizer(folder), count, length, seed, CPU, False, Progress())


def text_of(model: str, progress: Progress | None = None, held_back: int = 0, **settings: Any) -> Calibration:
    """The calibration that a run on `model` reads."""
    recipe = make_recipe({"method": "gptq", "samples": 4, "seq_len": 16, **settings})
    job = prepare(Source(model), recipe, progress or Progress(), text=True, held_back=held_back)
    assert job.calibration is not None
    return job.calibration


@pytest.mark.parametrize(("count", "length"), [(1, 2), (5, 12), (16, 3), (17, 7), (33, 2)])
def test_rows_have_the_shape_that_was_asked_for(count: int, length: int) -> None:
    rows = drawn(MODEL_DIR, count, length)
    tokenizer = load_tokenizer(MODEL_DIR)
    assert [tuple(row.shape) for row in rows] == [(1, length)] * count
    assert all(row.dtype == torch.int64 for row in rows)
    together = torch.cat(rows)
    assert (together[:, 0] == tokenizer.bos_token_id).all()
    assert together.min() >= 0
    assert together.max() < VOCABULARY
    assert not set(together[:, 1].tolist()) & set(tokenizer.all_special_ids)


def test_the_seed_says_which() -> None:
    first, again, other = drawn(MODEL_DIR, 20), drawn(MODEL_DIR, 20), drawn(MODEL_DIR, 20, seed=1)
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert len({tuple(row[0].tolist()) for row in first}) == 20, "no row twice, across batches neither"


def test_a_real_models_rows(shared: Path) -> None:
    folder = shared / "models" / "babyllama-361"
    rows, tokenizer = drawn(folder, 3, 10), load_tokenizer(folder)
    rows_of_model = load.load(str(folder)).get_input_embeddings().weight.shape[0]
    for row in rows:
        assert row.shape == (1, 10)
        assert (int(row[0, 0]) == tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
        assert 0 <= int(row.min()) <= int(row.max()) < rows_of_model


@pytest.mark.parametrize("length", [3, 24])
def test_the_cache_changes_nothing(length: int, model: Any) -> None:
    """Against the whole forward pass for every token, with the same generator; rows in one batch."""
    tokenizer = load_tokenizer(MODEL_DIR)
    first = first_tokens(model, tokenizer, 4, torch.Generator().manual_seed(3))
    found = continued(model, first, length, torch.Generator().manual_seed(7))
    generator, made = torch.Generator().manual_seed(7), first
    while made.shape[1] < length:
        with torch.no_grad():
            p = torch.stack([model(row[None], use_cache=False).logits[0, -1].softmax(-1) for row in made])
        made = torch.cat([made, torch.multinomial(p, 1, generator=generator)], dim=1)
    assert torch.equal(found, made)
    assert torch.equal(found[:, :2], first)


def test_what_is_drawn_is_the_models_distribution(model: Any) -> None:
    """At temperature 1: frequencies of the token behind one beginning, against its probabilities."""
    begin = torch.tensor([[1, 40]])
    with torch.no_grad():
        p = model(begin).logits[0, -1].softmax(-1)
    rows = continued(model, begin.expand(4000, 2), 3, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows[:, 2], minlength=VOCABULARY).float() / 4000
    assert (counts - p).abs().max() < 0.04
    assert (counts > 0).sum() > 1
    assert (counts[p < 1e-7] == 0).all()


@pytest.mark.parametrize("bos", [None, 1])
def test_first_tokens_are_ordinary_ones_of_the_vocabulary(bos: int | None, model: Any) -> None:
    """All of them come, specials never, nor what only the tokenizer or only the model has."""
    special = [0, 1, 2, 9, 299]
    for size, limit in ((300, 300), (5000, VOCABULARY)):
        tokens: Any = Tokens(size, special, bos)
        first = first_tokens(model, tokens, 20_000, torch.Generator().manual_seed(0))
        assert first.shape == (20_000, 1 if bos is None else 2)
        assert set(first[:, -1].tolist()) == set(range(limit)) - set(special)
        if bos is not None:
            assert (first[:, 0] == bos).all()


def test_a_text_goes_on_where_one_ends(model: Any) -> None:
    """Rows are full, whatever the model draws: its end of text is a token as any other."""
    calls = []

    class Ends:
        """Draws nothing but the end of text."""

        def __call__(self, input_ids: Tensor, past_key_values: object, use_cache: bool) -> Any:
            calls.append(input_ids.shape[1])
            logits = torch.full((*input_ids.shape, 7), -100.0)
            logits[..., 2] = 100.0
            return type("Output", (), {"logits": logits, "past_key_values": "kept"})()

    rows = continued(Ends(), torch.tensor([[1, 5], [1, 6]]), 6, torch.Generator().manual_seed(0))
    assert rows.tolist() == [[1, 5, 2, 2, 2, 2], [1, 6, 2, 2, 2, 2]]
    assert calls == [2, 1, 1, 1]


def test_self_is_hashed_and_repeats() -> None:
    first, again, other = (text_of("demo", calibration="self", seed=seed) for seed in (0, 0, 5))
    assert first.source == sampling.SOURCE
    assert first.sha256 == again.sha256 != other.sha256
    assert [row.tolist() for row in first.rows] == [row.tolist() for row in again.rows]
    assert first.as_dict()["samples"] == 4
    assert first.as_dict()["seq_len"] == 16
    expected = hashed("x", drawn(MODEL_DIR, 4, 16), 4, []).sha256
    assert first.sha256 == expected


def test_rows_are_held_back_beside_the_others() -> None:
    text = text_of("demo", calibration="self", held_back=3)
    assert len(text.rows) == 4
    assert len(text.held_back) == 3
    kinds = {tuple(row[0].tolist()) for row in [*text.rows, *text.held_back]}
    assert len(kinds) == 7
    whole = drawn(MODEL_DIR, 7, 16)
    assert torch.equal(torch.cat(whole), torch.cat([*text.rows, *text.held_back]))


def test_rows_are_no_longer_than_the_context() -> None:
    assert text_of("demo", calibration="self", samples=1, seq_len=2048).seq_len == 256


# when nothing else can be had


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The demo under another name, which has no text of its own."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "copy"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that cannot be reached, and what it was asked for."""
    asked: list[str] = []

    def read(name: str, config: str | None, split: str) -> str:
        asked.append(name)
        raise HubError(f"the data set {name} cannot be had from the Hub (ConnectionError); name a local text file")

    monkeypatch.setattr("llmsqueeze.model.text._read_hub", read)
    return asked


def test_without_the_hub_it_falls_back_and_says_so(copy: Path, no_hub: list[str]) -> None:
    notes = Notes()
    text = text_of(str(copy), notes)
    assert no_hub == ["Salesforce/wikitext"]
    assert text.source == sampling.SOURCE
    (note,) = notes.said
    assert "cannot be had from the Hub" in note
    assert "text sampled from the model itself" in note
    assert "--calibration" in note
    assert text.sha256 == text_of("demo", calibration="self").sha256, "the same model, the same rows"


def test_what_is_named_and_cannot_be_had_is_an_error(copy: Path, no_hub: list[str]) -> None:
    notes = Notes()
    with pytest.raises(HubError, match="owner/set cannot be had"):
        text_of(str(copy), notes, calibration="owner/set")
    assert notes.said == []
    assert no_hub == ["owner/set"]


@pytest.mark.parametrize("source", [None, "owner/set"])
def test_other_errors_are_none_of_the_hubs(source: str | None, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is there but unusable is the user's to know of."""

    def read(name: str, config: str | None, split: str) -> str:
        raise CalibrationError(f"the data set {name} has no 'text' column")

    monkeypatch.setattr("llmsqueeze.model.text._read_hub", read)
    with pytest.raises(CalibrationError, match="no 'text' column"):
        text_of(str(copy), calibration=source)


def test_the_hubs_text_is_taken_where_it_can_be_had(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsqueeze.model.text._read_hub", lambda name, config, split: "Tom has a red ball. " * 50)
    notes = Notes()
    found = text_or_self(str(copy), None, notes)
    assert found == Text("Salesforce/wikitext wikitext-2-raw-v1 train", "Tom has a red ball. " * 50)
    assert text_or_self(str(copy), "self", notes) is None
    assert notes.said == []


def test_a_method_without_text_draws_none(no_hub: list[str], copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "open_original", None)
    job = prepare(Source(str(copy)), make_recipe({"method": "rtn"}), Progress())
    assert job.calibration is None
    assert no_hub == []


# the command


def sidecar(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "llmsqueeze.json").read_text())
    return made


FEW = ["--samples", 3, "--seq-len", 16, "--device", "cpu", "--json"]


@pytest.fixture(scope="module")
def by_itself(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo, calibrated on its own text by the command, and the summary."""
    out = tmp_path_factory.mktemp("self") / "out"
    code, stdout, stderr = llmsqueeze(
        "quantize", "demo", "--method", "gptq", "--calibration", "self", "--out", out, *FEW
    )
    assert code == 0, stderr
    return out, json.loads(stdout)


def test_the_summary_and_the_sidecar_say_so(by_itself: tuple[Path, dict[str, Any]]) -> None:
    out, summary = by_itself
    about = sidecar(out)["calibration"]
    assert about == summary["calibration"]
    assert about["source"] == sampling.SOURCE
    assert (about["samples"], about["seq_len"], about["tokens"]) == (3, 16, 48)
    assert about["sha256"] == hashed("x", drawn(MODEL_DIR, 3, 16), 3, []).sha256
    assert sidecar(out)["recipe"]["calibration"] == "self"


def test_distillation_takes_it_as_well(by_itself: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    options = ["--steps", 2, "--held-back", 2, "--calibration", "self", *FEW]
    code, stdout, stderr = llmsqueeze("distill", by_itself[0], "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert summary["calibration"]["source"] == sampling.SOURCE
    assert summary["kl_after"] <= summary["kl_before"]
    (about,) = sidecar(tmp_path / "out")["distillation"]
    assert about["settings"]["calibration"] == sampling.SOURCE
    assert about["calibration_sha256"] == summary["calibration"]["sha256"]


def test_a_folder_named_self_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word is the model's own text, whatever lies about."""
    (tmp_path / "self").mkdir()
    monkeypatch.chdir(tmp_path)
    assert text_of("demo", calibration="self").source == sampling.SOURCE


def test_it_is_no_text_to_evaluate_on() -> None:
    code, _, stderr = llmsqueeze("eval", "demo", "--text", "self", "--limit", 1, "--device", "cpu")
    assert code == 2
    assert "self" in stderr
    assert "Traceback" not in stderr


@pytest.fixture
def offline(tmp_path: Path, copy: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`quantize` on the copy, in a process of its own, whose Hub refuses connections and whose cache is empty."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = clean | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmsqueeze.cli", "quantize", str(copy), "--method", "gptq"]
        rest = ["--out", str(tmp_path / "out"), *map(str, FEW), *map(str, arguments)]
        return subprocess.run([*command, *rest], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


def test_a_machine_without_network_compresses_all_the_same(
    offline: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = offline()
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "calibrating on text sampled from the model itself, which costs some quality" in said
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["calibration"]["source"] == sampling.SOURCE
    about = sidecar(tmp_path / "out")
    assert about["calibration"]["source"] == sampling.SOURCE
    assert about["calibration"]["sha256"] == hashed("x", drawn(MODEL_DIR, 3, 16), 3, []).sha256
    assert about["recipe"]["calibration"] is None
