"""The page README.md beside this file, made from the models of the verbs, and what is printed held against them.

`python -m llmsqueeze.cli.schema.markdown` writes the page (`make docs`).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from llmsqueeze.cli.schema import SCHEMA_VERSION
from llmsqueeze.cli.schema.folders import Check, Push, Recipes, Report, Show, Unfinished
from llmsqueeze.cli.schema.runs import Distill, Export, Plan, Quantize
from llmsqueeze.cli.schema.scores import Compare, Eval, Generate
from llmsqueeze.recipe.markdown import table

MODELS: tuple[type[BaseModel], ...] = (
    *(Quantize, Plan, Distill, Export, Eval, Generate, Compare),
    *(Show, Unfinished, Check, Report, Push, Recipes),
)
PAGE = Path(__file__).with_name("README.md")
INTRODUCTION = f"""\
# What the verbs print with `--json`

One JSON object on standard output, with `schema_version` ({SCHEMA_VERSION}) and `verb`. The version is one for all
verbs. It rises if a field goes, or changes its name, type or meaning; a new field does not raise it.

Errors are no JSON: they are a line on standard error, and nothing is printed on standard output. `check`, and `compare`
if a model did not open, print their object and end with exit code 2.

This page is made from the models in this folder (`make docs`), and the tests hold every object against them. Fields
with * are there only in the cases that are named, all others always. Sizes are bytes, times seconds, losses nats per
token.
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "anything"}


def model_for(printed: dict[str, Any]) -> type[BaseModel]:
    """The model of an object that a verb printed. Raises KeyError for a verb that has none."""
    unfinished = printed.get("verb") == "show" and "runs" in printed
    models = {verb_of(model): model for model in MODELS if (model is Unfinished) is unfinished}
    return models[printed["verb"]]


def faults(printed: dict[str, Any]) -> list[str]:
    """What in an object is not as its model says: fields that lack, that are not known, or of another type."""
    try:
        model_for(printed).model_validate(printed)
    except ValidationError as error:
        return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return []


def verb_of(model: type[BaseModel]) -> str:
    """The verb that prints the model."""
    (name,) = typing.get_args(model.model_fields["verb"].annotation)
    return str(name)


def kind_of(annotation: Any) -> str:
    """A type in words."""
    of, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if of in (typing.Union, types.UnionType):
        return " or ".join(map(kind_of, arguments))
    if of is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if of is list:
        return f"list of {kind_of(arguments[0])}"
    if of is dict:
        return f"name -> {kind_of(arguments[1])}"
    return str(NAMES.get(annotation, annotation.__name__))


def parts_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for one in typing.get_args(annotation):
        yield from parts_of(one)


def fields_table(model: type[BaseModel]) -> str:
    """Every field of a model: name, type, sentence."""
    fields = model.model_fields.items()
    rows = [(f"`{n}`{'' if f.is_required() else ' *'}", kind_of(f.annotation), f.description or "") for n, f in fields]
    return table(("field", "type", "meaning"), rows)


def section(model: type[BaseModel], level: int) -> str:
    return f"{'#' * level} {model.__name__}\n\n{model.__doc__}\n\n{fields_table(model)}\n"


def inner_models() -> list[type[BaseModel]]:
    """The models that stand in fields of others, each once."""
    seen: dict[type[BaseModel], None] = {}
    waiting = list(MODELS)
    while waiting:
        fields = waiting.pop(0).model_fields.values()
        found = [part for field in fields for part in parts_of(field.annotation) if part not in seen]
        seen |= dict.fromkeys(found)
        waiting += found
    return list(seen)


def page() -> str:
    """The whole page."""
    verbs = "\n".join(section(model, 2) for model in MODELS)
    inner = "\n".join(section(model, 3) for model in inner_models())
    return f"{INTRODUCTION}\n{verbs}\n## Inside\n\n{inner}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
