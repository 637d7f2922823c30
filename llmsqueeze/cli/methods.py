"""The options of `compare --methods`: results of several methods with one budget. What is wrong with them is told
before anything heavy is imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze.cli.options import Overwrite, from_file, with_options, written_to
from llmsqueeze.cli.terminal import Outcome
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.several import settings_of_each

PANEL = "Methods to compare at equal bytes"


def takes_methods(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Gives a command the options of `--methods`; it gets them as `methods`, by the names of `quantize_each`; None if
    no method is named."""
    options = list(inspect.signature(_methods, eval_str=True).parameters.values())
    return with_options(command, options, lambda arguments: _methods(**arguments), "methods")


def _of(text: str, *flags: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=PANEL)


def _methods(
    methods: Annotated[
        str | None, _of("Make a result by each first: gwq,layerwise,mixllm,dbllm,lorc,coded and the other methods.")
    ] = None,
    bits: Annotated[float | None, _of("Average bits per weight of each, everything counted.")] = None,
    size: Annotated[str | None, _of("Budget for all weights of each: 4GB, 900MB.")] = None,
    calibration: Annotated[str | None, _of("Calibration text, as of `quantize`. [WikiText-2 train]")] = None,
    samples: Annotated[int | None, _of("Calibration samples. [128]")] = None,
    recipe: Annotated[str | None, _of("YAML file with what else all of them are to have.")] = None,
    out: Annotated[Path | None, written_to("Folder for their folders. [./<model>-methods]", PANEL)] = None,
    overwrite: Overwrite = False,
) -> dict[str, Any] | None:
    """Raises RecipeError for options that do not go together."""
    more = {"bits": bits, "size": size, "calibration": calibration, "samples": samples, "recipe": recipe, "out": out}
    if methods is None:
        if given := next((name for name, value in more.items() if value is not None), None):
            raise RecipeError(f"--{given} is for --methods, and none is named")
        return None
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise RecipeError("--methods is empty; name methods separated by commas, such as gptq,coded")
    text = {name: more[name] for name in ("calibration", "samples") if more[name] is not None}
    return {
        "settings": settings_of_each(names, bits, size, {**from_file(recipe), **text}),
        "root": out,
        "overwrite": overwrite,
    }
