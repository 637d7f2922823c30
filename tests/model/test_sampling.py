"""Calibration without a text: rows that the model generates, and when it has to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import command
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmsqueeze.compress.job import open_job, with_text
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.errors import CalibrationError, HubError, UnsupportedError
from llmsqueeze.formats import load
from llmsqueeze.model import sampling
from llmsqueeze.model.calibration import texts_or_self
from llmsqueeze.model.original import Source
from llmsqueeze.model.sampling import continued, first_tokens, sample_rows
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import TextSettings
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.document import Text
from llmsqueeze.text.rows import Calibration, hashed
from llmsqueeze.text.source import evaluation_text
from llmsqueeze.text.tokens import load_tokenizer

CPU = torch.device("cpu")
VOCABULARY = 626


class Notes(Progress):
    """Keeps the messages to the user."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


class Tokens:
    """As much of a tokenizer as first tokens ask for."""

    def __init__(self, size: int, special: list[int], bos: int | None) -> None:
        self.size, self.all_special_ids, self.bos_token_id = size, special, bos

    def __len__(self) -> int:
        return self.size


@pytest.fixture(scope="module")
def small(demo_of: Callable[[int], Path]) -> str:
    """One block of the demo, under another name: a model without a text of its own."""
    return str(demo_of(1))


def drawn(folder: str | Path, count: int = 5, length: int = 12, seed: int = 0) -> list[Tensor]:
    return sample_rows(Path(folder), load_tokenizer(Path(folder)), count, length, seed, CPU, False, Progress())


def text_of(model: str, progress: Progress | None = None, held_back: int = 0, **settings: Any) -> Calibration:
    """The calibration that a run on `model` reads."""
    recipe = make_recipe({"method": "gptq", "samples": 4, "seq_len": 16, **settings})
    progress = progress or Progress()
    job = with_text(open_job(Source(model), recipe, progress, text=False), progress, held_back)
    assert job.calibration is not None
    return job.calibration


@pytest.mark.parametrize(("count", "length"), [(1, 2), (16, 3), (17, 7)])
def test_rows_have_the_requested_shape(count: int, length: int, small: str) -> None:
    rows = drawn(small, count, length)
    tokenizer = load_tokenizer(MODEL_DIR)
    assert [tuple(row.shape) for row in rows] == [(1, length)] * count
    assert all(row.dtype == torch.int64 for row in rows)
    together = torch.cat(rows)
    assert (together[:, 0] == tokenizer.bos_token_id).all()
    assert together.min() >= 0
    assert together.max() < VOCABULARY
    assert not set(together[:, 1].tolist()) & set(tokenizer.all_special_ids)


def test_the_rows_follow_the_seed(small: str) -> None:
    first, again, other = drawn(small, 20), drawn(small, 20), drawn(small, 20, seed=1)
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


def test_the_cache_changes_nothing(original: Any) -> None:
    """Against the whole forward pass for every token, with the same generator; rows in one batch."""
    tokenizer = load_tokenizer(MODEL_DIR)
    first = first_tokens(original, tokenizer, 4, torch.Generator().manual_seed(3))
    rows = continued(original, first, 12, torch.Generator().manual_seed(7))
    generator, slow = torch.Generator().manual_seed(7), first
    while slow.shape[1] < 12:
        with torch.no_grad():
            p = torch.stack([original(row[None], use_cache=False).logits[0, -1].softmax(-1) for row in slow])
        slow = torch.cat([slow, torch.multinomial(p, 1, generator=generator)], dim=1)
    assert torch.equal(rows, slow)
    assert torch.equal(rows[:, :2], first)


def test_tokens_follow_the_models_distribution(original: Any) -> None:
    """At temperature 1: frequencies of the token behind one beginning, against its probabilities."""
    begin = torch.tensor([[1, 40]])
    with torch.no_grad():
        p = original(begin).logits[0, -1].softmax(-1)
    rows = continued(original, begin.expand(2000, 2), 3, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows[:, 2], minlength=VOCABULARY).float() / 2000
    assert (counts - p).abs().max() < 0.05
    assert (counts > 0).sum() > 1
    assert (counts[p < 1e-7] == 0).all()


