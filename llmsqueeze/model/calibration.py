"""The calibration text of a model as rows of tokens. If no text can be read, the model generates it."""

from __future__ import annotations

import torch

from llmsqueeze.errors import HubError, UnsupportedError, first_line
from llmsqueeze.model.original import Original
from llmsqueeze.model.sampling import SOURCE as SAMPLED
from llmsqueeze.model.sampling import sample_rows
from llmsqueeze.model.text import (
    SELF,
    Calibration,
    Text,
    calibration_rows,
    calibration_text,
    hashed,
    load_tokenizer,
)
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.recipe.recipe import TextSettings


@timed("read")
def read_calibration(
    original: Original,
    settings: TextSettings,
    progress: Progress,
    held_back: int = 0,
    device: torch.device | None = None,
) -> Calibration:
    """The calibration rows, not longer than the model's context. `held_back`: more rows, for measurements.

    If the model generates its own text, it does so on `device` (default: the CPU). Raises CalibrationError, HubError or
    UnsupportedError.
    """
    skeleton, trust = original.skeleton, original.source.trust_remote_code
    context = getattr(skeleton.model.config, "max_position_embeddings", None) or settings.seq_len
    tokenizer, seq_len = load_tokenizer(original.path, trust), min(settings.seq_len, context)
    text = text_or_self(original.source.model, settings.calibration, progress)
    if text is None:
        count, device = settings.samples + held_back, device or torch.device("cpu")
        rows = sample_rows(original.path, tokenizer, count, seq_len, settings.seed, device, trust, progress)
        return hashed(SAMPLED, rows[: settings.samples], rows[settings.samples :])
    calibration = calibration_rows(text, tokenizer, settings.samples, seq_len, settings.seed, held_back)
    vocabulary, _ = skeleton.embedding_shape
    if max(int(row.max()) for row in calibration.rows) >= vocabulary:
        raise UnsupportedError(
            f"the tokenizer gives ids beyond the model's vocabulary of {vocabulary}: model and tokenizer do not match"
        )
    count = len(calibration.rows)
    if count < settings.samples:
        progress.note(f"the calibration text fills {count} samples of {seq_len} tokens, not {settings.samples}")
    return calibration


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
