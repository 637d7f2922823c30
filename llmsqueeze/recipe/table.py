"""A table of options: one pydantic field each, with its check, its help and its default as a person reads it.

The flags of the command line, the check of YAML keys, the help and the tables of the documentation are made from it.
None is an option that was not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmsqueeze.errors import RecipeError, nearest

Check = Callable[[str, Any], Any]
Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name and type.

    check: (name, value) -> the value to keep, or RecipeError. text: its sentence. default: as the help shows it.
    choices: the names that it takes, if it takes names; or a function that lists them, if entries may be added.
    flag: its name on the command line, if that is not made from the field's. choice_flags: choice -> flag and sentence,
    if every choice has a flag of its own. as_text: whether the command line takes any text, whatever the type is.
    repeatable: whether it may be given several times.
    """

    check: Check
    text: str
    default: str = ""
    choices: Choices = ()
    flag: str = ""
    choice_flags: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    as_text: bool = False
    repeatable: bool = False

    @property
    def allowed(self) -> tuple[str, ...]:
        """The names that it takes; () if it takes other values."""
        return self.choices() if callable(self.choices) else self.choices


def option(check: Check, text: str, default: str = "", **more: Any) -> Any:
    """A field of a table; arguments as `Option`."""
    extra: Any = {"option": Option(check, text, default, **more)}
    return Field(default=None, description=text, json_schema_extra=extra)


class Table(BaseModel):
    """Base of the tables: settings that were asked for, checked one by one; all errors are told at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "recipe key"

    @model_validator(mode="before")
    @classmethod
    def _check(cls, settings: Any) -> Any:
        """Values in the form in which they are kept."""
        kept, wrong = {}, []
        for name, value in settings.items():
            try:
                kept[name] = cls.checked(name, value)
            except RecipeError as error:
                wrong.append(str(error))
        if wrong:
            raise ValueError("\n       ".join(wrong))
        return kept

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """One value as it is kept; None stays None. Raises RecipeError."""
        if name not in cls.model_fields:
            names = ", ".join(cls.model_fields)
            raise RecipeError(f"unknown {cls.kind} {name!r}{nearest(name, cls.model_fields)} Known: {names}")
        return None if value is None else cls.option(name).check(name, value)

    @classmethod
    def option(cls, name: str) -> Option:
        extra: Any = cls.model_fields[name].json_schema_extra
        option_: Option = extra["option"]
        return option_

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The table with these settings. Raises RecipeError with everything that is wrong."""
        try:
            return cls(**{str(name): value for name, value in settings.items()})
        except ValidationError as error:
            (first, *_) = error.errors()
            raise RecipeError(str(first["ctx"]["error"])) from error

    @property
    def asked(self) -> dict[str, Any]:
        """The options that were asked for, by name."""
        return {name: value for name, value in self if value is not None}
