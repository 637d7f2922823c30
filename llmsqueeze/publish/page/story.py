"""The words of a report: what a folder is in one sentence, how it was made, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llmsqueeze.formats.public import TEXT_SUFFIXES
from llmsqueeze.publish.page import words
from llmsqueeze.publish.page.folder import Folder
from llmsqueeze.publish.page.scores import perplexities
from llmsqueeze.publish.page.words import fixed, number, percent, significant

METHODS = {
    "auto": "what suits what was asked for: coded weights, or a budget on grids",
    "budget": "one budget for the whole model: every row gets the width that lowers the loss most for its bytes",
    "coded": "entropy-coded integers whose steps come from one multiplier for the whole model",
    "descent": "coordinate descent over codes and scales under the second moments of the inputs, from GPTQ's start",
    "gwq": "the weights with the largest loss gradients stay as they are, the others are rounded",
    "layerwise": "important decoder blocks get more bits, the others fewer",
    "mixllm": "the most salient output rows of the whole model get more bits",
    "dbllm": "dual binarization: two planes of bits and two scales for every group of columns",
    "gptq": "error feedback column by column, as published",
    "rtn": "round to nearest",
}


def sentence(folder: Folder) -> str:
    """'demo at 2.70 bits per weight: 4.1× smaller, perplexity +0.47 %'."""
    record, before = folder.record, number(folder.record["nbytes_original"])
    what = f"{record['model']} at {fixed(folder.bits_per_weight, 2)} bits per weight"
    if folder.dense:
        what = f"{record['model']}, compressed and written out again as ordinary weights"
    ratio = before / folder.nbytes if before and folder.nbytes else 1.0
    smaller = "as large as before" if 0.99 < ratio < 1.01 else f"{significant(ratio, 2)}× smaller"
    if ratio <= 0.99:
        smaller = f"{significant(1 / ratio, 2)}× as large as before"
    pair = perplexities(folder)
    return f"{what}: {smaller}, " + (f"perplexity {words.change(*pair)}" if pair else "perplexity not measured yet")


def figures(folder: Folder) -> list[tuple[str, str, str]]:
    """The numbers at the top: what, the number, what it was or means."""
    record, pair = folder.record, perplexities(folder)
    codes, kl = number(record.get("code_bits")), number(folder.evaluation.get("kl_mean"))
    made = [
        ("Size of all weights", words.size(folder.nbytes), f"was {words.size(number(record['nbytes_original']))}"),
        (
            "Bits per weight",
            fixed(folder.bits_per_weight, 2),
            f"codes of {significant(codes)} bits on average" if codes else "",
        ),
    ]
    if pair:
        made.append(("Perplexity", words.perplexity(pair[1]), f"was {words.perplexity(pair[0])}"))
    if kl is not None:
        made.append(("KL divergence", significant(kl), "nats per token, from the original"))
    return made


def how(folder: Folder) -> list[tuple[str, str]]:
    """What was compressed and how, line by line."""
    record, recipe = folder.record, folder.record["recipe"]
    method = str(recipe.get("method"))
    over = f" (rounding: {recipe['quantizer']})" if recipe.get("quantizer") not in (None, method) else ""
    model = str(record["model"]) + (f", revision {record['revision']}" if record.get("revision") else "")
    predicted = number(record.get("predicted_loss_increase"))
    lines = [
        ("Model", model),
        ("Licence", str(record.get("license") or "")),
        ("Method", f"{method}: {METHODS[method]}{over}" if method in METHODS else method),
        ("Asked for", asked_for(recipe)),
        (
            "Compressed",
            f"{words.integer(record['quantized_weights'])} weights in {len(folder.linears):,} linear layers",
        ),
        ("Calibration", calibration(record.get("calibration"))),
        ("Predicted loss", f"{fixed(predicted, 4, sign=True)} nats per token" if predicted is not None else ""),
        *(("Distilled", distilled(about)) for about in distillations(record)),
        ("Format", str(record.get("format", "llmsqueeze"))),
        ("Versions", versions(record)),
    ]
    return [(what, text) for what, text in lines if text]


def asked_for(recipe: Mapping[str, Any]) -> str:
    """The budget, in the words of the recipe."""
    said = [
        f"{recipe['bits']:g} bits" if number(recipe.get("bits")) else "",
        f"{words.size(number(recipe['size']))} for the whole folder" if number(recipe.get("size")) else "",
        f"perplexity at most {percent(recipe['max_ppl_increase'])} up"
        if number(recipe.get("max_ppl_increase"))
        else "",
        f"KL divergence at most {recipe['max_kl']:g}" if number(recipe.get("max_kl")) else "",
        f"groups of {recipe['group_size']} columns" if (number(recipe.get("group_size")) or 0) > 0 else "",
        f"{percent(recipe['outliers'])} outliers" if number(recipe.get("outliers")) else "",
    ]
    return ", ".join(one for one in said if one)


def calibration(about: Any) -> str:
    if not isinstance(about, Mapping):
        return "none: the method reads no text"
    rows = f"{words.integer(about.get('samples'))} samples of {words.integer(about.get('seq_len'))} tokens"
    return f"{about.get('source')}, {rows}"


def distillations(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every one that the folder has been through."""
    found = record.get("distillation")
    return [about for about in found if isinstance(about, dict)] if isinstance(found, list) else []


def later_distillations(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those that its recipe did not ask for."""
    return distillations(record)[1 if record["recipe"].get("distill_steps") else 0 :]


def distilled(about: Mapping[str, Any]) -> str:
    before, after = number(about.get("kl_before")), number(about.get("kl_after"))
    effect = f"KL on held-back text {significant(before)} → {significant(after)} nats per token"
    return f"from {about.get('teacher')}, {effect}"


def distill_command(about: Mapping[str, Any]) -> str:
    """The command that distilled, with every setting that counts for what it did."""
    settings = words.mapping(about.get("settings"))
    loss, blockwise, train = settings.get("loss"), bool(settings.get("blockwise")), str(settings.get("train"))
    left_out = {"blockwise", "calibration", "loss" if blockwise else "targets"}
    left_out |= set() if loss == "dad" else {"weight", "gamma"}
    left_out |= set() if "codes" in train else {"moves"}
    command = ["llmsqueeze", "distill", "FOLDER", "--teacher", str(about.get("teacher"))]
    for key, value in settings.items():
        if key not in left_out and value is not None:
            command += [f"--{key.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    return shlex.join([*command, *(["--blockwise"] if blockwise else [])])


def versions(record: Mapping[str, Any]) -> str:
    known = {"llmsqueeze": record.get("llmsqueeze_version")} | dict(words.mapping(record.get("versions")))
    return ", ".join(f"{name} {version}" for name, version in known.items() if version)


def recipe_yaml(record: Mapping[str, Any]) -> str:
    """The recipe without what it leaves open."""
    import yaml

    said = {key: value for key, value in record["recipe"].items() if value is not None and value != []}
    lines = [  # a list on the line of its key
        yaml.safe_dump({key: value}, default_flow_style=None if isinstance(value, list | dict) else False, width=1000)
        for key, value in said.items()
    ]
    return "".join(lines)


def quantize_command(record: Mapping[str, Any]) -> str:
    command = ["llmsqueeze", "quantize", str(record["model"]), "--recipe", "recipe.yaml"]
    return shlex.join([*command, *(["--revision", str(record["revision"])] if record.get("revision") else [])])


def own_text(record: Mapping[str, Any]) -> str | None:
    """The name of a calibration text that only the maker has."""
    text = str(record["recipe"].get("calibration"))
    return text if text.lower().endswith(TEXT_SUFFIXES) else None
