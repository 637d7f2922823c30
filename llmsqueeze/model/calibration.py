"""The calibration text of a model as rows of tokens. If no text can be read, the model generates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsqueeze.errors import CalibrationError, HubError, first_line
from llmsqueeze.model.config import context_length
from llmsqueeze.model.original import Original
from llmsqueeze.model.sampling import SOURCE as SAMPLED
from llmsqueeze.model.sampling import sample_rows
from llmsqueeze.model.text import (
    SELF,
    Calibration,
    Text,
    calibration_rows,
    calibration_text,
    check_ids,
    hashed,
    load_tokenizer,
)
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.recipe.recipe import TextSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Earlier:
    """A draw of calibration rows, as the record of a folder tells it."""

    samples: int
    seq_len: int
    seed: int
    sha256: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Earlier | None:
        """The draw that a compressed folder was made with; None if its record tells of none."""
        try:
            drawn, seed = record["calibration"], record["recipe"]["seed"]
            return cls(int(drawn["samples"]), int(drawn["seq_len"]), int(seed), str(drawn["sha256"]))
        except (KeyError, TypeError, ValueError):
            return None


@timed("read")
def read_calibration(
    original: Original,
    settings: TextSettings,
    progress: Progress,
    held_back: int = 0,
    device: torch.device | None = None,
    earlier: Earlier | None = None,
) -> Calibration:
    """The calibration rows, not longer than the model's context. `held_back`: more rows, for measurements.

    `earlier`: a draw whose rows come last, if it was from the same text. If the model generates its own text, it does
    so on `device` (default: the CPU). Raises CalibrationError, HubError or UnsupportedError.
    """
    skeleton, trust = original.skeleton, original.source.trust_remote_code
    context = context_length(skeleton.model.config) or settings.seq_len
    tokenizer, seq_len = load_tokenizer(original.path, trust), min(settings.seq_len, context)
    text = text_or_self(original.source.model, settings.calibration, progress)
    if text is None:
        count, device = settings.samples + held_back, device or torch.device("cpu")
        seed = settings.seed + (earlier is not None)  # for other rows
        rows = sample_rows(original.path, tokenizer, count, seq_len, seed, device, trust, progress)
        return hashed(SAMPLED, rows[: settings.samples], rows[settings.samples :])
    seen = () if earlier is None else rows_of(earlier, text, tokenizer)
    calibration = calibration_rows(text, tokenizer, settings.samples, seq_len, settings.seed, held_back, seen)
    check_ids([*calibration.rows, *calibration.held_back], skeleton.embedding_shape[0])
    count = len(calibration.rows)
    if count < settings.samples:
        progress.note(f"the calibration text fills {count} samples of {seq_len} tokens, not {settings.samples}")
    return calibration


def rows_of(earlier: Earlier, text: Text, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The rows of an earlier draw; none if it was from another text."""
    try:
        again = calibration_rows(text, tokenizer, earlier.samples, earlier.seq_len, earlier.seed)
    except CalibrationError:
        return []
    return again.rows if again.sha256 == earlier.sha256 else []


def text_or_self(model: str, calibration: str | None, progress: Progress) -> Text | None:
    """The text that `calibration` names, or the default text of `model`.

    None: the model generates the text, because `calibration` is `self`, or because it names no text and the default
    text cannot be read. Raises HubError if a named text cannot be read.
    """
    if calibration == SELF:
        return None
    try:
        return calibration_text(calibration, model)
    except HubError as error:
        if calibration is not None:
            raise
        progress.note(
            f"{first_line(error).partition(';')[0]}: the model generates the calibration text, which costs some "
            "quality; for better quality name a text file with --calibration"
        )
        return None
