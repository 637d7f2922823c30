"""Numbers as text, for the terminal, the pages and the model card.

Sizes are in powers of 1000. A negative number has a real minus sign. An unknown number is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

UNKNOWN = "–"
FACTOR = 3.0  # a perplexity that is this many times the original's is written as a factor, not as a percentage


class Ranking(NamedTuple):
    """What a score of blocks is called, and whether more (1) or less (-1) of it is more important."""

    name: str
    sign: int


RANKINGS = {"lim": Ranking("LIM", 1), "zd": Ranking("ZD", -1)}


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None. JSON from Python may hold NaN and infinities."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def integer(value: Any) -> str:
    """1234567 -> '1,234,567'."""
    number = finite(value)
    return UNKNOWN if number is None else f"{number:,.0f}"


def size(nbytes: float | None) -> str:
    """Bytes with three digits: '428 kB', '1.74 MB'."""
    if nbytes is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} B" if unit == "B" else f"{significant(nbytes)} {unit}"
        nbytes /= 1000
    return f"{significant(nbytes)} TB"


def exact_size(nbytes: int) -> str:
    """'1.07 GB (1,073,741,824 bytes)'."""
    return f"{size(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1000 else f"{nbytes} bytes"


def significant(value: float | None, digits: int = 3) -> str:
    """The number with this many significant digits, never with an exponent."""
    if not value:
        return UNKNOWN if value is None else "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 0.0999 may become 0.10
    return f"{value:,.{min(max(digits - 1 - exponent, 0), 9)}f}".replace("-", "−")


def fixed(value: float | None, decimals: int, sign: bool = False) -> str:
    """The number with this many decimals. `sign`: write the plus sign too."""
    if value is None:
        return UNKNOWN
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    return (text.replace("-", "") if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def percent(share: float | None) -> str:
    """0.0132 -> '1.3 %'."""
    return UNKNOWN if share is None else f"{significant(100 * share, 2)} %"


def shortened(name: str, most: int) -> str:
    """A name of at most `most` letters. The middle is cut, because the ends tell names apart; the part behind the last
    dot or slash stays whole if it fits."""
    if len(name) <= most:
        return name
    leaf = len(name) - max(name.rfind("."), name.rfind("/"))
    end = min(max(most // 2, leaf), most - 1)
    return f"{name[: most - 1 - end]}…{name[len(name) - end :]}"


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def ranked(ranking: str, scores: Sequence[float]) -> list[int]:
    """The numbers of the blocks, the most important first; equal ones in the order of the model."""
    return sorted(range(len(scores)), key=lambda block: -RANKINGS[ranking].sign * scores[block])


def by_score(ranking: str, scores: Sequence[float], most: int | None = None) -> str:
    """'0 (−0.4531), 29 (−0.7120)': the blocks with their scores, the most important first, `most` of them."""
    return ", ".join(f"{block} ({significant(scores[block], 4)})" for block in ranked(ranking, scores)[:most])


def perplexity(value: float | None) -> str:
    """The perplexity with three decimals; with one from 100 on."""
    return UNKNOWN if value is None else fixed(value, 3 if value < 100 else 1)


def change(before: float, after: float) -> str:
    """The change of a perplexity: '+0.47 %', or '12× as high'."""
    if after / before >= FACTOR:
        return f"{significant(after / before, 2)}× as high"
    return f"{fixed(100 * (after / before - 1), 2, sign=True)} %"


def with_error(text: str, error: float | None) -> str:
    """A number and its standard error with as many decimals: '3.200 ± 0.050'. Without an error, the number only."""
    if error is None or text == UNKNOWN:
        return text
    decimals = text.partition(".")[2].partition(" ")[0]
    return f"{text} ± {fixed(error, len(decimals))}"


def with_error_or_dash(text: str, error: float | None) -> str:
    """`with_error`, and a dash in the place of an error that is not known: '15.3000 ± –'."""
    return f"{text} ± {UNKNOWN}" if error is None and text != UNKNOWN else with_error(text, error)


def chance(p: float) -> str:
    """A probability: 'p 0.034', 'p < 0.001'."""
    return "p < 0.001" if p < 0.001 else f"p {significant(p, 2)}"


def code_widths(bits: float) -> str:
    """The width of the codes: 'codes of 3 bits'; of codes of several widths 'codes of 2.21 bits on average'."""
    width = f"codes of {round(bits, 2):g} bits"
    return width if float(bits).is_integer() else f"{width} on average"


def rounded(counts: Mapping[str, int], what: str = "linears") -> str:
    """What is rounded beside the budget, of the numbers in a summary."""
    before = size(counts["nbytes_original"])
    return f"{counts['linears']} {what} at {counts['bits']} bits (rtn), {size(counts['nbytes'])}, were {before}"


def experts(counts: Mapping[str, int]) -> str:
    """How many of the experts' matrices saw few tokens and none, of the counts in a record."""
    few, none = counts["few"], counts["none"]
    seen = f"{few} saw few tokens and are drawn towards the layer's" if few else "none saw few tokens"
    return f"{counts['matrices']} matrices; {seen}" + (f"; {none} saw none and take the layer's" if none else "")
