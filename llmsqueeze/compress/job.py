"""What every run begins with: the model found and laid out, the recipe's grid on its linears, the text read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmsqueeze.allocation.plan import Plan, base_plan
from llmsqueeze.errors import HubError, RecipeError, UnsupportedError, first_line
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.locate import locate
from llmsqueeze.model.sampling import SOURCE as SAMPLED
from llmsqueeze.model.sampling import sample_rows
from llmsqueeze.model.skeleton import Skeleton, build_skeleton, imagine_checkpoint
from llmsqueeze.model.text import (
    DEMO,
    SELF,
    Calibration,
    Text,
    calibration_rows,
    calibration_text,
    hashed,
    load_tokenizer,
)
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """Which model, and how it may be opened: a Hub id, a folder, or 'demo'."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Job:
    """A model laid out without its weights, the linears to compress on the recipe's base grid, and the text."""

    source: Source
    path: Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    plan: Plan
    calibration: Calibration | None

    @property
    def kept_nbytes(self) -> int:
        """Bytes of all weights beside the planned linears."""
        return self.checkpoint.nbytes - self.dense_nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the planned linears in the original."""
        names = (self.skeleton.sources[f"{name}.weight"] for name in self.plan.weights)
        return sum(self.checkpoint.tensors[name].nbytes for name in names)


def prepare(
    source: Source,
    recipe: Recipe,
    progress: Progress,
    text: bool | None = None,
    weights: bool = True,
    held_back: int = 0,
    device: torch.device | None = None,
) -> Job:
    """Finds and lays out the model; reads the calibration text if the recipe needs one, or as `text` says.

    Without `weights` only the model's configuration has to be there. `held_back`: samples to keep for measuring.
    `device`: where a model that samples its own text does so.
    """
    local = source.model == DEMO or Path(source.model).expanduser().is_dir()
    if source.revision is not None and local:
        raise RecipeError(f"--revision {source.revision} goes with a Hub id, and {source.model} is a local folder")
    path = locate(source.model, source.revision, weights)
    checkpoint = open_checkpoint(path) if weights else imagine_checkpoint(path, source.trust_remote_code)
    skeleton = build_skeleton(checkpoint, source.trust_remote_code)
    plan = base_plan(skeleton, recipe)
    calibration = None
    if recipe.needs_text if text is None else text:
        calibration = read_calibration(source, skeleton, recipe, progress, held_back, device)
    return Job(source, path, checkpoint, skeleton, plan, calibration)


def text_or_self(source: Source, recipe: Recipe, progress: Progress) -> Text | None:
    """The calibration text; None if the model is to write it, as it is where none is named and none can be had."""
    if recipe.calibration == SELF:
        return None
    try:
        return calibration_text(recipe.calibration, source.model)
    except HubError as error:
        if recipe.calibration is not None:
            raise
        progress.note(
            f"{first_line(error).partition(';')[0]}: calibrating on text sampled from the model itself, which costs "
            "some quality; name a text file with --calibration to do better"
        )
        return None


def read_calibration(
    source: Source,
    skeleton: Skeleton,
    recipe: Recipe,
    progress: Progress,
    held_back: int = 0,
    device: torch.device | None = None,
) -> Calibration:
    """The calibration rows, as long as the model's context allows; the model samples them on `device`, or the CPU."""
    device = device or torch.device("cpu")
    context = getattr(skeleton.model.config, "max_position_embeddings", None) or recipe.seq_len
    tokenizer, seq_len = (
        load_tokenizer(skeleton.checkpoint.path, source.trust_remote_code),
        min(recipe.seq_len, context),
    )
    text = text_or_self(source, recipe, progress)
    if text is None:
        drawn = sample_rows(
            skeleton.checkpoint.path,
            tokenizer,
            recipe.samples + held_back,
            seq_len,
            recipe.seed,
            device,
            source.trust_remote_code,
            progress,
        )
        return hashed(SAMPLED, drawn[: recipe.samples], recipe.samples, drawn[recipe.samples :])
    rows = calibration_rows(text, tokenizer, recipe.samples, seq_len, recipe.seed, held_back)
    vocabulary, _ = skeleton.embedding_shape
    if max(int(row.max()) for row in rows.rows) >= vocabulary:
        raise UnsupportedError(
            f"the tokenizer gives ids beyond the model's vocabulary of {vocabulary}: they do not match"
        )
    if len(rows.rows) < recipe.samples:
        progress.note(
            f"the calibration text fills {len(rows.rows)} samples of {rows.seq_len} tokens, not {recipe.samples}"
        )
    return rows


def pick_device(device: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU. Raises RecipeError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"unknown device {device!r}; choose auto, cpu, cuda, or cuda:1 and so on") from error
    if chosen.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device {device!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen
