"""Text to token rows: every source, the cut into windows, the seed and the hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmsqueeze.errors import CalibrationError
from llmsqueeze.model.text import (
    Text,
    calibration_rows,
    calibration_text,
    evaluation_text,
    load_tokenizer,
    read_text,
    windows,
)


class Letters:
    """A tokenizer of letters: a = 0, b = 1, ..., with or without BOS."""

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 97 for c in text]}


def cut(text: str, length: int, bos: int | None, tail: bool) -> list[list[int]]:
    return [row[0].tolist() for row in windows(Text("t", text), Letters(bos), length, tail)]  # type: ignore[arg-type]


def test_windows_do_not_overlap_and_begin_with_bos() -> None:
    assert cut("abcdefgh", 3, 99, tail=False) == [[99, 0, 1], [99, 2, 3], [99, 4, 5], [99, 6, 7]]
    assert cut("abcdefg", 3, 99, tail=False) == [[99, 0, 1], [99, 2, 3], [99, 4, 5]]
    assert cut("abcdefg", 3, 99, tail=True) == [[99, 0, 1], [99, 2, 3], [99, 4, 5], [99, 6]]
    assert cut("abcdefg", 3, None, tail=False) == [[0, 1, 2], [3, 4, 5]]
    assert cut("abcdefgh", 3, None, tail=True) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert cut("abcdefg", 3, None, tail=True) == [[0, 1, 2], [3, 4, 5]], "a single token predicts nothing"


def test_a_text_with_nothing_to_predict_is_refused() -> None:
    with pytest.raises(CalibrationError, match="has 2 tokens, too few for one sample of 9"):
        cut("ab", 9, 99, tail=False)
    with pytest.raises(CalibrationError, match="has 1 tokens"):
        cut("a", 9, None, tail=True)
    assert cut("a", 9, 99, tail=True) == [[99, 0]]


def test_rows_follow_the_seed_and_the_hash_follows_the_tokens() -> None:
    text = Text("t", "abcdefghijklmnopqrstuvwxyz")
    first, again, other = (calibration_rows(text, Letters(None), 4, 3, seed) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert [row.tolist() for row in first.rows] == [row.tolist() for row in again.rows]
    assert first.sha256 == again.sha256 != other.sha256
    assert len({tuple(row[0].tolist()) for row in first.rows}) == 4, "no row twice"
    everything = calibration_rows(text, Letters(None), 100, 3, 0)  # type: ignore[arg-type]
    assert len(everything.rows) == 8
    assert everything.as_dict()["tokens"] == 24


@pytest.mark.parametrize(
    ("seen", "samples", "held_back", "fresh_rows", "fresh_apart", "count"),
    [
        (3, 2, 2, 2, 2, 2),  # there are enough others
        (3, 4, 2, 3, 2, 4),  # one row of the seen is needed
        (6, 4, 4, 1, 1, 4),  # at most half of the two others is kept apart
        (8, 3, 2, 0, 0, 3),  # all are seen
        (0, 7, 4, 7, 1, 7),
    ],
)
def test_seen_rows_come_last(
    seen: int, samples: int, held_back: int, fresh_rows: int, fresh_apart: int, count: int
) -> None:
    """Of eight rows; what is kept apart is never trained on."""
    text, letters = Text("t", "abcdefghijklmnopqrstuvwxyz"), Letters(None)
    known = calibration_rows(text, letters, seen, 3, 1).rows if seen else []  # type: ignore[arg-type]
    drawn = calibration_rows(text, letters, samples, 3, 0, held_back, known)  # type: ignore[arg-type]
    old = {tuple(row[0].tolist()) for row in known}
    rows, apart = ([tuple(row[0].tolist()) for row in some] for some in (drawn.rows, drawn.held_back))
    assert len(rows) == count
    assert len(set(rows + apart)) == len(rows + apart), "no row twice"
    assert [row in old for row in rows] == [False] * fresh_rows + [True] * (count - fresh_rows)
    if seen < 8:
        assert len(apart) == fresh_apart
        assert not old & set(apart)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert read_text(str(tmp_path / "a.txt"), "train") == Text("a.txt", "one two")
    assert read_text(str(tmp_path / "b.jsonl"), "train") == Text("b.jsonl", "one\n\ntwo")
    with pytest.raises(CalibrationError, match="is a folder"):
        read_text(str(tmp_path), "train")


def test_a_data_set_from_the_hubs_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`name:config:split` as datasets gets it, on a data set that datasets itself builds from local files."""
    import datasets

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one", " ", "two")))
    asked = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        cache = str(tmp_path / "cache")
        return load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=cache)

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("llmsqueeze.model.text._hub_answers", lambda name: True)
    assert read_text("owner/set:raw:validation", "train") == Text("owner/set raw validation", "one\n\ntwo")
    assert read_text("owner/set", "test").source == "owner/set test"
    assert asked == [("owner/set", "raw", "validation"), ("owner/set", None, "test")]


def test_without_a_source_the_papers_choice_or_the_demos_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsqueeze.model.text._read_hub", lambda name, config, split: "hub text")
    assert calibration_text(None, "owner/model").source == "Salesforce/wikitext wikitext-2-raw-v1 train"
    assert evaluation_text(None, "owner/model").source == "Salesforce/wikitext wikitext-2-raw-v1 test"
    assert calibration_text(None, "demo").content != evaluation_text(None, "demo").content
    assert calibration_text("demo", "owner/model") == calibration_text(None, "demo")


def test_real_tokenizers(shared: Path) -> None:
    for name in ("stories260K", "bookllama-6m"):
        tokenizer = load_tokenizer(shared / "models" / name)
        rows = windows(Text("t", "Once upon a time there was a tree. " * 20), tokenizer, 16)
        assert all(row[0, 0] == tokenizer.bos_token_id for row in rows)
        joined = torch.cat([row[0, 1:] for row in rows])
        assert tokenizer.decode(joined).strip().startswith("Once upon a time there was a tree.")