@pytest.mark.parametrize("bos", [None, 1])
def test_first_tokens_are_ordinary_ones_of_the_vocabulary(bos: int | None, original: Any) -> None:
    """All of them come, specials never, nor what only the tokenizer or only the model has."""
    special = [0, 1, 2, 9, 299]
    for size, limit in ((300, 300), (5000, VOCABULARY)):
        tokens: Any = Tokens(size, special, bos)
        first = first_tokens(original, tokens, 20_000, torch.Generator().manual_seed(0))
        assert first.shape == (20_000, 1 if bos is None else 2)
        assert set(first[:, -1].tolist()) == set(range(limit)) - set(special)
        if bos is not None:
            assert (first[:, 0] == bos).all()


def test_a_vocabulary_of_special_tokens_is_refused(original: Any) -> None:
    tokens: Any = Tokens(3, [0, 1, 2], None)
    with pytest.raises(UnsupportedError, match="are special ones"):
        first_tokens(original, tokens, 2, torch.Generator().manual_seed(0))


def test_an_end_of_text_does_not_end_a_row() -> None:
    calls = []

    class Ends:
        """Draws nothing but the end of text."""

        def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            calls.append(input_ids.shape[1])
            assert use_cache
            assert (past_key_values == "kept") == (len(calls) > 1)
            logits = torch.full((*input_ids.shape, 7), -100.0)
            logits[..., 2] = 100.0
            return CausalLMOutputWithPast(logits=logits, past_key_values="kept")

        __call__ = forward

    rows = continued(Ends(), torch.tensor([[1, 5], [1, 6]]), 6, torch.Generator().manual_seed(0))
    assert rows.tolist() == [[1, 5, 2, 2, 2, 2], [1, 6, 2, 2, 2, 2]]
    assert calls == [2, 1, 1, 1]


def test_self_is_hashed_and_repeats(small: str) -> None:
    first, again, other = (text_of(small, calibration="self", seed=seed) for seed in (0, 0, 5))
    assert first.source == sampling.SOURCE
    assert first.sha256 == again.sha256 != other.sha256
    assert [row.tolist() for row in first.rows] == [row.tolist() for row in again.rows]
    assert first.as_dict()["samples"] == 4
    assert first.as_dict()["seq_len"] == 16
    assert first.sha256 == hashed("x", drawn(small, 4, 16), []).sha256


def test_rows_are_held_back_beside_the_others(small: str) -> None:
    text = text_of(small, calibration="self", held_back=3)
    assert len(text.rows) == 4
    assert len(text.held_back) == 3
    kinds = {tuple(row[0].tolist()) for row in [*text.rows, *text.held_back]}
    assert len(kinds) == 7
    whole = drawn(small, 7, 16)
    assert torch.equal(torch.cat(whole), torch.cat([*text.rows, *text.held_back]))


def test_rows_are_not_longer_than_the_context(small: str, tmp_path: Path) -> None:
    config = json.loads((Path(small) / "config.json").read_text()) | {"max_position_embeddings": 24}
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps(config))
    assert text_of(str(copy), calibration="self", samples=1, seq_len=2048).seq_len == 24


# without a text


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that cannot be reached, and the names of the data sets in the requests to it."""
    asked: list[str] = []

    def read(name: str, *_: Any) -> Text:
        asked.append(name)
        raise HubError(f"the data set {name} cannot be read from the Hub (ConnectionError); name a local text file")

    monkeypatch.setattr("llmsqueeze.text.source.read_hub", read)
    return asked


def test_without_the_hub_it_falls_back_and_says_so(small: str, no_hub: list[str]) -> None:
    notes = Notes()
    text = text_of(small, notes)
    assert no_hub == ["Salesforce/wikitext"]
    assert text.source == sampling.SOURCE
    note = notes.texts[0]
    assert "cannot be read from the Hub" in note
    assert "the model generates the calibration text" in note
    assert "--calibration" in note
    assert text.sha256 == text_of(small, calibration="self").sha256, "the same model, the same rows"


def test_a_named_text_that_cannot_be_read_is_an_error(small: str, no_hub: list[str]) -> None:
    notes = Notes()
    with pytest.raises(HubError, match="owner/set cannot be read"):
        text_of(small, notes, calibration="owner/set")
    assert notes.texts == []
    assert no_hub == ["owner/set"]


@pytest.mark.parametrize("source", [None, "owner/set"])
def test_other_errors_do_not_fall_back(source: str | None, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user must know of a text that exists but cannot be used."""

    def read(name: str, *_: Any) -> Text:
        raise CalibrationError(f"the data set {name} has no 'text' column")

    monkeypatch.setattr("llmsqueeze.text.source.read_hub", read)
    with pytest.raises(CalibrationError, match="no 'text' column"):
        text_of(small, calibration=source)


