"""The errors that the input or the machine causes.

    SqueezeError            the user sees its text; the command exits with code 2
    +-- RecipeError         an option or recipe key is unknown, of the wrong type, or out of range
    |   +-- BudgetError     the method needs more bytes than the budget has
    +-- CheckpointError     the model folder is incomplete, damaged, or in an unsupported form
    +-- UnsupportedError    the folder is sound, but this command does not support it
    +-- CalibrationError    the text is empty, too short, or not text
    +-- OutputError         the result cannot be written
    +-- HubError            the Hub cannot be reached, or refuses
    +-- VerificationError   the written bytes are not the intended ones
    +-- ProcessError        another process of the run has ended

A message gives the fault, the value, the allowed values, and the nearest valid choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 500  # of what another library says


class SqueezeError(Exception):
    """Base of every error that the input or the machine causes; the user sees its text unchanged."""


class RecipeError(SqueezeError):
    """An option or recipe key is unknown, of the wrong type, or out of range."""


class BudgetError(RecipeError):
    """The method needs more bytes than the budget has."""


class CheckpointError(SqueezeError):
    """The model folder is incomplete, damaged, or in an unsupported form."""


class UnsupportedError(SqueezeError):
    """The folder is sound, but this command does not support it."""


class CalibrationError(SqueezeError):
    """The text is empty, too short, or not text."""


class OutputError(SqueezeError):
    """The result cannot be written."""


class HubError(SqueezeError):
    """The Hub cannot be reached, or refuses the request."""


class VerificationError(SqueezeError):
    """The written bytes, read back, are not the intended ones."""


class ProcessError(SqueezeError):
    """Another process of the run has ended; what the run has done is kept."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
    """What an exception of another library says, in one line: its message, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


@contextmanager
def foreign(kind: type[SqueezeError], what: str, hint: str = "") -> Iterator[None]:
    """Whatever another library raises in the context becomes an error of ours with its reason: `what: reason; hint`."""
    try:
        yield
    except (SqueezeError, MemoryError):
        raise
    except BaseException as error:  # libraries have errors of their own, and new ones with every version
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of those written in Rust
            raise
        if isinstance(error.__cause__, SqueezeError):
            raise error.__cause__ from error
        raise kind(f"{what}: {reason(error)}" + (f"; {hint}" if hint else "")) from error


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `choices`, or an empty string if none is close."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
