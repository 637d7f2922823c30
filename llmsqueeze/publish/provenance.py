"""The origin of a folder: recipe, calibration, versions, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llmsqueeze.formats.public import TEXT_SUFFIXES
from llmsqueeze.publish.folder import Folder, mapping
from llmsqueeze.publish.numbers import integer
from llmsqueeze.text.source import text_names


def chosen(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored recipe that have a value."""
    return {key: value for key, value in recipe.items() if value is not None and value != []}


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """The chosen settings as YAML, a list on the line of its key."""
    import yaml

    lines = [
        yaml.safe_dump(
            {key: value},
            default_flow_style=None if isinstance(value, list | dict) else False,
            width=1000,
            allow_unicode=True,
        )
        for key, value in chosen(recipe).items()
    ]
    return "".join(lines)


def quantize_command(folder: Folder) -> str:
    """The command that makes the folder again from its recipe."""
    command = ["llmsqueeze", "quantize", str(folder.record["model"]), "--recipe", "recipe.yaml"]
    revision = folder.record.get("revision")
    return shlex.join([*command, *(["--revision", str(revision)] if revision else [])])


def own_text(folder: Folder) -> str | None:
    """The calibration texts that are files on the disk of the person who made the folder; None if there are none."""
    names = text_names(str(folder.recipe.get("calibration")))
    return ", ".join(name for name in names if name.lower().endswith(TEXT_SUFFIXES)) or None


def later_distillations(folder: Folder) -> list[Mapping[str, Any]]:
    """The distillations that are not in the recipe."""
    return folder.distillations[1 if folder.recipe.get("distill_steps") else 0 :]


def distill_command(distillation: Mapping[str, Any]) -> str:
    """The command of a distillation, with each setting that has an effect."""
    settings = mapping(distillation.get("settings"))
    loss, blockwise, train = settings.get("loss"), bool(settings.get("blockwise")), str(settings.get("train"))
    left_out = {"blockwise", "calibration", "loss" if blockwise else "targets"}
    left_out |= set() if loss == "dad" else {"weight", "gamma"}
    left_out |= set() if "codes" in train else {"moves"}
    command = ["llmsqueeze", "distill", "FOLDER", "--teacher", str(distillation.get("teacher"))]
    for key, value in settings.items():
        if key == "pack_documents":
            command += [] if value else ["--no-pack"]
        elif key not in left_out and value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            command += [f"--{key.replace('_', '-')}", text]
    return shlex.join([*command, *(["--blockwise"] if blockwise else [])])


def calibration(folder: Folder) -> str:
    """'wikitext, 128 samples of 2,048 tokens'."""
    text = folder.record.get("calibration")
    if not isinstance(text, Mapping):
        return "none: the method reads no text"
    packed = mapping(folder.recipe).get("pack_documents", True)
    most = "" if packed else "at most "
    rows = f"{integer(text.get('samples'))} samples of {most}{integer(text.get('seq_len'))} tokens"
    return f"{text.get('source')}, {rows}"


def versions(folder: Folder) -> str:
    """'llmsqueeze 0.1.0, format 2, torch 2.13.0'."""
    values = {"llmsqueeze": folder.record.get("llmsqueeze_version"), "format": folder.record.get("format_version")}
    values |= dict(mapping(folder.record.get("versions")))
    return ", ".join(f"{name} {version}" for name, version in values.items() if version)
