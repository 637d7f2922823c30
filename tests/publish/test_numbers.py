"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from llmsqueeze.publish import numbers


@pytest.mark.parametrize(
    ("bits", "text"),
    [(3, "codes of 3 bits"), (3.0, "codes of 3 bits"), (2.214, "codes of 2.21 bits on average")],
)
def test_only_codes_of_several_widths_have_an_average(bits: float, text: str) -> None:
    assert numbers.code_widths(bits) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB")],
)
def test_a_size_has_three_digits_on_both_sides_of_a_unit(nbytes: float | None, text: str) -> None:
    assert numbers.size(nbytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.0999, "0.0999"), (0.09996, "0.100"), (-1.5, "−1.50"), (12345, "12,345")],
)
def test_significant_digits_are_counted_after_rounding(value: float | None, text: str) -> None:
    assert numbers.significant(value) == text


def test_a_number_that_rounds_to_nothing_has_no_sign() -> None:
    assert numbers.fixed(-0.0004, 2) == "0.00"
    assert numbers.fixed(-0.04, 2) == "−0.04"
    assert numbers.fixed(0.04, 2, sign=True) == "+0.04"


def test_a_perplexity_of_three_times_is_a_factor() -> None:
    assert numbers.change(4.0, 4.1) == "+2.50 %"
    assert numbers.change(4.0, 12.0) == "3.0× as high"


def test_only_finite_numbers_are_numbers() -> None:
    assert [numbers.finite(value) for value in (1, True, "1", math.nan, math.inf)] == [1.0, None, None, None, None]
