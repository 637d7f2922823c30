"""The model that the user names, opened: where it is, its tensors, its modules without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmsqueeze.errors import RecipeError
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.locate import locate
from llmsqueeze.model.skeleton import Skeleton, build_skeleton, imagine_checkpoint
from llmsqueeze.model.text import DEMO


@dataclass(frozen=True)
class Source:
    """Which model, and how it may be opened: a Hub id, a folder, or 'demo'."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Original:
    """A model laid out without its weights, and the folder that they are read from."""

    source: Source
    path: Path
    checkpoint: Checkpoint
    skeleton: Skeleton


def open_original(source: Source, weights: bool = True) -> Original:
    """Finds the model and lays it out. Without `weights` only its configuration has to be there.

    Raises RecipeError, CheckpointError, UnsupportedError or HubError.
    """
    local = source.model == DEMO or Path(source.model).expanduser().is_dir()
    if source.revision is not None and local:
        raise RecipeError(f"--revision {source.revision} goes with a Hub id, and {source.model} is a local folder")
    path = locate(source.model, source.revision, weights)
    checkpoint = open_checkpoint(path) if weights else imagine_checkpoint(path, source.trust_remote_code)
    return Original(source, path, checkpoint, build_skeleton(checkpoint, source.trust_remote_code))


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
