"""What can go wrong through no fault of ours.

    SqueezeError            shown to the user as one line; the command exits with code 2
    +-- RecipeError         an option or recipe key is unknown, of the wrong type, or out of range
    |   +-- BudgetError     the bytes asked for are fewer than the method can do with
    +-- CheckpointError     the model folder cannot be read as it is
    +-- UnsupportedError    a model that llmsqueeze cannot compress, or a folder it does not handle
    +-- CalibrationError    the text cannot serve as calibration or evaluation text
    +-- OutputError         the result cannot be written
    +-- HubError            the Hub cannot be reached, or refuses
    +-- VerificationError   what was written is not what was meant

A message says what was wrong, the value, what is allowed, and the nearest valid choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SqueezeError(Exception):
    """Base of every error that is the input's or the machine's doing; its text goes to the user as it is."""


class RecipeError(SqueezeError):
    """An option or recipe key is unknown, of the wrong type, or out of range."""


class BudgetError(RecipeError):
    """The bytes asked for are fewer than the method can do with."""


class CheckpointError(SqueezeError):
    """The model folder is missing something, damaged, or in a form that is not read."""


class UnsupportedError(SqueezeError):
    """The folder is sound, but not something this command handles."""


class CalibrationError(SqueezeError):
    """The text is empty, too short, or not text."""


class OutputError(SqueezeError):
    """The result cannot be written where it was asked for."""


class HubError(SqueezeError):
    """The Hub cannot be reached, or refuses the request."""


class VerificationError(SqueezeError):
    """What was written, read back, is not what was meant."""


def first_line(error: BaseException) -> str:
    """What an exception says, cut to its first line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `choices`, or nothing when none is close."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
