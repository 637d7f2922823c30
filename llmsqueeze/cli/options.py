"""Options of the command line that several verbs have, those of a recipe above all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from llmsqueeze.errors import RecipeError

MODEL_HELP = "Hub id, local folder, or 'demo' (the built-in model)"
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:1 ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]

# what `eval` and `compare` measure with
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas; demo_stories is built in.")]
EvaluationText = Annotated[
    str | None, typer.Option(help="Text file or Hub data set for perplexity. [WikiText-2 test, unless --tasks]")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most N windows of text and N documents a task.")]
Window = Annotated[int | None, typer.Option(min=2, help="Window in tokens. [context length, at most 2048]")]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with own lm-eval task definitions.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Batch size for tasks.")]

Text = str | None
Whole = int | None
Real = float | None
Flag = bool | None

OPTIONS: dict[str, Any] = {
    "bits": Annotated[
        Real, typer.Option(help="Width of a code, 2 to 8; for coded, budget and layerwise the average. [3]")
    ],
    "size": Annotated[Text, typer.Option(help="Budget for all weights, embeddings included: 4GB, 900MB.")],
    "method": Annotated[
        Text,
        typer.Option(
            help="descent, coded, budget, auto (coded, or budget where only grids will do), gwq, layerwise, mixllm, "
            "dbllm, gptq or rtn. [descent; auto with a budget]"
        ),
    ],
    "group_size": Annotated[Whole, typer.Option(help="Columns that share a scale; -1: whole rows. [128; dbllm 64]")],
    "symmetric": Annotated[Flag, typer.Option("--symmetric/--asymmetric", help="Grid. [symmetric]")],
    "levels": Annotated[
        Text,
        typer.Option(
            help="integer, half (half-integer, no 0), by-width (half to 2 bits) or dual. [integer; budget by-width]"
        ),
    ],
    "quantizer": Annotated[
        Text, typer.Option(help="For gwq, layerwise, mixllm, budget: descent, gptq or rtn. [descent]")
    ],
    "outliers": Annotated[Real, typer.Option(help="Fraction kept at 16 bits by GWQ's ranking. [gwq 0.01, else 0]")],
    "outlier_ranking": Annotated[
        Text, typer.Option(help="gradient, gradient-weight, gradient-error, magnitude or random. [gradient]")
    ],
    "outlier_scope": Annotated[Text, typer.Option(help="layer (per matrix) or global. [layer]")],
    "importance": Annotated[
        Text,
        typer.Option(
            help="layerwise: lim, zd, random, reverse, first, last, both-ends. mixllm: salience, cost, random, "
            "reverse. budget: cost, uniform. [the first]"
        ),
    ],
    "high_bits": Annotated[Whole, typer.Option(help="Width of important blocks (layerwise) or rows (mixllm). [4; 8]")],
    "low_bits": Annotated[Whole, typer.Option(help="Width of the others. [2; 4]")],
    "high_fraction": Annotated[Real, typer.Option(help="For mixllm: share of rows at the high width. [0.10]")],
    "mix": Annotated[Text, typer.Option(help="For mixllm: shares of rows at several widths, such as 6:0.1,4:0.6.")],
    "per_row": Annotated[bool, typer.Option("--per-row", help="budget gives every row its own width. [default]")],
    "per_linear": Annotated[bool, typer.Option("--per-linear", help="budget gives every linear its own width.")],
    "per_group": Annotated[bool, typer.Option("--per-group", help="budget gives every fusion group its own width.")],
    "widths": Annotated[Text, typer.Option(help="Widths that budget may give. [1,2,3,4,5,6,8]")],
    "group_sizes": Annotated[Text, typer.Option(help="Group sizes that budget may give. [--group-size]")],
    "row_outliers": Annotated[
        Text, typer.Option(help="Shares of a row that budget may keep at 16 bits, such as 0.01.")
    ],
    "dual": Annotated[Flag, typer.Option("--dual", help="budget may also give dual-binary rows (2 bits, two scales).")],
    "portable": Annotated[
        Flag,
        typer.Option(
            "--portable/--native",
            help="Only what compressed-tensors holds, a budget per fusion group; or our own format in any case. "
            "[compressed-tensors where the parts have a place there]",
        ),
    ],
    "pack": Annotated[
        Text, typer.Option(help="rans: store codes entropy-coded, the same weights in fewer bytes. [none]")
    ],
    "code_embeddings": Annotated[
        Flag,
        typer.Option("--code-embeddings", help="coded takes embeddings and head too, and counts them. [as they are]"),
    ],
    "labels": Annotated[
        Text,
        typer.Option(
            help="Labels of the measured loss: model (drawn from it) or text. [coded, budget model, else text]"
        ),
    ],
    "lorc_rank": Annotated[
        Text, typer.Option(help="Rank of a low-rank compensation (LoRC), after any method; auto: bought by budget. [0]")
    ],
    "lorc": Annotated[Text, typer.Option(help="input-weighted, or plain (the paper's). [input-weighted]")],
    "distill_steps": Annotated[
        Whole,
        typer.Option(help="Steps of distillation from the original afterwards (`llmsqueeze distill`). [0]"),
    ],
    "distill_loss": Annotated[Text, typer.Option(help="kd, or dad (the paper's, deviation-aware). [kd]")],
    "max_ppl_increase": Annotated[
        Real, typer.Option(help="The smallest result whose perplexity rises by at most this share, such as 0.02.")
    ],
    "max_kl": Annotated[Real, typer.Option(help="The smallest result whose mean KL (nats) is at most this.")],
    "calibration": Annotated[
        Text,
        typer.Option(help="Text file (txt, jsonl), Hub data set name[:config[:split]], self. [WikiText-2 train]"),
    ],
    "samples": Annotated[Whole, typer.Option(help="Calibration samples. [128]")],
    "seq_len": Annotated[Whole, typer.Option(help="Tokens per sample, at most the context. [2048]")],
    "seed": Annotated[Whole, typer.Option(help="Seed of whatever is random. [0]")],
    "skip": Annotated[list[str] | None, typer.Option(help="Pattern of linears to leave alone; repeatable.")],
    "recipe": Annotated[Text, typer.Option(help="YAML file, or the name of one of `llmsqueeze recipes`; options win.")],
}
GRANULARITIES = ("per_row", "per_linear", "per_group")

DISTILLATION: dict[str, Any] = {
    "steps": Annotated[Whole, typer.Option(help="Steps; with --blockwise for every block. [100; blockwise 200]")],
    "loss": Annotated[Text, typer.Option(help="kd, or dad (the paper's: ambiguous tokens count more). [kd]")],
    "lr": Annotated[Real, typer.Option(help="Learning rate, relative to what is trained. [0.005]")],
    "weight": Annotated[Real, typer.Option(help="For dad: how much ambiguity counts. [1]")],
    "gamma": Annotated[Real, typer.Option(help="For dad: power of the ambiguity. [1]")],
    "train": Annotated[Text, typer.Option(help="Of scales, norms, lowrank, codes. [scales,norms,lowrank]")],
    "batch_size": Annotated[Whole, typer.Option(help="Samples in a step. [4]")],
    "moves": Annotated[Real, typer.Option(help="With codes: share of them that a step may move. [0.01]")],
    "blockwise": Annotated[
        bool, typer.Option("--blockwise", help="Match every block's output in turn: one block in memory.")
    ],
    "targets": Annotated[
        Text, typer.Option(help="With --blockwise: stream (the original's) or inputs (what it makes of ours). [stream]")
    ],
    "top_k": Annotated[Whole, typer.Option(help="How many of the teacher's next tokens are kept. [128]")],
    "held_back": Annotated[Whole, typer.Option(help="Samples to measure on, not trained on. [32]")],
    "calibration": OPTIONS["calibration"],
    "samples": Annotated[Whole, typer.Option(help="Samples to train on. [256]")],
    "seq_len": OPTIONS["seq_len"],
    "seed": OPTIONS["seed"],
}


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """`command(model, given, ...)` as a command with a recipe's options, whose values it gets as the dict `given`."""
    return _with_options(command, OPTIONS)


