"""The words of a report: the folder in one sentence, and how it was compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmsqueeze.formats.record import experts
from llmsqueeze.publish import numbers
from llmsqueeze.publish.folder import Folder, mapping
from llmsqueeze.publish.numbers import finite, fixed, percent, significant
from llmsqueeze.publish.provenance import calibration, versions
from llmsqueeze.publish.scores import best_known, perplexities
from llmsqueeze.recipe.methods import METHODS


def sentence(folder: Folder) -> str:
    """'demo at 2.70 bits per weight: 4.1× smaller, perplexity +0.47 %'."""
    model, before = folder.record["model"], folder.nbytes_original
    subject = f"{model} at {fixed(folder.bits_per_weight, 2)} bits per weight"
    if folder.dense:
        subject = f"{model}, compressed and then exported as ordinary weights"
    ratio = before / folder.nbytes if before and folder.nbytes else 1.0
    smaller = "as large as before" if 0.99 < ratio < 1.01 else f"{significant(ratio, 2)}× smaller"
    if ratio <= 0.99:
        smaller = f"{significant(1 / ratio, 2)}× as large as before"
    evaluation = best_known(folder.evaluation)
    both = perplexities(evaluation)
    perplexity = f"perplexity {numbers.change(*both)}{part(evaluation)}" if both else "perplexity not measured yet"
    return f"{subject}: {smaller}, {perplexity}"


def part(evaluation: Mapping[str, Any]) -> str:
    """' (limit 40)' if the scores are of a part of the data."""
    limit = finite(evaluation.get("limit"))
    return "" if limit is None else f" (limit {limit:g})"


def figures(folder: Folder) -> list[tuple[str, str, str]]:
    """The numbers at the top: label, number, and its earlier value or its unit."""
    evaluation = best_known(folder.evaluation)
    both = perplexities(evaluation)
    codes, divergence = finite(folder.record.get("code_bits")), finite(evaluation.get("kl_mean"))
    width = numbers.code_widths(codes) if codes else ""
    rows = [
        ("Size of all weights", numbers.size(folder.nbytes), f"was {numbers.size(folder.nbytes_original)}"),
        ("Bits per weight", fixed(folder.bits_per_weight, 2), width),
    ]
    if both:
        rows.append(("Perplexity", numbers.perplexity(both[1]), f"was {numbers.perplexity(both[0])}{part(evaluation)}"))
    if divergence is not None:
        rows.append(("KL divergence", significant(divergence), f"nats per token, from the original{part(evaluation)}"))
    return rows


def history(folder: Folder) -> list[tuple[str, str]]:
    """How the folder was compressed: label and text of each line."""
    record, recipe = folder.record, folder.recipe
    predicted = finite(record.get("predicted_loss_increase"))
    lines = [
        ("Model", str(record["model"]) + (f", revision {record['revision']}" if record.get("revision") else "")),
        ("Licence", str(record.get("license") or "")),
        ("Method", method(recipe)),
        ("Budget", budget(recipe)),
        ("Compressed", f"{numbers.integer(folder.weights)} weights in {len(folder.linears):,} linear layers"),
        ("Other towers", f"{len(folder.towers):,} linear layers at 8 bits" if folder.towers else ""),
        ("Embeddings, head", folder.ends[0].parts if folder.ends else ""),
        ("Calibration", calibration(folder)),
        ("Experts", numbers.experts(counts) if (counts := experts(mapping(record.get("tokens")))) else ""),
        ("Predicted loss", f"{fixed(predicted, 4, sign=True)} nats per token" if predicted is not None else ""),
        *(("Distilled", distilled(one)) for one in folder.distillations),
        ("Format", folder.format),
        ("Versions", versions(folder)),
    ]
    return [(label, text) for label, text in lines if text]


def method(recipe: Mapping[str, Any]) -> str:
    """The method, its sentence, and the rounding if it has another name."""
    name, rounding = str(recipe.get("method")), recipe.get("quantizer")
    over = f" (rounding: {rounding})" if rounding not in (None, name) else ""
    return f"{name}: {METHODS[name].report}{over}" if name in METHODS else name


def budget(recipe: Mapping[str, Any]) -> str:
    """The limits in the recipe, in words."""
    limits = {key: finite(recipe.get(key)) or 0.0 for key in BUDGET}
    return ", ".join(BUDGET[key](limit) for key, limit in limits.items() if limit > 0)


BUDGET: dict[str, Callable[[float], str]] = {
    "bits": lambda bits: f"{bits:g} bits",
    "size": lambda nbytes: f"{numbers.size(nbytes)} for the whole folder",
    "max_ppl_increase": lambda share: f"perplexity at most {percent(share)} up",
    "max_kl": lambda limit: f"KL divergence at most {limit:g}",
    "group_size": lambda columns: f"groups of {columns:g} columns",
    "outliers": lambda share: f"{percent(share)} outliers",
}


def distilled(distillation: Mapping[str, Any]) -> str:
    """The teacher of a distillation and its effect."""
    before, after = finite(distillation.get("kl_before")), finite(distillation.get("kl_after"))
    effect = f"KL on held-back text {significant(before)} → {significant(after)} nats per token"
    return f"from {distillation.get('teacher')}, {effect}"
