"""The tokenizer of a model, and texts as its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from llmsqueeze.errors import CalibrationError, CheckpointError, UnsupportedError, foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises CheckpointError if transformers can open none."""
    from transformers import AutoTokenizer

    with foreign(CheckpointError, f"{path} has no tokenizer that transformers can open"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    return tokenizer


def token_ids(content: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text, without special ones."""
    with foreign(CalibrationError, "the model's tokenizer cannot read the text"):
        ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def check_ids(rows: Iterable[Tensor], vocabulary: int) -> None:
    """Raises UnsupportedError for tokens [1, length] beyond the rows of the model's embeddings."""
    largest = max((int(row.max()) for row in rows if row.numel()), default=0)
    if largest >= vocabulary:
        raise UnsupportedError(
            f"the tokenizer gives ids up to {largest}, beyond the {vocabulary} rows of the model's embeddings: model "
            "and tokenizer do not match (tokens that were added, without resize_token_embeddings?)"
        )
