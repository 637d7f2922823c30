"""The model that the user names: find it (built in, in a folder, on the Hub), then lay it out without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from llmsqueeze.errors import CheckpointError, HubError, RecipeError, UnsupportedError, first_line, nearest
from llmsqueeze.files import ADAPTER_CONFIG, OTHER_WEIGHTS, PICKLES
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint, pickled_only
from llmsqueeze.model.skeleton import Skeleton, build_skeleton, imagine_checkpoint
from llmsqueeze.parallel import processes
from llmsqueeze.text.source import DEMO

HUB_ID = re.compile(r"(?:hf://)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def hub_id(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """A model's name and its revision, of a Hub id as people write it: hf://owner/name, owner/name@revision.

    Raises RecipeError for two revisions.
    """
    match = HUB_ID.fullmatch(model)
    if match is None or Path(model).expanduser().exists():
        return model, revision
    if match["revision"] and revision not in (None, match["revision"]):
        raise RecipeError(f"{model} contradicts --revision {revision}: name the revision once")
    return match["id"], match["revision"] or revision


@dataclass(frozen=True)
class Source:
    """A model by name (a Hub id, a folder, or 'demo'), and how it may be opened.

    adapter: folder or Hub id of a LoRA adapter to merge; merge_adapter: merge the one in the model's folder.
    from_quantized: a model that is quantized already may be read. named: what the user called a model that was written
    again as the folder `model`, and how that was quantized (`read_from`).
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    merge_adapter: bool = False
    from_quantized: bool = False
    named: str | None = None
    read_from: str | None = None

    def __post_init__(self) -> None:
        model, revision = hub_id(self.model, self.revision)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "revision", revision)

    @property
    def name(self) -> str:
        """What the user called the model."""
        return self.named or self.model

    @property
    def options(self) -> list[str]:
        """How the command line asks for the same model, beside its name."""
        flags = {"--merge-adapter": self.merge_adapter, "--from-quantized": self.from_quantized}
        named = {"--adapter": self.adapter, "--revision": self.revision}
        return [
            *(word for flag, value in named.items() if value for word in (flag, value)),
            *(flag for flag, asked in flags.items() if asked),
        ]


@dataclass(frozen=True)
class Original:
    """A model laid out without its weights, and the folder of its weights. adapter: the folder of the one that is
    merged into them."""

    source: Source
    path: Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    adapter: Path | None = None


def open_original(source: Source, weights: bool = True) -> Original:
    """Finds the model and lays it out. Without `weights` only its config is needed.

    Raises RecipeError, CheckpointError, UnsupportedError or HubError.
    """
    local = source.model == DEMO or Path(source.model).expanduser().is_dir()
    if source.revision is not None and local:
        raise RecipeError(f"--revision {source.revision} applies to a Hub id, and {source.model} is a local folder")
    path = locate(source.model, source.revision, weights)
    checkpoint = open_checkpoint(path) if weights else imagine_checkpoint(path, source.trust_remote_code)
    skeleton, adapter = build_skeleton(checkpoint, source.trust_remote_code), adapter_of(source, path)
    if adapter is not None:
        from llmsqueeze.model.adapter import merged

        skeleton = merged(skeleton, path, adapter, source.trust_remote_code)
    return Original(source, path, checkpoint, skeleton, adapter)


def adapter_of(source: Source, path: Path) -> Path | None:
    """The folder of the adapter that is to be merged; None if there is none.

    Raises UnsupportedError if the model's folder has one and nobody said what is to become of it.
    """
    own = (path / ADAPTER_CONFIG).exists()
    if source.adapter is not None:
        if own:
            raise RecipeError(
                f"--adapter {source.adapter}: {path} has an adapter of its own ({ADAPTER_CONFIG}); only one is merged: "
                "--merge-adapter takes that one, or move it out of the folder"
            )
        return locate(source.adapter)
    if source.merge_adapter and not own:
        raise RecipeError(f"--merge-adapter: there is no {ADAPTER_CONFIG} in {path}; name the adapter with --adapter")
    if own and not source.merge_adapter:
        raise UnsupportedError(
            f"{path} holds a LoRA adapter ({ADAPTER_CONFIG}): --merge-adapter merges it into the weights first; to "
            "compress the model without it, move it out of the folder"
        )
    return path if own else None


def pick_device(device: str) -> torch.device:
    """The torch device; `auto` is the first CUDA device, or the CPU if there is none. Of several processes on a machine
    each gets a CUDA device of its own, if none is named by number.

    Raises RecipeError if the name is unknown or the machine has no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and processes.count() > 1:
        device = f"cuda:{processes.local_rank()}"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"unknown device {device!r}; choose auto, cpu, cuda, or cuda:1 and so on") from error
    if chosen.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device {device!r} does not exist: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return chosen


def locate(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of `model`: the built-in `demo`, a folder, or a Hub id (downloaded into the Hub's cache).

    Without `weights` everything else is downloaded. Raises CheckpointError if there is no such folder or it has only
    pickled weights, HubError if the Hub cannot be reached or refuses.
    """
    if model == DEMO:
        from llmsqueeze.demo import MODEL_DIR

        return MODEL_DIR
    model, revision = hub_id(model, revision)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; name the model's folder, a Hub id such as owner/name, or 'demo'")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        siblings = [folder.name for folder in path.parent.glob("*/")] if path.parent.is_dir() else []
        hint = nearest(path.name, [*siblings, DEMO])
        raise CheckpointError(
            f"there is no folder {model}; name a local folder, a Hub id (owner/name), or 'demo'{hint}"
        )
    return _download(model, revision, weights)


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        _check_listing(repo, revision)
        ignored = [*PICKLES, *OTHER_WEIGHTS, "original/*", "consolidated*", "onnx/*"]
        ignored += [] if weights else ["*.safetensors"]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, ignore_patterns=ignored))
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"there is no local folder {repo}, and the Hub cannot be reached for a model of that name: check the "
            "spelling and the network, or name a local folder or 'demo'"
        ) from error
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repo}"
        raise HubError(f"{repo} is gated: accept its licence on {page}, then log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision}; name a branch, tag or commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no local folder {repo}, and the Hub has no model of that name that you may read: check the "
            "spelling, or log in with `hf auth login` if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is neither a local folder nor a valid Hub id: {error}") from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(f"cannot download {repo}: {first_line(error)}") from error


def _check_listing(repo: str, revision: str | None) -> None:
    """Raises CheckpointError if a repository has only pickled weights, before a large download."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        siblings = HfApi().model_info(repo, revision=revision, timeout=10).siblings
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # no network, whatever the HTTP library calls it: the cache can still have the model
        return
    listed = [sibling.rfilename for sibling in siblings or []]
    pickled = [name for name in listed if any(Path(name).match(pattern) for pattern in PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in listed):
        raise CheckpointError(pickled_only(repo, pickled[0]))