def test_the_hubs_text_is_taken_if_it_can_be_read(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsqueeze.text.source.read_hub", lambda *_: Text("the text", ("Tom has a red ball. " * 50,)))
    notes = Notes()
    none, by_itself = (TextSettings(name, 3, 16, 0) for name in (None, "self"))
    assert texts_or_self(small, none, 1000, notes) == [Text("the text", ("Tom has a red ball. " * 50,))]
    assert texts_or_self(small, by_itself, 1000, notes) is None
    assert notes.texts == []


def test_a_method_without_text_generates_none(no_hub: list[str], small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "open_model", None)
    job = open_job(Source(small), make_recipe({"method": "rtn"}), Progress())
    assert job.calibration is None
    assert no_hub == []


# the command


def sidecar(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "llmsqueeze.json").read_text())
    return record


FEW = ["--samples", 3, "--seq-len", 16, "--device", "cpu", "--json"]


@pytest.fixture(scope="module")
def by_itself(small: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model, calibrated by the command on text that it generates, and the summary."""
    out = tmp_path_factory.mktemp("self") / "out"
    code, stdout, stderr = command("quantize", small, "--method", "gptq", "--calibration", "self", "--out", out, *FEW)
    assert code == 0, stderr
    return out, json.loads(stdout)


def test_the_summary_and_the_sidecar_name_the_source(by_itself: tuple[Path, dict[str, Any]], small: str) -> None:
    out, summary = by_itself
    about = sidecar(out)["calibration"]
    assert about == summary["calibration"]
    assert about["source"] == sampling.SOURCE
    assert (about["samples"], about["seq_len"], about["tokens"]) == (3, 16, 48)
    assert about["sha256"] == hashed("x", drawn(small, 3, 16), []).sha256
    assert sidecar(out)["recipe"]["calibration"] == "self"


def test_distillation_takes_it_as_well(by_itself: tuple[Path, dict[str, Any]], small: str, tmp_path: Path) -> None:
    options = ["--teacher", small, "--steps", 2, "--held-back", 2, "--calibration", "self", *FEW]
    code, stdout, stderr = command("distill", by_itself[0], "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert summary["calibration"]["source"] == sampling.SOURCE
    assert summary["kl_after"] <= summary["kl_before"]
    (about,) = sidecar(tmp_path / "out")["distillation"]
    assert about["settings"]["calibration"] == sampling.SOURCE
    assert about["calibration_sha256"] == summary["calibration"]["sha256"]


def test_a_folder_named_self_is_no_text(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    monkeypatch.chdir(tmp_path)
    assert text_of(small, calibration="self").source == sampling.SOURCE


def test_evaluation_has_no_text_named_self(no_hub: list[str]) -> None:
    with pytest.raises(HubError, match="the data set self cannot be read"):
        evaluation_text("self", "demo")
    assert no_hub == ["self"]


def test_without_a_network_the_command_succeeds(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub refuses connections, and the cache of data sets is empty."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the command sets it; it is put back afterwards
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "hf")
    code, stdout, stderr = command("quantize", small, "--method", "gptq", "--out", tmp_path / "out", *FEW)
    assert code == 0, stderr
    message = " ".join(stderr.split())
    assert "the model generates the calibration text, which costs some quality" in message
    assert "Traceback" not in stderr
    assert json.loads(stdout)["calibration"]["source"] == sampling.SOURCE
    about = sidecar(tmp_path / "out")
    assert about["calibration"]["source"] == sampling.SOURCE
    assert about["calibration"]["sha256"] == hashed("x", drawn(small, 3, 16), []).sha256
    assert "calibration" not in about["recipe"]


@pytest.mark.parametrize("architecture", ["state space", "state space in heads", "hybrid", "llama"])
def test_what_a_model_keeps_of_its_tokens_has_many_names(architecture: str, random_model: Callable[..., Path]) -> None:
    """The tokens drawn with a cache are those drawn without one."""
    model = AutoModelForCausalLM.from_pretrained(random_model(architecture), dtype=torch.float32).eval()
    rows = continued(model, torch.tensor([[5, 9], [7, 3]]), 12, torch.Generator().manual_seed(2))
    expected, generator = torch.tensor([[5, 9], [7, 3]]), torch.Generator().manual_seed(2)
    while expected.shape[1] < 12:
        with torch.no_grad():
            chances = model(input_ids=expected, use_cache=False).logits[:, -1].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(chances, 1, generator=generator)], dim=1)
    assert torch.equal(rows, expected)
