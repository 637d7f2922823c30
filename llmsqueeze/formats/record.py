"""The record of a run in `llmsqueeze.json`: no local paths and, without `--profile-time`, no times. So equal runs give
equal files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field

from llmsqueeze import __version__
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.files import SIDECAR, STRICT, Count, Finite, conform, read_json_if_there
from llmsqueeze.formats import native
from llmsqueeze.measure.streams.pooled import PRIOR
from llmsqueeze.model.original import Source
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.text.rows import Calibration
from llmsqueeze.text.source import without_folders

LICENSE_KEYS = ("license", "license_name", "license_link")
CARD_KEYS = ("language", "datasets", "tags", "base_model", "pipeline_tag")
Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]  # a name with {} for the number of an expert


class Drawn(BaseModel):
    """The calibration text of a record."""

    model_config = STRICT
    source: str | None = None
    samples: Count = 0
    seq_len: Count = 0
    tokens: Count = 0
    sha256: str | None = None


class Settings(BaseModel):
    """The recipe of a record. A search tries values that nobody may ask for, so ranges are wide."""

    model_config = STRICT
    method: str | None = None
    quantizer: str | None = None
    bits: Annotated[float, Field(ge=0, le=64)] | None = None
    size: Count | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None
    importance: str | None = None
    widths: list[Count] | None = None
    high_bits: Count | None = None
    low_bits: Count | None = None
    outliers: Annotated[float, Field(ge=0, le=1)] | None = None
    lorc_rank: Count | str | None = None
    distill_steps: Count | None = None
    calibration: str | None = None
    text_field: str | None = None
    samples: Count | None = None
    seq_len: Count | None = None
    pack_documents: bool | None = None
    seed: int | None = None


class Distilled(BaseModel):
    """One distillation in a record."""

    model_config = STRICT
    teacher: str | None = None
    settings: dict[str, Any] = {}


class Record(BaseModel):
    """What is read of `llmsqueeze.json`."""

    model_config = STRICT
    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    read_from: str | None = None
    card: dict[str, Any] = {}
    recipe: Settings = Settings()
    calibration: Drawn | None = None
    versions: dict[str, str | None] = {}
    llmsqueeze_version: str | None = None
    format: str = ""
    format_version: int | None = None
    code_bits: float | None = None
    bits_per_weight: float = 0
    predicted_loss_increase: float | None = None
    quantized_weights: Count = 0
    nbytes: Count = 0
    nbytes_original: Count = 0
    block_scores: dict[str, list[Finite]] = {}
    towers: list[str] = []
    embeddings: list[str] = []
    files: list[str] | None = None
    errors: dict[str, float | None] = {}
    chances: dict[str, float | None] = {}
    tokens: dict[str, float | None] = {}
    experts_stored_as: dict[str, list[Annotated[tuple[Template, Count], Field(strict=False)]]] = {}
    distillation: list[Distilled] = []
    time: dict[str, Any] | None = None


def read_record(folder: Path) -> dict[str, Any]:
    """The folder's `llmsqueeze.json`, empty if there is none. Raises CheckpointError, which names the field, if it is
    not as ours are."""
    record = read_json_if_there(folder / SIDECAR)
    conform(folder / SIDECAR, record, Record)
    return record


def provenance(source: Source, path: Path) -> dict[str, Any]:
    """The model: the name that the user gave, or a folder's last component; its commit and licence if known."""
    local = Path(source.name).expanduser().exists()
    commit = path.name if path.parent.name == "snapshots" else None
    name = Path(source.name).expanduser().absolute().name if local else source.name
    added = {"adapter": source.adapter and Path(source.adapter).name, "read_from": source.read_from}
    added["adapter"] = added["adapter"] or ("its own" if source.merge_adapter else None)
    about = {"model": name, "revision": commit or source.revision, **license_of(path)}
    return about | {key: value for key, value in (added | {"card": card_of(path)}).items() if value}


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without the places that it was loaded from, which can be somebody's folders."""
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {key: without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}


def settings(recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    """The recipe, text and versions: enough to compress the model again."""
    import transformers

    values = recipe.as_dict()
    if recipe.calibration is not None:
        values["calibration"] = without_folders(recipe.calibration)
    return {
        "recipe": values,
        "calibration": calibration.as_dict() if calibration else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def outcome(
    plan: Plan,
    predicted: float | None,
    nbytes: int,
    nbytes_original: int,
    by_weight: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The result: its format, sizes in bytes, and by_weight: kind of number -> linear -> number."""
    is_native = plan.format == "native"
    return {
        "llmsqueeze_version": __version__,
        "format": native.METHOD if is_native else plan.format,
        "format_version": native.format_version(plan) if is_native else None,
        "code_bits": plan.code_bits,
        "bits_per_weight": round(plan.bits_per_weight, 6),
        "predicted_loss_increase": predicted,
        "quantized_weights": plan.numel,
        "nbytes": nbytes,
        "nbytes_original": nbytes_original,
        **{kind: list(names) for kind, names in (("towers", plan.towers), ("embeddings", plan.ends)) if names},
        **{kind: {name: float(f"{one:.6g}") for name, one in numbers.items()} for kind, numbers in by_weight.items()},
    }


def experts(tokens: Mapping[str, float]) -> dict[str, int] | None:
    """tokens: expert's matrix -> how many tokens its moments are of. How many matrices there are, and how many of them
    saw few tokens (less than their prior counts for) and none; None if there are no experts."""
    if not tokens:
        return None
    few = sum(0 < count < PRIOR for count in tokens.values())
    return {"matrices": len(tokens), "few": few, "none": sum(count == 0 for count in tokens.values())}


def license_of(directory: Path) -> dict[str, Any]:
    """The licence lines in the front matter of a model folder's README.md; empty if there are none."""
    metadata = front_matter(directory)
    return {key: metadata[key] for key in LICENSE_KEYS if metadata.get(key)} if metadata.get("license") else {}


def card_of(directory: Path) -> dict[str, Any]:
    """What else a model folder's README.md tells the Hub that is true of a compressed model too."""
    metadata = front_matter(directory)
    return {key: metadata[key] for key in CARD_KEYS if metadata.get(key)}


def front_matter(directory: Path) -> dict[str, Any]:
    """The metadata at the head of a folder's README.md; empty if there are none."""
    import yaml

    try:
        text = (directory / "README.md").read_text(encoding="utf-8-sig")
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
