"""Checks of single values: (option, value from YAML or the command line) -> the value to keep, or RecipeError."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from llmsqueeze.errors import RecipeError, nearest

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def flag(key: str) -> str:
    """An option as the command line names it: '--group-size'."""
    return "--" + key.replace("_", "-")


def whole(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    """A check for whole numbers from `low` to `high`."""

    def check(key: str, value: Any) -> int:
        allowed = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        if isinstance(value, bool) or not isinstance(value, int):
            raise RecipeError(f"{flag(key)} must be {allowed}, not {value!r}")
        if value < low or (high is not None and value > high):
            raise RecipeError(f"{flag(key)} is {value}; it must be {allowed}")
        return value

    return check


def rank(key: str, value: Any) -> int | str:
    """A whole number, or auto."""
    if value == "auto":
        return "auto"
    try:
        integer = _integer(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{flag(key)} is {value!r}; it must be a whole number from 0, or auto") from error
    return whole(0)(key, integer)


def one_width(allowed: Sequence[int]) -> Callable[[str, Any], int]:
    """A check for one of some widths."""

    def check(key: str, value: Any) -> int:
        if isinstance(value, bool) or value not in allowed:
            raise RecipeError(f"{flag(key)} is {value!r}; choose from {', '.join(map(str, allowed))}")
        return int(value)

    return check


def number(low: float, high: float) -> Callable[[str, Any], float]:
    """A check for numbers from `low` to `high`."""

    def check(key: str, value: Any) -> float:
        if not _is_number(value) or not low <= value <= high:
            raise RecipeError(f"{flag(key)} is {value!r}; it must be a number from {low:g} to {high:g}")
        return float(value)

    return check


def choice(allowed: Sequence[str]) -> Callable[[str, Any], str]:
    """A check for one of some names."""

    def check(key: str, value: Any) -> str:
        if value not in allowed:
            hint = nearest(str(value), allowed)
            raise RecipeError(f"unknown {flag(key)} {value!r}{hint or ';'} choose from {', '.join(allowed)}")
        return str(value)

    return check


def several(allowed: Sequence[str]) -> Callable[[str, Any], tuple[str, ...]]:
    """A check for some of these names, as a list or with commas between them; in the order in which they are known."""

    def check(key: str, value: Any) -> tuple[str, ...]:
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else list(value)
        chosen = {choice(allowed)(key, item) for item in items}
        return tuple(name for name in allowed if name in chosen)

    return check


def bits(key: str, value: Any) -> int | float:
    """A width, if it is a whole number; an average, if it is written with a decimal point."""
    number = _number(value)
    if number is None or not 1 <= number <= 8:
        shown = f"{number}" if number is not None else repr(value)
        raise RecipeError(
            f"{flag(key)} is {shown}; it must be a number from 1 to 8: a whole number is the width of the codes, "
            "one with a decimal point the average bits per weight"
        )
    return number


def _number(value: Any) -> int | float | None:
    """A number, given as one or as text; None if it is neither."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return int(text) if re.fullmatch(r"[+-]?\d{1,9}", text) else float(text)
        except ValueError:
            return None
    return value if _is_number(value) else None


def nbytes(key: str, value: Any) -> int:
    """A number of bytes: 4GB, 900 MB, 3.5GiB, or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    unit = match[2].upper() if match else ""
    if isinstance(value, bool) or not match or (unit and unit not in UNITS):
        raise RecipeError(f"{flag(key)} is {value!r}; write it as 4GB, 900MB or 3.5GiB, or as a number of bytes")
    count = round(min(float(match[1]), 1e30) * UNITS[unit or "B"])
    if not count:
        raise RecipeError(f"{flag(key)} is {value!r}; it must be more than nothing")
    return count


def group_size(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise RecipeError(f"{flag(key)} is {value!r}; it must be a positive number of columns, or -1 for whole rows")
    return value


def fraction(high: float) -> Callable[[str, Any], float]:
    """A check for fractions up to `high`."""

    def check(key: str, value: Any) -> float:
        if not _is_number(value) or not 0 <= value <= high:
            raise RecipeError(
                f"{flag(key)} is {value!r}; it must be a fraction from 0 to {high:g}, such as 0.01 for 1 %"
            )
        return float(value)

    return check


def mix(key: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Width -> fraction of the rows, as a mapping or as '6:0.1,4:0.6'; widest first."""
    pairs: Any = list(value.items()) if isinstance(value, dict) else value
    if isinstance(value, str):
        pairs = [item.partition(":")[::2] for item in value.split(",") if item.strip()]
    wrong = RecipeError(f"{flag(key)} is {value!r}; write width:fraction pairs, such as 6:0.1,4:0.6")
    if not isinstance(pairs, list) or not pairs:
        raise wrong
    try:
        fractions = {_integer(width): float(share) for width, share in pairs}
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    if len(fractions) < len(pairs):
        raise RecipeError(f"{flag(key)} is {value!r}: it names a width twice")
    for width, share in fractions.items():
        whole(2, 8)(f"{key} width", width)
        fraction(1.0)(f"{key} fraction", share)
    if sum(fractions.values()) > 1 + 1e-9:
        raise RecipeError(f"{flag(key)} gives away {sum(fractions.values()):g} of the rows; at most 1 is there")
    return tuple(sorted(fractions.items(), reverse=True))


def widths(key: str, value: Any) -> tuple[int, ...]:
    """Widths as a list or as '2,3,4'."""
    try:
        integers = sorted({_integer(item) for item in _items(value)})
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{flag(key)} is {value!r}; write widths from 1 to 8, such as 2,3,4") from error
    if not integers or integers[0] < 1 or integers[-1] > 8:
        raise RecipeError(f"{flag(key)} is {value!r}; write widths from 1 to 8, such as 2,3,4")
    return tuple(integers)


def group_sizes(key: str, value: Any) -> tuple[int, ...]:
    """Group sizes as a list or as '64,128'."""
    try:
        return tuple(sorted({group_size(key, _integer(item)) for item in _items(value)}))
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{flag(key)} is {value!r}; write numbers of columns, such as 64,128") from error


def shares(key: str, value: Any) -> tuple[float, ...]:
    """Fractions as a list or as '0.005,0.01'."""
    try:
        return tuple(sorted({fraction(0.5)(key, float(item)) for item in _items(value)} - {0.0}))
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{flag(key)} is {value!r}; write fractions, such as 0.005,0.01") from error


def boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{flag(key)} must be true or false, not {value!r}")
    return value


def text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{flag(key)} must be the name of a file or data set, not {value!r}")
    return value


def field(key: str, value: Any) -> str:
    """A check for the name of a field."""
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{flag(key)} must be the name of a field, not {value!r}")
    return value


def patterns(key: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise RecipeError(f"{flag(key)} must be a list of name patterns such as '*.o_proj', not {value!r}")
    return tuple(items)


def _items(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _integer(value: Any) -> int:
    """A whole number, written as one or as text; ValueError for any other."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(value)
    return int(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e300 < value < 1e300 and math.isfinite(value)
