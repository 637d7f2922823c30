"""The model card: what a compressed folder is, what it costs, how to load it, how to make it again, where it ends.

Everything in it is read from the folder (`llmsqueeze.json`, `config.json`, the scores, and the licence lines of a
README.md that is already there). A card is public, so whatever could name the maker's disk is cut to its last
component: `shown`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CheckpointError, UnsupportedError
from llmsqueeze.files import SIDECAR, read_json
from llmsqueeze.formats.public import TEXT_SUFFIXES, human_bytes, is_hub_id, shown, table, yaml_text
from llmsqueeze.formats.record import LICENSE_KEYS, license_of
from llmsqueeze.publish import card_scores
from llmsqueeze.publish.snippets import how_to_load, what_opens_it

MARK = "<!-- Written by llmsqueeze: `llmsqueeze push` writes this file anew. -->"

# the keys of the sidecar that a card cannot do without
NEEDED: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "recipe": dict,
    "bits_per_weight": (int, float),
    "quantized_weights": int,
    "nbytes": int,
    "nbytes_original": int,
}


def model_card(directory: Path, repo: str | None = None, checked: Mapping[str, Any] | None = None) -> str:
    """The README.md text for a compressed folder.

    repo: the Hub id to load it from, when it has one. checked: what `checking.check` found; without it the card does
    not say what opens the folder.

    Raises UnsupportedError for a folder without `llmsqueeze.json`, CheckpointError for a damaged one.
    """
    sidecar = read_sidecar(directory)
    name = repo or directory.resolve().name
    sections = [
        f"---\n{yaml_text(_front_matter(directory, sidecar, name.rpartition('/')[2]))}---",
        MARK,
        f"# {name.rpartition('/')[2]}",
        _what(sidecar),
        *how_to_load(name, sidecar.get("format", "llmsqueeze")),
        "## Size",
        _sizes(directory, sidecar),
        "## Scores",
        card_scores.scores(directory, str(sidecar["model"]), name),
        *card_scores.comparison(directory),
        "## Limits",
        _limits(directory, sidecar, checked or {}),
        "## Recipe",
        _recipe(sidecar),
        "## Calibration",
        _calibration(sidecar.get("calibration")),
        "## Versions",
        _versions(sidecar),
    ]
    return "\n\n".join(sections) + "\n"


def read_sidecar(directory: Path) -> dict[str, Any]:
    """The folder's `llmsqueeze.json`.

    Raises UnsupportedError when there is none, CheckpointError when a key is missing or of the wrong type.
    """
    path = directory / SIDECAR
    if not path.is_file():
        raise UnsupportedError(
            f"'{directory}' has no {SIDECAR}: it was not written by `llmsqueeze quantize`; "
            "name the folder that command wrote"
        )
    sidecar = read_json(path)
    if wrong := [key for key, kind in NEEDED.items() if not isinstance(sidecar.get(key), kind)]:
        raise CheckpointError(f"'{path}' has no usable {', '.join(wrong)}; run `llmsqueeze quantize` again to write it")
    return sidecar


def _front_matter(directory: Path, sidecar: dict[str, Any], name: str) -> dict[str, Any]:
    """The card's metadata; the licence is copied from the sidecar or the README.md there, never made up."""
    model = str(sidecar["model"])
    front: dict[str, Any] = {}
    if is_hub_id(model):
        front |= {"base_model": model, "base_model_relation": "quantized"}
    known = {key: sidecar[key] for key in LICENSE_KEYS if sidecar.get("license") and sidecar.get(key)}
    front |= shown(known or license_of(directory))
    form = sidecar.get("format", "llmsqueeze")
    # the Hub's page offers the code of the library named here; plain transformers would fill our format with noise
    front["library_name"] = "llmsqueeze" if form == "llmsqueeze" else "transformers"
    front |= {"pipeline_tag": "text-generation", "tags": ["llmsqueeze", "quantized", *_tags(sidecar, form)]}
    measured = card_scores.model_index(directory, name)
    return front | ({"model-index": measured} if measured else {})


def _tags(sidecar: dict[str, Any], form: str) -> list[str]:
    """The format and the width of the codes, where there is something to name."""
    bits = sidecar.get("code_bits") or sidecar["recipe"].get("bits")
    if form == "dense" or not isinstance(bits, int | float):
        return []
    return [*([form] if form != "llmsqueeze" else []), f"{round(bits, 2):g}-bit"]


def _what(sidecar: dict[str, Any]) -> str:
    model = str(sidecar["model"])
    link = f"[{model}](https://huggingface.co/{model})" if is_hub_id(model) else f"`{shown(model)}`"
    revision = f" (revision `{shown(sidecar['revision'])}`)" if sidecar.get("revision") else ""
    return (
        f"This is {link}{revision} with the weights of its linear layers compressed by llmsqueeze "
        f"to {sidecar['bits_per_weight']:.2f} bits per weight."
    )


