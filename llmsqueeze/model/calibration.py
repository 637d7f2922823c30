"""The calibration text of a model as rows of tokens. If no text can be read, the model generates it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsqueeze.errors import CalibrationError, HubError, first_line
from llmsqueeze.model.config import context_length
from llmsqueeze.model.original import Original
from llmsqueeze.model.sampling import SOURCE as SAMPLED
from llmsqueeze.model.sampling import sample_rows
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.recipe.recipe import TextSettings
from llmsqueeze.text.chat import rendered
from llmsqueeze.text.document import Text
from llmsqueeze.text.rows import Calibration, Draw, enough_characters, hashed, mixed_rows
from llmsqueeze.text.source import DEMO, SELF, calibration_texts
from llmsqueeze.text.tokens import check_ids, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BEGINNING = 200  # characters of the first row that a summary shows


@dataclass(frozen=True)
class Earlier:
    """A draw of calibration rows, as the record of a folder tells it, and the hash of their tokens."""

    draw: Draw
    sha256: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Earlier | None:
        """The draw that a compressed folder was made with; None if its record tells of none."""
        try:
            drawn, recipe = record["calibration"], record["recipe"]
            counts = int(drawn["samples"]), int(drawn["seq_len"]), int(recipe["seed"])
            return cls(Draw(*counts, pack=bool(recipe.get("pack_documents", True))), str(drawn["sha256"]))
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
    count = settings.samples + held_back
    texts = texts_or_self(original.source.model, settings, enough_characters(2 * count, seq_len), progress)
    if texts is None:
        seed = settings.seed + (earlier is not None)  # for other rows
        device = device or torch.device("cpu")
        rows = sample_rows(original.path, tokenizer, count, seq_len, seed, device, trust, progress)
        return hashed(SAMPLED, rows[: settings.samples], rows[settings.samples :])
    texts = [rendered(text, tokenizer) for text in texts]
    for note in [note for text in texts for note in text.notes]:
        progress.note(note)
    seen = () if earlier is None else rows_of(earlier, texts, tokenizer)
    draw = Draw(settings.samples, seq_len, settings.seed, held_back, seen, settings.pack_documents)
    calibration = mixed_rows(texts, tokenizer, draw)
    check_ids([*calibration.rows, *calibration.held_back], skeleton.embedding_shape[0])
    if (count := len(calibration.rows)) < settings.samples:
        rows_ = f"samples of {seq_len} tokens" if settings.pack_documents else "samples, one a document"
        progress.note(f"the calibration text fills {count} {rows_}, not {settings.samples}")
    own = settings.calibration not in (None, DEMO)
    return replace(calibration, begins=beginning(calibration.rows[0], tokenizer) if own else "")


def beginning(row: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first characters of a row [1, length], as the model sees them."""
    text: Any = tokenizer.decode(row[0, : 2 * BEGINNING])
    return str(text)[:BEGINNING]


def rows_of(earlier: Earlier, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The rows of an earlier draw; none if it was from another text."""
    try:
        again = mixed_rows(texts, tokenizer, earlier.draw)
    except CalibrationError:
        return []
    return again.rows if again.sha256 == earlier.sha256 else []


def texts_or_self(model: str, settings: TextSettings, enough: int, progress: Progress) -> list[Text] | None:
    """The texts that `settings.calibration` names, `enough` characters of each, or the default text of `model`.

    None: the model generates the text, because its name is `self`, or because no text is named and the default text
    cannot be read. Raises HubError if a named text cannot be read.
    """
    if settings.calibration == SELF:
        return None
    try:
        return calibration_texts(settings.calibration, model, settings.text_field, enough)
    except HubError as error:
        if settings.calibration is not None:
            raise
        progress.note(
            f"{first_line(error).partition(';')[0]}: the model generates the calibration text, which costs some "
            "quality; for better quality name a text file with --calibration"
        )
        return None
