"""The model card: what a compressed folder is, what it costs, how to load it, how to make it again.

Everything in it is read from the folder (`llmsqueeze.json`, `config.json`, `evaluation.json`, and the licence
lines of a README.md that is already there). A card is public, so whatever could name the maker's disk is cut
to its last component: `shown`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from llmsqueeze.errors import CheckpointError, UnsupportedError
from llmsqueeze.files import EVALUATION, SIDECAR, read_json, read_json_if_there
from llmsqueeze.snippets import how_to_load

MARK = "<!-- Written by llmsqueeze: `llmsqueeze push` writes this file anew. -->"
SCORES = {"perplexity": "Perplexity", "kl_mean": "KL divergence, mean", "kl_p99": "KL, 99th percentile"}
LICENSE_KEYS = ("license", "license_name", "license_link")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".md", ".gz", ".zst", ".raw")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# how a path on a disk begins; a lone backslash does not count, skip patterns may hold one
ROOT = r"(?:file://)?(?:~[\w.-]*/|\.{1,2}/|/(?=\S)|[A-Za-z]:[\\/]|\\\\\w)"
LOCAL_PATH = re.compile(ROOT + ".*", re.DOTALL)
# the folders of a path inside a longer text; the double slash of a URL is none
INNER_FOLDERS = re.compile(rf"(?<![\w/\\.~*-])(?!//){ROOT}(?:[^\s/\\'\"]+[/\\])*")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")

# the keys of the sidecar that a card cannot do without
NEEDED: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "recipe": dict,
    "bits_per_weight": (int, float),
    "quantized_weights": int,
    "nbytes": int,
    "nbytes_original": int,
}


def model_card(directory: Path, repo: str | None = None) -> str:
    """The README.md text for a compressed folder; `repo` is the Hub id to load it from, when it has one.

    Raises UnsupportedError for a folder without `llmsqueeze.json`, CheckpointError for a damaged one.
    """
    sidecar = read_sidecar(directory)
    name = repo or directory.resolve().name
    sections = [
        f"---\n{_yaml(_front_matter(directory, sidecar))}---",
        MARK,
        f"# {name.rpartition('/')[2]}",
        _what(sidecar),
        *how_to_load(name, sidecar.get("format", "llmsqueeze")),
        "## Size",
        _sizes(directory, sidecar),
        "## Scores",
        _scores(directory, sidecar, name),
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


def shown(value: Any) -> Any:
    """`value` fit for publication: every local path in it as its last component, Hub tokens blanked."""
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if not isinstance(value, str):
        return value
    text = TOKEN.sub("hf_...", value)
    is_file = "://" not in text and text.lower().endswith(TEXT_SUFFIXES) and not re.search(r"\s", text)
    if is_file or LOCAL_PATH.fullmatch(text):
        # Windows rules split at both kinds of slash
        return PureWindowsPath(text).name
    return INNER_FOLDERS.sub("", text)


def _front_matter(directory: Path, sidecar: dict[str, Any]) -> dict[str, Any]:
    """The card's metadata; the licence is copied from the sidecar or the README.md there, never made up."""
    model = str(sidecar["model"])
    front: dict[str, Any] = {}
    if _is_hub_id(model):
        front |= {"base_model": model, "base_model_relation": "quantized"}
    known = {key: sidecar[key] for key in LICENSE_KEYS if sidecar.get("license") and sidecar.get(key)}
    front |= shown(known or license_of(directory))
    return front | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmsqueeze", "quantized"],
    }


def license_of(directory: Path) -> dict[str, Any]:
    """The licence lines in the front matter of a model folder's README.md; empty when it has none to read."""
    import yaml

    try:
        text = (directory / "README.md").read_text(encoding="utf-8-sig")
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}
    if not isinstance(metadata, dict) or not metadata.get("license"):
        return {}
    return {key: metadata[key] for key in LICENSE_KEYS if metadata.get(key)}


def _is_hub_id(model: str) -> bool:
    return HUB_ID.fullmatch(model) is not None


def _what(sidecar: dict[str, Any]) -> str:
    model = str(sidecar["model"])
    link = f"[{model}](https://huggingface.co/{model})" if _is_hub_id(model) else f"`{shown(model)}`"
    revision = f" (revision `{shown(sidecar['revision'])}`)" if sidecar.get("revision") else ""
    return (
        f"This is {link}{revision} with the weights of its linear layers compressed by llmsqueeze "
        f"to {sidecar['bits_per_weight']:.2f} bits per weight."
    )