def _sizes(directory: Path, sidecar: dict[str, Any]) -> str:
    before, after = int(sidecar["nbytes_original"]), int(sidecar["nbytes"])
    share = f" ({100 * after / before:.1f} % of the original)" if before else ""
    quantization = read_json(directory / "config.json").get("quantization_config") or {}
    linears = len(quantization.get("weights") or sidecar.get("errors") or {})
    rows = [
        ("All weights", human_bytes(before), human_bytes(after) + share),
        ("Bits per weight, everything counted", "", f"{sidecar['bits_per_weight']:.2f}"),
        *([("Bits per code, on average", "", f"{sidecar['code_bits']:.2f}")] if "code_bits" in sidecar else []),
        *([("Quantized linear layers", "", f"{linears:,}")] if linears else []),
    ]
    return (
        f"{table(('', 'Original', 'This model'), rows)}\n\n"
        f"Bits per weight counts everything stored for the {sidecar['quantized_weights']:,} weights of the "
        "quantized linear layers: codes, scales, zero points, outliers and their positions. The layers that "
        "stay as they were (embeddings, norms and the like) count in the bytes, not in the bits per weight."
    )


def _limits(directory: Path, sidecar: dict[str, Any], checked: Mapping[str, Any]) -> str:
    """What opens the folder and what does not, and what nobody has looked at."""
    form = sidecar.get("format", "llmsqueeze")
    lines = what_opens_it(form, shown(dict(checked.get("verdicts") or {})))
    lines += [f"{note[:1].upper()}{note[1:]}." for note in shown(list(checked.get("notes") or []))]
    text = (sidecar.get("calibration") or {}).get("source")
    if text:
        lines.append(
            f"Calibrated on {shown(str(text))}: what it keeps of other languages and domains was not looked at, and "
            "may be less."
        )
    measured = card_scores.measured_on(directory)
    lines.append(
        f"Measured on {'; '.join(measured)}, and on nothing else." if measured else "Its quality was not measured."
    )
    lines.append("The original's own limits and biases remain.")
    return "\n".join(f"- {line}" for line in lines)


def _recipe(sidecar: dict[str, Any]) -> str:
    recipe = sidecar["recipe"]
    command = ["llmsqueeze", "quantize", str(shown(sidecar["model"])), "--recipe", "recipe.yaml"]
    if sidecar.get("revision"):
        command += ["--revision", str(sidecar["revision"])]
    local, text = "", str(shown(recipe.get("calibration")))
    if text.lower().endswith(TEXT_SUFFIXES):
        local = f"\n\nIt needs the calibration text `{text}`, a file of the maker's that is not part of this repo."
    return (
        f"`recipe.yaml`:\n\n```yaml\n{yaml_text(shown(recipe))}```\n\n"
        f"With that file, this command makes the model again:\n\n```\n{shlex.join(command)}\n```{local}"
        f"{_distillation(sidecar)}"
    )


def _distillation(sidecar: dict[str, Any]) -> str:
    """What was distilled after `quantize`, as commands; what its recipe asked for is in the recipe."""
    entries = sidecar.get("distillation") or []
    text = ""
    for taught in entries[1 if sidecar["recipe"].get("distill_steps") else 0 :]:
        settings = taught["settings"]
        options = ["steps", "lr", "train", "batch_size", "top_k", "held_back", "samples", "seq_len", "seed"]
        options += ["targets"] if settings["blockwise"] else ["loss"]
        options += ["weight", "gamma"] if settings["loss"] == "dad" else []
        options += ["moves"] if "codes" in settings["train"] else []
        command = ["llmsqueeze", "distill", "FOLDER", "--teacher", str(shown(taught["teacher"]))]
        for key in options:
            value = settings[key]
            command += [f"--{key.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
        command += ["--blockwise"] if settings["blockwise"] else []
        text += (
            f"\n\nThe result (FOLDER) was then distilled on {shown(str(settings['calibration']))}, which brought the "
            f"divergence from the original on held-back text from {taught['kl_before']:.4f} to "
            f"{taught['kl_after']:.4f} nats per token:\n\n```\n{shlex.join(command)}\n```"
        )
    return text


def _calibration(calibration: dict[str, Any] | None) -> str:
    if not calibration:
        return "None: this recipe reads no text."
    text = f"{shown(str(calibration.get('source')))}: {calibration.get('samples')} samples"
    text += f" of {calibration.get('seq_len')} tokens, {calibration.get('tokens') or 0:,} tokens in all."
    return f"{text} SHA-256 of the tokens: `{calibration['sha256']}`" if calibration.get("sha256") else text


def _versions(sidecar: dict[str, Any]) -> str:
    versions = {"llmsqueeze": sidecar.get("llmsqueeze_version"), "format": sidecar.get("format_version")}
    versions |= sidecar.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
