"""The model card: what the folder is, its size and scores, how to load it, how to make it again, its limits.

All facts come from the folder. A card is public, so it has no local paths and no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.formats.public import is_hub_id, shown
from llmsqueeze.formats.record import LICENSE_KEYS, license_of
from llmsqueeze.publish import card_scores
from llmsqueeze.publish.card_scores import table
from llmsqueeze.publish.folder import Folder, mapping, read_public
from llmsqueeze.publish.numbers import exact_size, finite, fixed, integer, significant
from llmsqueeze.publish.provenance import (
    calibration,
    distill_command,
    later_distillations,
    own_text,
    quantize_command,
    recipe_yaml,
    versions,
)
from llmsqueeze.publish.scores import limited
from llmsqueeze.publish.snippets import how_to_load, programs

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

STORED = ("safetensors", "pytorch", "tf", "jax", "onnx", "gguf")
MARK = "<!-- Written by llmsqueeze: `llmsqueeze push` writes this file again. -->"


def model_card(path: Path, repo: str | None = None, check: Mapping[str, Any] | None = None) -> str:
    """The README.md text for the folder at `path`.

    `repo`: its id on the Hub, if it has one. `check`: the result of `llmsqueeze check`; without it the card does not
    say which programs open the folder.

    Raises UnsupportedError for a folder without `llmsqueeze.json`, CheckpointError for a damaged one.
    """
    folder = read_public(path)
    name = repo or folder.name
    short = name.rpartition("/")[2]
    sections = [
        f"---\n{metadata(folder, short).to_yaml()}\n---",
        MARK,
        f"# {short}",
        _introduction(folder),
        *how_to_load(name, folder.format),
        "## Size",
        _sizes(folder),
        "## Scores",
        card_scores.scores(folder, name),
        *card_scores.comparison(folder),
        "## Limits",
        _limits(folder, shown(dict(check or {}))),
        "## Recipe",
        _recipe(folder),
        "## Calibration",
        _calibration(folder),
        "## Versions",
        versions(folder),
    ]
    return "\n\n".join(sections) + "\n"


def metadata(folder: Folder, name: str) -> ModelCardData:
    """The card's metadata. The licence is that of the record or of the README.md in the folder, never a guess;
    language, data sets, tags and the base are those of the original's card."""
    from huggingface_hub import ModelCardData

    record, model = folder.record, str(folder.record["model"])
    recorded = {key: record[key] for key in LICENSE_KEYS if record.get("license") and record.get(key)}
    values: dict[str, Any] = dict(recorded or shown(license_of(folder.checkpoint.path)))
    card = dict(mapping(record.get("card")))
    values |= {key: card[key] for key in ("language", "datasets", "base_model") if card.get(key)}
    if is_hub_id(model):
        values |= {"base_model": model, "base_model_relation": "quantized"}
    if results := card_scores.eval_results(folder):
        values |= {"model_name": name, "eval_results": results}
    return ModelCardData(
        # the Hub's page shows the code of this library; transformers alone would fill our format with random values
        library_name="llmsqueeze" if folder.format == "llmsqueeze" else "transformers",
        pipeline_tag=str(card.get("pipeline_tag") or "text-generation"),
        tags=list(dict.fromkeys(["llmsqueeze", "quantized", *_tags(folder), *_tags_of(card)])),
        **values,
    )


def _tags_of(card: Mapping[str, Any]) -> list[str]:
    """The tags of the original's card, but for those that say how its weights are stored."""
    tags = card.get("tags")
    return [tag for tag in tags if isinstance(tag, str) and tag not in STORED] if isinstance(tags, list) else []


def _tags(folder: Folder) -> list[str]:
    """The format and the width of the codes, if there are codes."""
    bits = finite(folder.record.get("code_bits")) or finite(folder.recipe.get("bits"))
    if folder.format == "dense" or bits is None:
        return []
    return [*([folder.format] if folder.format != "llmsqueeze" else []), f"{round(bits, 2):g}-bit"]


def _introduction(folder: Folder) -> str:
    model, revision = str(folder.record["model"]), folder.record.get("revision")
    link = f"[{model}](https://huggingface.co/{model})" if is_hub_id(model) else f"`{model}`"
    at = f" (revision `{revision}`)" if revision else ""
    return (
        f"This is {link}{at}. llmsqueeze compressed the weights of its linear layers "
        f"to {fixed(folder.bits_per_weight, 2)} bits per weight."
    )


def _sizes(folder: Folder) -> str:
    before, after = int(folder.nbytes_original or 0), folder.nbytes
    share = f" ({100 * after / before:.1f} % of the original)" if before else ""
    codes = finite(folder.record.get("code_bits"))
    rows = [
        ("All weights", exact_size(before), exact_size(after) + share),
        ("Bits per weight, everything counted", "", fixed(folder.bits_per_weight, 2)),
        *([("Bits per code, on average", "", significant(codes))] if codes else []),
        *([("Quantized linear layers", "", f"{len(folder.linears):,}")] if folder.linears else []),
        *([("Linear layers of other towers, at 8 bits", "", f"{len(folder.towers):,}")] if folder.towers else []),
        *([("Embeddings and head", "", folder.ends[0].parts)] if folder.ends else []),
    ]
    return (
        f"{table(('', 'Original', 'This model'), rows)}\n\n"
        f"The bits per weight count all data of the {folder.weights:,} weights in the quantized linear layers: codes, "
        f"scales, zero points, outliers and their positions. The other layers ({folder.unchanged}) are unchanged. They "
        "count in the bytes, but not in the bits per weight."
    )


def _limits(folder: Folder, check: Mapping[str, Any]) -> str:
    """The programs that open the folder, and what was not measured."""
    lines = programs(folder.format, mapping(check.get("verdicts")))
    lines += [f"{note[:1].upper()}{note[1:]}." for note in check.get("notes") or []]
    if text := mapping(folder.record.get("calibration")).get("source"):
        lines.append(f"Calibrated on {text}. The quality in other languages and domains was not measured.")
    measured = card_scores.measured_on(folder)
    if measured:
        lines.append(f"Measured only on {'; '.join(measured)}.")
    else:
        part = " but on a part of the data" if limited(folder.evaluation) else ""
        lines.append(f"Its quality was not measured{part}.")
    lines.append("The limits and the biases of the original remain.")
    return "\n".join(f"- {line}" for line in lines)


def _recipe(folder: Folder) -> str:
    text = (
        f"`recipe.yaml`:\n\n```yaml\n{recipe_yaml(folder.recipe)}```\n\n"
        f"With that file, this command makes the model again:\n\n```\n{quantize_command(folder)}\n```"
    )
    if calibration_text := own_text(folder):
        text += f"\n\nIt needs the calibration text `{calibration_text}`, which is not part of this repository."
    for one in later_distillations(folder):
        source = mapping(one.get("settings")).get("calibration")
        before, after = (significant(finite(one.get(key))) for key in ("kl_before", "kl_after"))
        text += (
            f"\n\nThe result (FOLDER) was then distilled on {source}. On held-back text, the divergence from the "
            f"original went from {before} to {after} nats per token:\n\n```\n{distill_command(one)}\n```"
        )
    return text


def _calibration(folder: Folder) -> str:
    values = folder.record.get("calibration")
    if not isinstance(values, Mapping):
        return "None: this recipe reads no text."
    text = f"{calibration(folder)}, {integer(values.get('tokens'))} tokens in all."
    return f"{text} SHA-256 of the tokens: `{values['sha256']}`" if values.get("sha256") else text