def _sizes(directory: Path, sidecar: dict[str, Any]) -> str:
    before, after = int(sidecar["nbytes_original"]), int(sidecar["nbytes"])
    share = f" ({100 * after / before:.1f} % of the original)" if before else ""
    quantization = read_json(directory / "config.json").get("quantization_config") or {}
    rows = [
        ("All weights", human_bytes(before), human_bytes(after) + share),
        ("Bits per weight, everything counted", "", f"{sidecar['bits_per_weight']:.2f}"),
        *([("Bits per code, on average", "", f"{sidecar['code_bits']:.2f}")] if "code_bits" in sidecar else []),
        ("Quantized linear layers", "", f"{len(quantization.get('weights') or {}):,}"),
    ]
    return (
        f"{_table(('', 'Original', 'This model'), rows)}\n\n"
        f"Bits per weight counts everything stored for the {sidecar['quantized_weights']:,} weights of the "
        "quantized linear layers: codes, scales, zero points, outliers and their positions. The layers that "
        "stay as they were (embeddings, norms and the like) count in the bytes, not in the bits per weight."
    )


def human_bytes(count: int) -> str:
    """`count` in decimal units (1 GB = 10^9 bytes), with the exact number beside it."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit} ({count:,} bytes)"
    return f"{count} bytes"


def _scores(directory: Path, sidecar: dict[str, Any], name: str) -> str:
    """The table of scores before and after, or the command that measures what is not known."""
    path = directory / EVALUATION
    evaluation = read_json_if_there(path)
    command = shlex.join(["llmsqueeze", "eval", name, "--baseline", str(shown(sidecar["model"]))])
    rows = _score_rows(evaluation)
    if not rows:
        return f"Not measured yet. This command measures them, before and after:\n\n```\n{command}\n```"
    before = evaluation.get("baseline") or {}
    lines = [_table(("", "Original", "This model"), rows), "\n\n"]
    if evaluation.get("text"):
        count, other = evaluation.get("tokens"), before.get("tokens")
        tokens = f", {count:,} tokens" if count else ""
        tokens += f" ({other:,} for the original)" if other and other != count else ""
        lines.append(f"Text: {shown(evaluation['text'])}{tokens}. ")
    lines.append(
        "Lower is better for perplexity and for the KL divergence from the original's predictions "
        "(nats per token). ± is one standard error."
    )
    if not before:
        lines.append(f"\n\nThe original was not measured; this command does:\n\n```\n{command}\n```")
    return "".join(lines)


def _score_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, before, after; what was not measured of this model has no row."""
    before = evaluation.get("baseline") or {}
    rows = [
        (label, _number(before.get(key)), _number(evaluation[key]))
        for key, label in SCORES.items()
        if _is_number(evaluation.get(key))
    ]
    for task, metrics in (evaluation.get("tasks") or {}).items():
        old = (before.get("tasks") or {}).get(task) or {}
        rows += [
            (f"{task} {metric}", _with_error(old, metric), _with_error(metrics, metric))
            for metric, value in metrics.items()
            if _is_number(value) and not metric.endswith("_stderr")
        ]
    return rows


def _with_error(metrics: dict[str, Any], metric: str) -> str:
    error = metrics.get(f"{metric}_stderr")
    return _number(metrics.get(metric)) + (f" ± {_number(error)}" if _is_number(error) else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else "–"


def _recipe(sidecar: dict[str, Any]) -> str:
    recipe = sidecar["recipe"]
    command = ["llmsqueeze", "quantize", str(shown(sidecar["model"])), "--recipe", "recipe.yaml"]
    if sidecar.get("revision"):
        command += ["--revision", str(sidecar["revision"])]
    local, text = "", str(shown(recipe.get("calibration")))
    if text.lower().endswith(TEXT_SUFFIXES):
        local = f"\n\nIt needs the calibration text `{text}`, a file of the maker's that is not part of this repo."
    return (
        f"`recipe.yaml`:\n\n```yaml\n{_yaml(shown(recipe))}```\n\n"
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


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, (":--", *["--:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
