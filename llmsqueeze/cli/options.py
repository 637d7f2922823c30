"""The options of the command line: those of a table (recipe/options.py, distillation/options.py), and common ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

from llmsqueeze.cli.terminal import Outcome, keyword, with_parameters
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.methods import methods_of
from llmsqueeze.recipe.options import Asked
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.recipe.table import Table

MODEL_HELP = "Hub id, local folder, GGUF file, or 'demo' (the built-in model)"
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:1 ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's folder.")]
Adapter = Annotated[str | None, typer.Option(help="LoRA adapter (folder or Hub id) to merge into the weights first.")]
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="Merge the LoRA adapter in the model's folder into the weights first.")
]
FromQuantized = Annotated[
    bool,
    typer.Option("--from-quantized", help="Take a model that is quantized already; a GGUF file needs no flag."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a result, but for files that are not llmsqueeze's."),
]
ProfileTime = Annotated[bool, typer.Option("--profile-time", help="Measure the time of each stage of the run.")]
FIRST = "What most runs need"
PANELS = {  # groups of the help -> options of a recipe, in the order of the table
    FIRST: ("method", "bits", "size", "target", "calibration"),
    "Grids": ("group_size", "symmetric", "levels", "search", "quantizer", "inputs"),
    "Outliers, rows and blocks": (
        *("outliers", "outlier_ranking", "outlier_scope", "importance"),
        *("high_bits", "low_bits", "high_fraction", "mix"),
    ),
    "Budgets": (
        *("max_ppl_increase", "max_kl", "granularity", "widths", "group_sizes", "row_outliers", "dual", "labels"),
    ),
    "What is compressed and written": ("skip", "embeddings", "code_embeddings", "vision", "portable", "pack"),
    "After the rounding": ("lorc_rank", "lorc", "distill_steps", "distill_loss"),
    "Text and measurements": (
        *("text_field", "samples", "seq_len", "pack_documents", "seed", "all_experts", "products"),
    ),
}
RECIPE = Annotated[
    str | None,
    typer.Option(
        help="YAML file, or the name of one of `llmsqueeze recipes`; options replace its keys.", rich_help_panel=FIRST
    ),
]
FEW = 4  # methods that the help of an option names; with more, it belongs to most


def written_to(text: str, panel: str | None = None) -> Any:
    """The option `--out`."""
    return typer.Option("--out", "-o", help=text, rich_help_panel=panel)


def takes(table: type[Table]) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Gives a command the options of a table; it gets those that were asked for as the dict `given`."""

    def decorate(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
        options = [parameter for name in table.model_fields for parameter in parameters(table, name)]
        return with_options(command, options, lambda arguments: asked(table, arguments))

    return decorate


def takes_recipe(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Gives a command the options of a recipe and `--recipe`, whose keys they replace; it gets them as `given`."""
    ordered = [(name, panel) for panel, names in PANELS.items() for name in names]
    options = [parameter for name, panel in ordered for parameter in parameters(Asked, name, panel)]

    def collect(arguments: dict[str, Any]) -> dict[str, Any]:
        settings = from_file(arguments.pop("recipe")) | asked(Asked, arguments)
        make_recipe(settings)  # what is wrong is told before anything heavy is imported
        return settings

    return with_options(command, [*options, keyword("recipe", RECIPE, None)], collect)


def from_file(recipe: str | None) -> dict[str, Any]:
    """The settings of a recipe file, or of a bundled recipe. Raises RecipeError."""
    from llmsqueeze.recipe.bundled import find_recipe, read_recipe

    return read_recipe(find_recipe(recipe)) if recipe else {}


def parameters(table: type[Table], name: str, panel: str | None = None) -> list[inspect.Parameter]:
    """The parameters of one option: one, or a flag for each of its choices. panel: its group in the help."""
    option = table.option(name)
    if option.choice_flags:
        prefix = f"{', '.join(methods_of(name))}: "
        flags = option.choice_flags.items()
        return [
            _parameter(f"{name}_{choice}", bool, False, prefix + text, flag, panel) for choice, (flag, text) in flags
        ]
    return [_parameter(name, _kind(table, name), None, help_of(table, name), option.flag, panel)]


def _parameter(name: str, kind: Any, default: Any, text: str, flag: str, panel: str | None) -> inspect.Parameter:
    option = typer.Option(*([flag] if flag else []), help=text, rich_help_panel=panel)
    return keyword(name, Annotated[kind, option], default)


def _kind(table: type[Table], name: str) -> Any:
    """The type of an option on the command line; values of other types are read from text."""
    if table.option(name).repeatable:
        return list[str] | None
    if table.option(name).as_text:
        return str | None
    (first, *others) = [kind for kind in get_args(table.model_fields[name].annotation) if kind is not type(None)] or [
        str
    ]
    return (first if not others and first in (bool, int, float) else str) | None


def help_of(table: type[Table], name: str) -> str:
    """The help of an option: the methods that it belongs to, its sentence, its choices, its default."""
    option, owners = table.option(name), methods_of(name) if table is Asked else ()
    prefix = f"{', '.join(owners)}: " if 0 < len(owners) <= FEW else ""
    unnamed = [choice for choice in option.allowed if choice not in option.text]
    choices = f": {', '.join(option.allowed)}" if unnamed else ""
    return f"{prefix}{option.text}{choices}." + (f" [{option.default}]" if option.default else "")


def asked(table: type[Table], arguments: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of a table out of the arguments of a command; returns those that were asked for, by name."""
    given: dict[str, Any] = {}
    for name in table.model_fields:
        option = table.option(name)
        if option.choice_flags:
            chosen = [choice for choice in option.allowed if arguments.pop(f"{name}_{choice}")]
            if len(chosen) > 1:
                first, second = (option.choice_flags[choice][0] for choice in chosen[:2])
                raise RecipeError(f"{first} contradicts {second}: {option.text[0].lower()}{option.text[1:]}")
            given |= {name: chosen[0]} if chosen else {}
        elif (value := arguments.pop(name)) not in (None, []):
            given[name] = value
    return given


def with_options(
    command: Callable[..., Outcome],
    options: list[inspect.Parameter],
    collect: Callable[[dict[str, Any]], dict[str, Any] | None],
    place: str = "given",
) -> Callable[..., Outcome]:
    """`command` with these options in the place of one of its parameters, into which they are collected."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    at = [parameter.name for parameter in own].index(place)

    def wrapped(**arguments: Any) -> Outcome:
        collected = collect({option.name: arguments.pop(option.name) for option in options})
        return command(**{place: collected}, **arguments)

    return with_parameters(wrapped, command, [*own[:at], *options, *own[at + 1 :]])
