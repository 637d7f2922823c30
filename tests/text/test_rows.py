"""Text to token rows: the cut into windows or beginnings, the seed and the hash, several texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmsqueeze.errors import CalibrationError
from llmsqueeze.text.document import Text
from llmsqueeze.text.rows import Draw, beginning_of, beginnings, calibration_rows, mixed_rows, portions, windows
from llmsqueeze.text.tokens import load_tokenizer


class Letters:
    """A tokenizer of letters: a = 0, b = 1, ..., with or without BOS."""

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 97 for c in text]}


def cut(text: str, length: int, bos: int | None, tail: bool) -> list[list[int]]:
    return [row[0].tolist() for row in windows(Text("t", (text,)), Letters(bos), length, tail)]  # type: ignore[arg-type]


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
    text = Text("t", ("abcdefghijklmnopqrstuvwxyz",))
    first, again, other = (calibration_rows(text, Letters(None), Draw(4, 3, seed)) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert [row.tolist() for row in first.rows] == [row.tolist() for row in again.rows]
    assert first.sha256 == again.sha256 != other.sha256
    assert len({tuple(row[0].tolist()) for row in first.rows}) == 4, "no row twice"
    everything = calibration_rows(text, Letters(None), Draw(100, 3, 0))  # type: ignore[arg-type]
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
    text, letters = Text("t", ("abcdefghijklmnopqrstuvwxyz",)), Letters(None)
    known = calibration_rows(text, letters, Draw(seen, 3, 1)).rows if seen else []  # type: ignore[arg-type]
    drawn = calibration_rows(text, letters, Draw(samples, 3, 0, held_back, known))  # type: ignore[arg-type]
    old = {tuple(row[0].tolist()) for row in known}
    rows, apart = ([tuple(row[0].tolist()) for row in some] for some in (drawn.rows, drawn.held_back))
    assert len(rows) == count
    assert len(set(rows + apart)) == len(rows + apart), "no row twice"
    assert [row in old for row in rows] == [False] * fresh_rows + [True] * (count - fresh_rows)
    if seen < 8:
        assert len(apart) == fresh_apart
        assert not old & set(apart)


def test_real_tokenizers(shared: Path) -> None:
    for name in ("stories260K", "bookllama-6m"):
        tokenizer = load_tokenizer(shared / "models" / name)
        rows = windows(Text("t", ("Once upon a time there was a tree. " * 20,)), tokenizer, 16)
        assert all(row[0, 0] == tokenizer.bos_token_id for row in rows)
        joined = torch.cat([row[0, 1:] for row in rows])
        assert tokenizer.decode(joined).strip().startswith("Once upon a time there was a tree.")


def test_a_row_for_every_document() -> None:
    """Not packed: each row is the beginning of a document, as long as that is; nothing is padded."""
    text = Text("t", ("abcdef", "a", "gh", "ijklm"))
    rows = [row[0].tolist() for row in beginnings(text, Letters(99), 4)]  # type: ignore[arg-type]
    assert rows == [[99, 0, 1, 2], [99, 0], [99, 6, 7], [99, 8, 9, 10]]
    assert [len(row[0]) for row in beginnings(text, Letters(None), 4)] == [4, 2, 4], "one token predicts nothing"  # type: ignore[arg-type]
    drawn = calibration_rows(text, Letters(99), Draw(3, 4, seed=0, held_back=2, pack=False))  # type: ignore[arg-type]
    assert sorted([*map(_tuple, drawn.rows), *map(_tuple, drawn.held_back)]) == sorted(map(tuple, rows))
    assert drawn.as_dict()["tokens"] == sum(row.shape[1] for row in drawn.rows)
    with pytest.raises(CalibrationError, match="has no document of two tokens"):
        beginnings(Text("t", ("a",)), Letters(None), 4)  # type: ignore[arg-type]


def _tuple(row: torch.Tensor) -> tuple[int, ...]:
    return tuple(row[0].tolist())


def test_several_texts_have_their_shares() -> None:
    a, b = Text("a", ("abcdefgh" * 9,), 3.0), Text("b", ("stuvwxyz" * 9,), 1.0)
    mixed = mixed_rows([a, b], Letters(None), Draw(8, 4, seed=0, held_back=4))  # type: ignore[arg-type]
    assert mixed.source == "a 75%, b 25%"
    of_b = [bool(row[0, 0] > 10) for row in mixed.rows]
    assert (len(of_b), sum(of_b)) == (8, 2)
    assert of_b != sorted(of_b), "in random order"
    assert [bool(row[0, 0] > 10) for row in mixed.held_back].count(True) == 1
    alone = mixed_rows([a], Letters(None), Draw(8, 4, seed=0))  # type: ignore[arg-type]
    assert alone.sha256 == calibration_rows(a, Letters(None), Draw(8, 4, 0)).sha256  # type: ignore[arg-type]
    assert alone.source == "a"


@pytest.mark.parametrize(
    ("given", "count", "expected"), [((1, 1, 1), 10, [4, 3, 3]), ((70, 30), 5, [4, 1]), ((9, 1), 2, [2, 0])]
)
def test_portions(given: tuple[float, ...], count: int, expected: list[int]) -> None:
    assert portions([Text("t", (), share) for share in given], count) == expected
    assert sum(expected) == count


def test_a_long_text_is_cut_before_it_is_tokenized() -> None:
    text = beginning_of(Text("t", ("abc", "def", "ghi")), 7)
    assert text.documents == ("abc", "de")
    assert len(text.content) == 7
