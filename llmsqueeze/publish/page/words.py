"""Numbers as the pages write them: units, enough digits and no more, a real minus sign, a dash for what is unknown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmsqueeze.formats.public import is_number, shown

UNKNOWN = "–"
TIMES = 3.0  # a perplexity this many times the original's is said as a factor, not as a percentage


def number(value: Any) -> float | None:
    """`value` if it is a finite number; what a file holds may be anything."""
    return float(value) if is_number(value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is one, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def public(name: str) -> str:
    """A name that is the key of a record; `shown` makes only values fit for publication."""
    return str(shown(name))


def integer(value: Any) -> str:
    """1234567 -> '1,234,567'."""
    known = number(value)
    return UNKNOWN if known is None else f"{known:,.0f}"


def size(nbytes: float | None) -> str:
    """Bytes in powers of 1000: '428 kB', '1.74 MB'."""
    if nbytes is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} B" if unit == "B" else f"{significant(nbytes)} {unit}"
        nbytes /= 1000
    return f"{significant(nbytes)} TB"


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` of them, never with an exponent."""
    if not value:
        return UNKNOWN if value is None else "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 0.0999 may become 0.10
    return f"{value:,.{min(max(digits - 1 - exponent, 0), 9)}f}".replace("-", "−")


def fixed(value: float | None, decimals: int, sign: bool = False) -> str:
    """With so many decimals, and a plus if `sign` is wanted."""
    if value is None:
        return UNKNOWN
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    return (text.replace("-", "") if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def percent(share: float | None) -> str:
    """0.0132 -> '1.3 %'."""
    return UNKNOWN if share is None else f"{significant(100 * share, 2)} %"


def perplexity(value: float | None) -> str:
    return UNKNOWN if value is None else fixed(value, 3 if value < 100 else 1)


def change(before: float, after: float) -> str:
    """How a perplexity has changed: '+0.47 %', or '12× as high'."""
    if after / before >= TIMES:
        return f"{significant(after / before, 2)}× as high"
    return f"{fixed(100 * (after / before - 1), 2, sign=True)} %"


def plus_minus(text: str, spread: float | None, decimals: int) -> str:
    """The number with its standard error behind it, where that is known."""
    return f"{text} ± {fixed(spread, decimals)}" if spread is not None and text != UNKNOWN else text


def metrics(values: Any) -> list[str]:
    """The scores among a task's numbers, without what is said beside them."""
    beside = ("_stderr", "_difference")
    return [key for key, value in mapping(values).items() if not key.endswith(beside) and number(value) is not None]


def natural(name: str) -> str:
    """A key by which layers.2 comes before layers.10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(6), name)
