"""Texts -> rows of tokens, drawn by seed and hashed.

Packed, a row is a window of the text: windows do not overlap, and begin with the BOS token if the tokenizer has one.
Calibration draws them in random order; evaluation has all of them, in order. Not packed, a row is the beginning of a
document, so rows have several lengths, and nothing is padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsqueeze.errors import CalibrationError
from llmsqueeze.text.document import Text
from llmsqueeze.text.tokens import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Calibration:
    """Token rows, int64 [1, length], and their source; `held_back` are other rows of the same text.

    begins: the beginning of the first row as text, if the user named the text.
    """

    source: str
    rows: list[Tensor]
    sha256: str
    held_back: list[Tensor]
    begins: str = ""

    @property
    def seq_len(self) -> int:
        """Tokens of the longest row."""
        return max(row.shape[1] for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(row.numel() for row in self.rows)

    def as_dict(self) -> dict[str, object]:
        return {
            "source": self.source,
            "samples": len(self.rows),
            "seq_len": self.seq_len,
            "tokens": self.tokens,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class Draw:
    """How rows are drawn from a text: `samples` of `seq_len` tokens, by `seed`.

    held_back: so many rows more are kept apart for measurements. seen: rows [1, length] that are drawn last. pack: rows
    are windows of the whole text, else beginnings of documents.
    """

    samples: int
    seq_len: int
    seed: int
    held_back: int = 0
    seen: Sequence[Tensor] = ()
    pack: bool = True


def hashed(source: str, rows: list[Tensor], held_back: list[Tensor]) -> Calibration:
    """A calibration with the SHA-256 of the tokens in `rows`."""
    digest = hashlib.sha256(b"".join(row.numpy().astype("<i8").tobytes() for row in rows)).hexdigest()
    return Calibration(source, rows, digest, held_back)


def windows(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, tail: bool = False) -> list[Tensor]:
    """Rows, int64 [1, length], over the whole text that do not overlap; BOS first if the tokenizer has one.

    With `tail` the rest makes a shorter last row, else it is dropped. Raises CalibrationError if the text does not
    fill one row (with `tail`: if it has no token to predict).
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = after(bos, token_ids(text.content, tokenizer))
    step = length - len(bos)
    shortest = 2 - len(bos) if tail else step
    if len(ids) < shortest:
        raise CalibrationError(
            f"{text.source} has {len(ids)} tokens, too few for one sample of {length}; take a longer text or a "
            "smaller --seq-len"
        )
    whole, beginning = torch.tensor(ids), torch.tensor(bos, dtype=torch.int64)
    starts = range(0, len(ids) - shortest + 1, step)
    return [torch.cat([beginning, whole[i : i + step]])[None] for i in starts]


def beginnings(text: Text, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tensor]:
    """Rows, int64 [1, at most `length`]: the beginning of every document, after BOS if the tokenizer has one.

    Documents without a token to predict have none. Raises CalibrationError if no document has one.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # a token is a character at least, but for rare ones of several tokens
    documents = (document[: 64 * length] for document in text.documents if isinstance(document, str))
    ids = [[*bos, *after(bos, token_ids(document, tokenizer))][:length] for document in documents]
    rows = [torch.tensor(row)[None] for row in ids if len(row) > 1]
    if not rows:
        raise CalibrationError(f"{text.source} has no document of two tokens")
    return rows


def after(bos: list[int], ids: list[int]) -> list[int]:
    """The tokens after BOS, if they begin with it: a chat whose turns all do."""
    return ids[1:] if bos and ids[:1] == bos else ids


def calibration_rows(text: Text, tokenizer: PreTrainedTokenizerBase, draw: Draw) -> Calibration:
    """The rows of a draw, or all rows if there are fewer, and the hash of their tokens.

    The next rows in that order, or those that are left, are held back. If rows that were seen are needed, at most half
    of the others is held back. Raises CalibrationError if the text does not fill one row.
    """
    # to tokenize a text far longer than the rows would only cost time and memory
    most = draw.samples + draw.held_back + len(draw.seen)
    text = beginning_of(text, enough_characters(most, draw.seq_len))
    rows = (windows if draw.pack else beginnings)(text, tokenizer, draw.seq_len)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(draw.seed)).tolist()
    known = {_key(row) for row in draw.seen}
    old = [bool(known) and _key(row) in known for row in rows]
    fresh, again = ([rows[i] for i in order if old[i] is seen_before] for seen_before in (False, True))
    if not fresh:
        fresh, again = again, fresh
    left = max(0, len(fresh) - draw.samples)
    apart = min(draw.held_back, max(left, len(fresh) // 2) if again else left)
    start = min(draw.samples, len(fresh) - apart)
    return hashed(text.source, [*fresh[:start], *again][: draw.samples], fresh[start : start + apart])


def mixed_rows(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, draw: Draw) -> Calibration:
    """As `calibration_rows`, of several texts: each has its share of the rows, and their order is drawn by seed."""
    counts = zip(portions(texts, draw.samples), portions(texts, draw.held_back), strict=True)
    drawn = [
        calibration_rows(text, tokenizer, replace(draw, samples=count, held_back=apart))
        for text, (count, apart) in zip(texts, counts, strict=True)
        if count or len(texts) == 1
    ]
    if len(texts) == 1:
        return drawn[0]
    total = sum(text.share for text in texts)
    source = ", ".join(f"{text.source} {text.share / total:.0%}" for text in texts)
    rows = _shuffled([row for one in drawn for row in one.rows], draw.seed)
    return hashed(source, rows, _shuffled([row for one in drawn for row in one.held_back], draw.seed))


def portions(texts: Sequence[Text], count: int) -> list[int]:
    """`count` rows by the shares of the texts: whole numbers with this sum, the largest remainders rounded up."""
    total = sum(text.share for text in texts)
    exact = [count * text.share / total for text in texts]
    whole = [int(value) for value in exact]
    for at in sorted(range(len(texts)), key=lambda at: whole[at] - exact[at])[: count - sum(whole)]:
        whole[at] += 1
    return whole


def enough_characters(rows: int, length: int) -> int:
    """Characters of a text from which so many rows are drawn."""
    return max(1 << 24, 64 * rows * length)


def beginning_of(text: Text, characters: int) -> Text:
    """The first documents of a text of strings, so many characters of them."""
    kept: list[str] = []
    for document in text.documents:
        if characters <= 0:
            break
        if isinstance(document, str):
            kept.append(document[:characters])
            characters -= len(document) + 2  # and what stands between two
    return replace(text, documents=tuple(kept))


def _shuffled(rows: list[Tensor], seed: int) -> list[Tensor]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[at] for at in order]


def _key(row: Tensor) -> bytes:
    """What a row [1, length] is told by."""
    return row.numpy().tobytes()
