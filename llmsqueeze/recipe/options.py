"""The options of a recipe: flags of `quantize` and `plan`, and the keys of recipe files."""

from __future__ import annotations

from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.methods import METHODS, importances, method_names, rounding_methods
from llmsqueeze.recipe.table import Choices, Table, option
from llmsqueeze.recipe.values import (
    bits,
    boolean,
    choice,
    field,
    flag,
    fraction,
    group_size,
    group_sizes,
    mix,
    nbytes,
    number,
    one_width,
    patterns,
    rank,
    shares,
    text,
    whole,
    widths,
)


def one_of(names: Choices, text: str, default: str = "", **more: Any) -> Any:
    """An option that takes one of some names."""

    def check(key: str, value: Any) -> str:
        key = str(more.get("flag", key)).removeprefix("--")
        return choice(names() if callable(names) else names)(key, value)

    return option(check, text, default, choices=names, **more)


def method(key: str, value: Any) -> str:
    """A check for the name of a method; a ranking is told which method it belongs to."""
    if value in importances() and value not in method_names():
        owner = next(name for name in method_names() if value in METHODS[name].importance)
        raise RecipeError(f"{flag(key)} {value} is no method but a ranking: --method {owner} --importance {value}")
    return choice(method_names())(key, value)


class Asked(Table):
    """What the user asked for: one field per option; None is not asked for. `resolve.py` makes a `Recipe` of it."""

    method: str | None = option(
        method, "How to compress", "descent; auto if a budget is asked for", choices=method_names
    )
    bits: int | float | None = option(
        bits,
        "A whole number: the width of the codes; a method that mixes widths gets the bytes of codes of that width. "
        "With a decimal point (2.7, 3.0): the average over the compressed weights, everything counted",
        "3; if neither method nor size is named, 4 if that fits the memory here",
    )
    target: str | None = one_of(
        ("transformers", "vllm", "llama.cpp", "smallest"),
        "Set method and format by what is to open the result",
        "transformers, if they can represent it",
        flag="--for",
    )
    size: int | None = option(
        nbytes, "Budget for all weights of the folder, embeddings included: 4GB, 900MB", as_text=True
    )
    max_ppl_increase: float | None = option(
        number(1e-6, 10.0), "Find the smallest result whose perplexity rises by at most this share, such as 0.02"
    )
    max_kl: float | None = option(
        number(1e-6, 10.0), "Find the smallest result whose mean KL divergence (nats) is at most this"
    )
    group_size: int | None = option(
        group_size, "Columns that share a scale; -1: whole rows", "128; 64 or 32 if 128 does not divide the columns"
    )
    symmetric: bool | None = option(
        boolean,
        "Symmetric grid; --asymmetric: each group has a zero point of its own",
        "symmetric",
        flag="--symmetric/--asymmetric",
    )
    levels: str | None = one_of(
        ("integer", "half", "by-width", "dual"),
        "integer; half: half-integer, no 0; by-width: half up to 2 bits; dual: two scales, 2 bits",
        "integer; budget by-width",
    )
    search: bool | None = option(
        boolean, "Search the scales that lower the error most", "on for descent, else off", flag="--search/--no-search"
    )
    quantizer: str | None = one_of(rounding_methods, "How the weights are rounded", "descent")
    inputs: str | None = one_of(
        ("original", "sequential", "corrected"),
        "Inputs that a linear is fitted to: of the original model; of the compressed blocks before it; the same with a "
        "target corrected for the difference",
        "corrected; gptq sequential",
    )
    outliers: float | None = option(
        fraction(0.5), "Share of the weights that stay at 16 bits, by `--outlier-ranking`", "gwq 0.01, else 0"
    )
    outlier_ranking: str | None = one_of(
        ("gradient", "gradient-weight", "gradient-error", "magnitude", "random"), "Ranking of the outliers", "gradient"
    )
    outlier_scope: str | None = one_of(("layer", "global"), "Rank per matrix, or over the model", "layer")
    importance: str | None = one_of(importances, "Ranking of blocks or rows", "the first of the method")
    high_bits: int | None = option(whole(2, 8), "Width of the important blocks or rows", "layerwise 4, else 8")
    low_bits: int | None = option(whole(1, 8), "Width of the others", "layerwise 2, else 4")
    high_fraction: float | None = option(fraction(1.0), "Share of the rows at the high width", "0.10")
    mix: Any = option(mix, "Shares of the rows at several widths: 6:0.1,4:0.6")
    granularity: str | None = one_of(
        ("row", "linear", "group"),
        "Unit that gets a width of its own",
        "row; with --portable group",
        choice_flags={
            "row": ("--per-row", "Every row gets a width of its own. [default]"),
            "linear": ("--per-linear", "Every linear gets a width of its own."),
            "group": ("--per-group", "Every fusion group gets a width of its own. [default with --portable]"),
        },
    )
    widths: Any = option(widths, "Widths that the budget may give", "1,2,3,4,5,6,8")
    group_sizes: Any = option(group_sizes, "Group sizes that the budget may give", "--group-size")
    row_outliers: Any = option(shares, "Shares of a row that the budget may keep at 16 bits: 0.005,0.01")
    dual: bool | None = option(boolean, "The budget may give dual-binary rows (2 bits, two scales)", flag="--dual")
    portable: bool | None = option(
        boolean,
        "Only what compressed-tensors can represent; or our own format in any case",
        "compressed-tensors if it can represent the result",
        flag="--portable/--native",
    )
    pack: str | None = one_of(("rans", "none"), "rans: store the codes entropy-coded, in fewer bytes", "none")
    code_embeddings: bool | None = option(
        boolean,
        "Code embeddings and head too, and count them in the budget",
        "they stay; --for smallest codes them",
        flag="--code-embeddings/--no-code-embeddings",
    )
    embeddings: int | None = option(
        one_width((8, 4)), "Round embeddings and head to this many bits, beside the budget of bits: 8 or 4", "they stay"
    )
    all_experts: bool | None = option(
        boolean, "While moments are taken, every token goes to all experts", "where it is routed", flag="--all-experts"
    )
    vision: str | None = one_of(
        ("dense", "rtn8"),
        "Linears of a multimodal model's other towers and projectors: as they are, or rounded to 8 bits by rtn",
        "dense",
    )
    labels: str | None = one_of(
        ("model", "text"), "Labels of the measured loss: drawn from the model, or the text", "coded, budget model; text"
    )
    lorc_rank: int | str | None = option(
        rank, "Rank of the low-rank compensation (LoRC) after any method; auto: bought by the budget", "0"
    )
    lorc: str | None = one_of(
        ("input-weighted", "plain"), "Low-rank compensation weighted by the inputs, or the paper's", "input-weighted"
    )
    distill_steps: int | None = option(whole(0), "Optimizer steps of distillation from the original afterwards", "0")
    distill_loss: str | None = one_of(("kd", "dad"), "kd, or dad (the paper's, deviation-aware)", "kd")
    calibration: str | None = option(
        text,
        "Text: file (txt, jsonl, json, csv, parquet, arrow; .gz), folder of datasets, Hub data set "
        "name[:config[:split]], several with shares (a.jsonl:0.7,b.txt:0.3), or self: the model generates it",
        "WikiText-2 train",
    )
    text_field: str | None = option(
        field, "Field of the rows that has the text or the chat", "messages, text and others by their names"
    )
    samples: int | None = option(whole(1), "Calibration samples", "128")
    seq_len: int | None = option(whole(2), "Tokens in a sample, at most the context", "2048")
    pack_documents: bool | None = option(
        boolean,
        "Samples go on from document to document; --no-pack: each is the beginning of one, unpadded",
        "packed",
        flag="--pack-documents/--no-pack",
    )
    seed: int | None = option(whole(0, 2**63 - 1), "Seed of everything random", "0")
    products: str | None = one_of(
        ("auto", "float32", "bfloat16"),
        "What the linears multiply in while the model is run; auto: bfloat16 if that is clearly faster here",
        "auto",
    )
    skip: Any = option(patterns, "Name pattern of linears to leave alone; repeatable", repeatable=True)