def takes_distillation(command: Callable[..., None]) -> Callable[..., None]:
    """The same with the options of a distillation."""
    return _with_options(command, DISTILLATION)


def _with_options(command: Callable[..., None], taken: dict[str, Any]) -> Callable[..., None]:
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=False if get_args(kind)[0] is bool else None, annotation=kind)
        for name, kind in taken.items()
    ]
    first, rest = own[0], [p.replace(kind=keyword) for p in own[1:]]

    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in taken}
        command(arguments.pop(first.name), given, **arguments)

    signature = inspect.Signature([first, *options, *rest])
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """Recipe settings from the options as they were given, over those of the recipe that they name."""
    from llmsqueeze.recipe.bundled import find_recipe, read_recipe

    named = [name for name in GRANULARITIES if given[name]]
    if len(named) > 1:
        spoken = " contradicts ".join(f"--{name.replace('_', '-')}" for name in named[:2])
        raise RecipeError(f"{spoken}: what gets a width of its own?")
    settings = {
        key: value for key, value in given.items() if value not in (None, []) and key not in (*GRANULARITIES, "recipe")
    }
    if named:
        settings["granularity"] = named[0].removeprefix("per_")
    base = read_recipe(find_recipe(given["recipe"])) if given["recipe"] else {}
    return base | settings
