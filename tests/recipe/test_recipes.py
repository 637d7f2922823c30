"""Recipes: what single values may be, what contradicts what, what a method implies, and the ones that come along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmsqueeze.allocation.plan import recipe_grid
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.bundled import bundled_recipes, describe_recipes, find_recipe, read_recipe, recipe_name
from llmsqueeze.recipe.methods import METHODS, rounding_methods
from llmsqueeze.recipe.options import Asked
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import fitted, make_recipe


def message(**settings: Any) -> str:
    """What make_recipe says against these settings."""
    with pytest.raises(RecipeError) as caught:
        make_recipe(settings)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- single values

GOOD = [
    ("bits", 2, 2),
    ("bits", 8, 8),
    ("bits", 3.0, 3.0),
    ("bits", "3", 3),
    ("bits", "3.0", 3.0),
    ("bits", 2.75, 2.75),
    ("size", "4GB", 4_000_000_000),
    ("size", "900MB", 900_000_000),
    ("size", "3.5GiB", 3_758_096_384),
    ("size", " 12 kb ", 12_000),
    ("size", "1.5 MiB", 1_572_864),
    ("size", "2kib", 2048),
    ("size", "0.002TB", 2_000_000_000),
    ("size", "123456B", 123_456),
    ("size", "123456", 123_456),
    ("size", 123_456, 123_456),
    ("group_size", 1, 1),
    ("group_size", -1, -1),
    ("widths", "4,2,3", (2, 3, 4)),
    ("widths", [8, 1, 8], (1, 8)),
    ("widths", " 2, 3", (2, 3)),
    ("group_sizes", "128,64,64", (64, 128)),
    ("group_sizes", [-1, 32], (-1, 32)),
    ("row_outliers", "0.01,0.005", (0.005, 0.01)),
    ("row_outliers", [0, 0.01], (0.01,)),
    ("max_ppl_increase", 1, 1.0),
    ("max_kl", 0.05, 0.05),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("samples", 1, 1),
    ("seq_len", 2, 2),
    ("skip", "*.o_proj", ("*.o_proj",)),
    ("skip", ["a", "b"], ("a", "b")),
    ("calibration", "my text.txt", "my text.txt"),
    ("search", False, False),
    ("symmetric", True, True),
]


@pytest.mark.parametrize(("key", "given", "kept"), GOOD, ids=str)
def test_a_good_value_is_kept_in_one_form(key: str, given: Any, kept: Any) -> None:
    value = Asked.of({key: given}).asked[key]
    assert value == kept
    assert type(value) is type(kept)


BAD = [
    ("bits", 0.5, "from 1 to 8"),
    ("bits", 9, "from 1 to 8"),
    ("bits", "three", "'three'"),
    ("bits", True, "True"),
    ("bits", float("nan"), "nan"),
    ("size", "4 GBB", "'4 GBB'"),
    ("size", "GB", "4GB, 900MB or 3.5GiB"),
    ("size", "-4GB", "'-4GB'"),
    ("size", True, "True"),
    ("size", [4], "write it as"),
    ("size", "0.2B", "more than nothing"),
    ("size", float("inf"), "inf"),
    ("group_size", 0, "-1 for whole rows"),
    ("group_size", -2, "--group-size is -2"),
    ("group_size", "128", "'128'"),
    ("outliers", 0.6, "from 0 to 0.5"),
    ("outliers", -0.1, "such as 0.01 for 1 %"),
    ("high_bits", 1, "from 2 to 8"),
    ("high_bits", 4.0, "whole number"),
    ("low_bits", 0, "from 1 to 8"),
    ("low_bits", 9, "--low-bits is 9"),
    ("high_fraction", 1.1, "from 0 to 1"),
    ("mix", "6", "width:fraction"),
    ("mix", {}, "width:fraction"),
    ("mix", "6:x", "width:fraction"),
    ("mix", [6, 0.1], "width:fraction"),
    ("mix", {9: 0.1}, "--mix width is 9"),
    ("mix", {1: 0.1}, "--mix width is 1"),
    ("mix", {6: 1.5}, "--mix fraction is 1.5"),
    ("mix", "6:nan", "--mix fraction is nan"),
    ("mix", "6:0.7,4:0.7", "1.4 of the rows"),
    ("widths", "0,3", "from 1 to 8"),
    ("widths", [9], "from 1 to 8"),
    ("widths", "", "from 1 to 8"),
    ("widths", 3, "such as 2,3,4"),
    ("widths", "2.5,3", "such as 2,3,4"),
    ("widths", [2.5, 3], "such as 2,3,4"),
    ("group_sizes", "0", "positive number of columns"),
    ("group_sizes", "big", "such as 64,128"),
    ("group_sizes", [64.5], "such as 64,128"),
    ("row_outliers", "0.9", "from 0 to 0.5"),
    ("row_outliers", 0.01, "such as 0.005,0.01"),
    ("portable", "yes", "true or false"),
    ("distill_steps", -1, "whole number from 0"),
    ("symmetric", 1, "true or false"),
    ("search", "no", "true or false"),
    ("max_ppl_increase", 0, "from 1e-06 to 10"),
    ("max_kl", 11, "from 1e-06 to 10"),
    ("calibration", " ", "file or data set"),
    ("calibration", 5, "file or data set"),
    ("samples", 0, "whole number from 1"),
    ("samples", 8.0, "whole number"),
    ("seq_len", 1, "from 2"),
    ("seed", -1, "--seed is -1"),
    ("seed", 2**63, "from 0"),
    ("skip", 3, "*.o_proj"),
    ("skip", ["a", 3], "*.o_proj"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD, ids=str)
def test_a_bad_value_is_refused_with_what_is_allowed(key: str, value: Any, expected: str) -> None:
    text = message(**{key: value})
    assert expected in text
    assert "--" + key.replace("_", "-") in text


NASTY = [None, True, False, 0, -1, 10**400, 0.5, float("nan"), float("inf"), "", "x", "9" * 400, [], [[]], {}, {1: 2}]
NASTY += [[float("inf")], {float("inf"): 0.1}, {"x": None}, [None], b"3", (3,)]


@pytest.mark.parametrize("key", Asked.model_fields)
def test_no_value_of_any_kind_crashes(key: str) -> None:
    """Whatever a YAML file may hold: a recipe comes of it, or a RecipeError that says why not."""
    for value in NASTY:
        try:
            recipe = make_recipe({key: value})
        except RecipeError as error:
            assert str(error)  # noqa: PT017 - either is right
        else:
            assert isinstance(recipe, Recipe)


def test_a_width_named_twice_in_a_mix_is_refused() -> None:
    """One of the two shares would be lost without a word."""
    assert "6" in message(method="mixllm", mix="6:0.1,6:0.2")


def test_a_mix_is_kept_widest_first() -> None:
    wanted = ((8, 0.01), (6, 0.1), (4, 0.5))
    assert make_recipe({"method": "mixllm", "bits": 3, "mix": "4:0.5,8:0.01,6:0.1"}).mix == wanted
    assert make_recipe({"method": "mixllm", "bits": 3, "mix": {4: 0.5, "8": 0.01, 6: 0.1}}).mix == wanted


CHOICES = {name: Asked.option(name).allowed for name in Asked.model_fields if Asked.option(name).allowed}


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_names_the_nearest_and_all_others(key: str) -> None:
    right = CHOICES[key][-1]
    text = message(**{key: right + "x"})
    assert f"did you mean '{right}'" in text
    assert all(choice in text for choice in CHOICES[key])
    assert "choose from" in message(**{key: "qqqqqqq"})
    assert "choose from" in message(**{key: ["a", "list"]})


def test_an_unknown_key_names_the_nearest_and_all_known() -> None:
    text = message(grup_size=64)
    assert "unknown recipe key 'grup_size'; did you mean 'group_size'?" in text
    assert all(key in text for key in Asked.model_fields)
    assert "did you mean" not in message(qqqqqqq=1)


def test_all_wrong_values_are_said_at_once() -> None:
    text = message(method="gptqq", bits=11, grup_size=64, seed=-1, samples=4)
    for problem in ("'gptq'", "bits is 11", "'group_size'", "--seed is -1"):
        assert problem in text
    assert len(text.splitlines()) == 4


def test_all_contradictions_are_said_at_once() -> None:
    text = message(method="rtn", quantizer="gptq", outliers=0.01, widths="2,3", granularity="row")
    assert len(text.splitlines()) == 4


def test_none_stands_for_the_default() -> None:
    assert make_recipe(dict.fromkeys(Asked.model_fields)) == make_recipe({})


# ----------------------------------------------------------------------------------------------- contradictions

PORTABLE = {"method": "budget", "bits": 3, "portable": True}
CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"method": "rtn", "quantizer": "gptq"}, "--quantizer gptq", "--method rtn"),
    ({"method": "descent", "outliers": 0.01}, "--outliers 0.01", "--method descent"),
    ({"method": "gwq", "importance": "lim"}, "--importance lim", "--method gwq"),
    ({"method": "budget", "bits": 3, "high_bits": 4}, "--high-bits 4", "--method budget"),
    ({"method": "budget", "bits": 3, "low_bits": 2}, "--low-bits 2", "--method budget"),
    ({"method": "layerwise", "high_fraction": 0.1}, "--high-fraction", "--method layerwise"),
    ({"method": "layerwise", "mix": "6:0.1"}, "--mix 6:0.1", "--method layerwise"),
    ({"method": "mixllm", "granularity": "row"}, "--per-row", "--method mixllm"),
    ({"method": "mixllm", "widths": "2,3"}, "--widths 2,3", "--method mixllm"),
    ({"method": "layerwise", "group_sizes": "64,128"}, "--group-sizes", "--method layerwise"),
    ({"method": "gwq", "row_outliers": "0.01"}, "--row-outliers", "--method gwq"),
    ({"method": "gwq", "max_ppl_increase": 0.02}, "--max-ppl-increase", "--method gwq"),
    ({"method": "mixllm", "max_kl": 0.02}, "--max-kl", "--method mixllm"),
    ({"method": "budget", "bits": 3, "row_outliers": "0.01", "outliers": 0.02}, "--row-outliers", "--outliers 0.02"),
    ({"method": "budget", "bits": 3, "group_size": 64, "group_sizes": "64,128"}, "--group-size 64", "--group-sizes"),
    ({"method": "budget", "bits": 3, "importance": "uniform", "granularity": "row"}, "uniform", "--per-row"),
    ({"method": "mixllm", "portable": True}, "--portable", "--method mixllm"),
    ({"method": "gwq", "portable": True}, "--portable", "--method gwq"),
    (PORTABLE | {"outliers": 0.01}, "--portable", "outliers"),
    (PORTABLE | {"row_outliers": "0.01"}, "--portable", "outliers"),
    (PORTABLE | {"granularity": "row"}, "--portable", "--per-row"),
    (PORTABLE | {"granularity": "linear"}, "--portable", "--per-linear"),
    (PORTABLE | {"symmetric": False}, "--portable", "--asymmetric"),
    (PORTABLE | {"levels": "half"}, "--portable", "--levels half"),
    ({"method": "budget", "bits": 3, "size": "1GB"}, "--bits 3", "--size"),
    ({"method": "budget", "bits": 3, "max_kl": 0.1}, "--bits 3", "--max-kl 0.1"),
    ({"method": "budget", "max_ppl_increase": 0.02, "max_kl": 0.1}, "--max-ppl-increase 0.02", "--max-kl 0.1"),
    ({"method": "layerwise", "bits": 3, "size": "1GB"}, "--bits 3", "--size"),
    ({"method": "mixllm", "bits": 4.4, "size": "1GB"}, "--bits 4.4", "--size"),
    ({"method": "mixllm", "importance": "lim"}, "--importance lim", "--method mixllm"),
    ({"method": "layerwise", "importance": "salience"}, "--importance salience", "--method layerwise"),
    ({"method": "budget", "bits": 3, "importance": "zd"}, "--importance zd", "--method budget"),
    ({"method": "layerwise", "low_bits": 4, "high_bits": 4}, "--low-bits 4", "--high-bits 4"),
    ({"method": "mixllm", "low_bits": 6, "high_bits": 4}, "--low-bits 6", "--high-bits 4"),
    ({"bits": 3, "levels": "half", "symmetric": False}, "--levels half", "--asymmetric"),
    ({"method": "budget", "bits": 3, "levels": "half", "outliers": 0.01}, "--levels half", "--outliers 0.01"),
    ({"method": "budget", "bits": 3, "levels": "integer", "widths": "1"}, "--levels integer", "width 1 of --widths"),
    (PORTABLE | {"widths": "1,2"}, "--portable", "width 1 of --widths"),
    ({"method": "gwq", "bits": 1}, "--bits 1", "--method gwq"),
    ({"method": "mixllm", "bits": 4.4, "mix": "8:0.1"}, "--mix 8:0.1", "--bits 4.4"),
    ({"method": "mixllm", "bits": 4.4, "high_fraction": 0.1}, "--high-fraction 0.1", "--bits 4.4"),
    ({"method": "mixllm", "bits": 3, "low_bits": 4}, "--bits 3", "--low-bits 4"),
    ({"method": "mixllm", "size": "1GB", "high_fraction": 0.2}, "--high-fraction", "--size"),
    ({"method": "mixllm", "size": "1GB", "mix": "8:0.1"}, "--mix", "--size"),
    ({"method": "mixllm", "mix": "6:0.1", "high_fraction": 0.3}, "--mix", "--high-fraction"),
    ({"method": "mixllm", "mix": "6:0.1", "high_bits": 5}, "--mix", "--high-bits"),
    ({"method": "mixllm", "levels": "half"}, "--levels half", "--method mixllm"),
    ({"method": "layerwise", "low_bits": 1, "outliers": 0.01}, "--low-bits 1", "--outliers 0.01"),
    ({"method": "layerwise", "low_bits": 1, "portable": True}, "--portable", "--low-bits 1"),
    ({"method": "gwq", "levels": "half"}, "--levels half", "--outliers 0.01"),
    ({"method": "dbllm", "bits": 3}, "--bits 3", "--method dbllm"),
    ({"method": "dbllm", "levels": "half"}, "--levels half", "--method dbllm"),
    ({"method": "dbllm", "symmetric": False}, "--asymmetric", "dual"),
    ({"levels": "dual"}, "--levels dual", "--bits 2"),
    ({"method": "dbllm", "portable": True}, "--portable", "--method dbllm"),
    ({"bits": 2.5, "dual": True, "portable": True}, "--portable", "--dual"),
    ({"method": "descent", "dual": True}, "--dual", "--method descent"),
    ({"method": "budget", "bits": 3, "levels": "dual"}, "--levels dual", "--method budget"),
    ({"lorc_rank": "auto", "bits": 2.5, "lorc": "plain"}, "--lorc-rank auto", "--lorc plain"),
    ({"max_kl": 0.1, "distill_steps": 5}, "--distill-steps 5", "bound"),
]
# asked for, and without a word ignored before
UNFOLLOWED: list[tuple[dict[str, Any], str, str]] = [
    ({"bits": 2.5, "outlier_ranking": "magnitude"}, "--outlier-ranking magnitude", "--outliers"),
    ({"method": "gwq", "outliers": 0.0, "outlier_scope": "global"}, "--outlier-scope global", "--outliers"),
    ({"method": "rtn", "outlier_scope": "global"}, "--outlier-scope global", "--method rtn"),
    ({"distill_loss": "dad"}, "--distill-loss dad", "--distill-steps"),
    ({"lorc": "plain"}, "--lorc plain", "--lorc-rank"),
    ({"method": "layerwise", "labels": "model"}, "--labels model", "--method layerwise"),
    ({"method": "rtn", "inputs": "original"}, "--inputs original", "--quantizer rtn"),
    ({"method": "rtn", "samples": 8}, "--samples 8", "--method rtn"),
    ({"method": "rtn", "calibration": "x.txt"}, "--calibration x.txt", "--method rtn"),
]


@pytest.mark.parametrize(("settings", "one", "other"), CONTRADICTIONS + UNFOLLOWED, ids=str)
def test_options_that_exclude_each_other_are_both_named(settings: dict[str, Any], one: str, other: str) -> None:
    text = message(**settings)
    assert one in text
    assert other in text
    assert len(text.splitlines()) == 1, "and nothing else is told"


@pytest.mark.parametrize("other", [{"symmetric": False}, {"outliers": 0.01}], ids=str)
def test_one_bit_has_half_integer_levels_only(other: dict[str, Any]) -> None:
    assert "contradicts width 1 of --widths" in message(method="budget", bits=2, widths="1", **other)


CODED: dict[str, Any] = {"method": "coded", "bits": 2.5}
ONLY_ON_GRIDS: list[tuple[dict[str, Any], str]] = [
    ({"widths": "2,3"}, "--widths 2,3"),
    ({"granularity": "row"}, "--per-row"),
    ({"levels": "half"}, "--levels half"),
    ({"importance": "cost"}, "--importance cost"),
    ({"dual": True}, "--dual"),
    ({"row_outliers": "0.01"}, "--row-outliers 0.01"),
    ({"group_sizes": "64"}, "--group-sizes 64"),
    ({"group_size": 64}, "--group-size 64"),
    ({"group_size": 128}, "--group-size 128"),  # the default, but asked for
    ({"symmetric": False}, "--asymmetric"),
    ({"quantizer": "gptq"}, "--quantizer gptq"),
    ({"pack": "rans"}, "--pack rans"),
]


@pytest.mark.parametrize(("settings", "option"), ONLY_ON_GRIDS, ids=str)
def test_coded_weights_have_no_grid(settings: dict[str, Any], option: str) -> None:
    assert f"{option} does not apply to --method coded" in message(**CODED, **settings)
    assert make_recipe({"bits": 2.5, **settings}).method == "budget", "without a method, the one that can follow it"


def test_coded_weights_are_native() -> None:
    assert "--portable contradicts --method coded" in message(**CODED, portable=True)
    assert "--lorc-rank auto contradicts --method coded" in message(**CODED, lorc_rank="auto")
    assert "choose from descent, gptq, rtn" in message(method="gwq", quantizer="coded")


def test_a_budget_is_asked_for_and_which_there_are_is_told() -> None:
    for settings in ({"method": "auto"}, {"method": "coded"}, {"method": "budget"}, {"granularity": "row"}):
        text = message(**settings)
        assert all(word in text for word in ("--bits 2.7", "--size 4GB", "--max-ppl-increase", "--max-kl"))


# ------------------------------------------------------------------------------------------------ what is implied

IMPLIED: list[tuple[dict[str, Any], str]] = [
    ({}, "descent"),
    ({"bits": 3}, "descent"),
    ({"bits": 3.0}, "coded"),
    ({"bits": 2.7}, "coded"),
    ({"size": "4GB"}, "coded"),
    ({"max_ppl_increase": 0.02}, "coded"),
    ({"max_kl": 0.05}, "coded"),
    ({"bits": 3, "granularity": "linear"}, "budget"),
    ({"bits": 3, "widths": "2,3,4"}, "budget"),
    ({"bits": 3, "portable": True}, "descent"),
    ({"bits": 2.7, "portable": True}, "budget"),
    ({"size": "4GB", "portable": True}, "budget"),
    ({"size": "4GB", "group_size": 64}, "budget"),
    ({"size": "4GB", "group_size": 128}, "budget"),
    ({"bits": 3, "code_embeddings": True}, "coded"),
    ({"bits": 3, "portable": False}, "descent"),
    ({"bits": 2.7, "portable": False}, "coded"),
    ({"bits": 2.7, "outliers": 0.001}, "coded"),
    ({"bits": 2.7, "lorc_rank": 2}, "coded"),
    ({"bits": 2.7, "importance": "uniform"}, "budget"),
    ({"bits": 2.7, "levels": "integer"}, "budget"),
    ({"bits": 2.7, "quantizer": "rtn"}, "budget"),
    ({"bits": 2.7, "group_size": 64}, "budget"),
    ({"bits": 2.7, "symmetric": False}, "budget"),
    ({"bits": 2.7, "lorc_rank": "auto"}, "budget"),
    ({"bits": 2.7, "pack": "rans"}, "budget"),
    ({"bits": 2.7, "pack": "none"}, "budget"),
    ({"method": "auto", "bits": 3}, "coded"),
    ({"method": "auto", "bits": 3, "dual": True}, "budget"),
    ({"bits": 2.7, "method": "layerwise"}, "layerwise"),
    ({"size": "4GB", "method": "mixllm"}, "mixllm"),
]


@pytest.mark.parametrize(("settings", "method"), IMPLIED, ids=str)
def test_the_method_goes_without_saying(settings: dict[str, Any], method: str) -> None:
    assert make_recipe(settings).method == method


LAYERWISE: dict[str, Any] = {"method": "layerwise"}
BUDGET: dict[str, Any] = {"method": "budget"}
MIXLLM: dict[str, Any] = {"method": "mixllm"}
FILLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"bits": 3, "quantizer": "descent", "inputs": "corrected", "search": True, "symmetric": True}),
    ({}, {"levels": "integer", "outliers": 0.0, "labels": "text", "importance": ""}),
    ({"method": "rtn"}, {"quantizer": "rtn", "inputs": "original", "search": False}),
    ({"method": "gptq"}, {"quantizer": "gptq", "inputs": "sequential", "search": False}),
    ({"method": "gptq", "search": True, "inputs": "original"}, {"search": True, "inputs": "original"}),
    ({"method": "gwq"}, {"quantizer": "descent", "outliers": 0.01, "symmetric": True}),
    ({"method": "gwq", "outliers": 0.0}, {"outliers": 0.0}),
    ({"method": "gwq", "quantizer": "rtn"}, {"quantizer": "rtn", "inputs": "original"}),
    (LAYERWISE, {"bits": 3, "importance": "lim", "low_bits": 2, "high_bits": 4, "levels": "integer"}),
    (LAYERWISE | {"bits": 4.3}, {"low_bits": 2, "high_bits": 4}),
    (LAYERWISE | {"bits": 5}, {"low_bits": 4, "high_bits": 8}),
    (LAYERWISE | {"high_bits": 3}, {"low_bits": 2, "high_bits": 3}),
    (LAYERWISE | {"size": "1GB"}, {"bits": None, "size": 10**9, "low_bits": 2, "high_bits": 4}),
    (MIXLLM, {"bits": None, "low_bits": 4, "high_bits": 8, "mix": ((8, 0.10),)}),
    (MIXLLM, {"symmetric": False, "importance": "salience", "quantizer": "descent"}),
    (MIXLLM | {"bits": 3}, {"low_bits": 3, "bits": None}),
    (MIXLLM | {"bits": 4.4}, {"low_bits": 4, "high_bits": 8, "mix": (), "bits": 4.4}),
    (MIXLLM | {"high_fraction": 0.0}, {"mix": ((8, 0.0),)}),
    (MIXLLM | {"high_bits": 6, "high_fraction": 0.2}, {"mix": ((6, 0.2),)}),
    (MIXLLM | {"low_bits": 3, "mix": "4:0.6,6:0.1"}, {"mix": ((6, 0.1), (4, 0.6)), "high_bits": 6, "low_bits": 3}),
    (MIXLLM | {"size": "1GB"}, {"size": 10**9, "mix": (), "low_bits": 4, "high_bits": 8}),
    ({"bits": 2.5}, {"levels": "", "granularity": "", "widths": (), "importance": "", "search": False}),
    ({"bits": 2.5}, {"quantizer": "coded", "inputs": "corrected", "labels": "model"}),
    (BUDGET | {"bits": 2.5}, {"levels": "by-width", "granularity": "row", "widths": (1, 2, 3, 4, 5, 6, 8)}),
    (BUDGET | {"bits": 2.5}, {"importance": "cost", "labels": "model", "symmetric": True, "quantizer": "descent"}),
    ({"bits": 2.5, "symmetric": False}, {"levels": "integer", "widths": (2, 3, 4, 5, 6, 8)}),
    (BUDGET | {"bits": 2.5, "outliers": 0.01}, {"levels": "integer", "widths": (2, 3, 4, 5, 6, 8)}),
    ({"bits": 2.5, "levels": "integer", "widths": "2,3"}, {"widths": (2, 3)}),
    ({"bits": 2.5, "portable": True}, {"granularity": "group", "levels": "integer", "widths": (2, 3, 4, 5, 6, 8)}),
    ({"bits": 2.5, "labels": "text"}, {"labels": "text"}),
]


@pytest.mark.parametrize(("settings", "expected"), FILLED, ids=str)
def test_what_is_open_is_filled_in(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = make_recipe(settings)
    assert {key: getattr(recipe, key) for key in expected} == expected


@pytest.mark.parametrize("method", ["layerwise", "mixllm"])
@pytest.mark.parametrize("key", ["low_bits", "high_bits", "bits"])
def test_the_low_width_is_below_the_high_one_whichever_was_named(method: str, key: str) -> None:
    """The one that was left open makes room, or the width is refused; two equal ones would be no mix at all."""
    for width in range(2, 9):
        try:
            recipe = make_recipe({"method": method, key: width})
        except RecipeError as error:
            assert f"bits {width}" in str(error)  # noqa: PT017 - either is right
        else:
            assert recipe.low_bits < recipe.high_bits, f"{key} {width}"


BUDGETS: list[tuple[dict[str, Any], float | None]] = [
    ({"bits": 3}, None),
    ({"method": "gwq", "bits": 3}, None),
    ({"bits": 2.7}, 2.7),
    ({"method": "budget", "bits": 3}, None),
    ({"method": "budget", "bits": 3.0}, 3.0),
    ({"size": "4GB"}, None),
    ({"max_kl": 0.1}, None),
    (LAYERWISE, None),
    (LAYERWISE | {"bits": 3.0}, 3.0),
    (LAYERWISE | {"size": "1GB"}, None),
    (MIXLLM, None),
    (MIXLLM | {"bits": 4}, None),
    (MIXLLM | {"bits": 4.4}, 4.4),
]


def test_a_whole_number_of_bits_is_a_width_whether_portable_or_not() -> None:
    for settings in ({"bits": 2}, {"bits": 2, "portable": True}, {"bits": 2, "portable": False}):
        recipe = make_recipe(settings)
        assert (recipe.method, recipe.code_bits, recipe.average_bits) == ("descent", 2, None)
    assert make_recipe({"method": "coded", "bits": 3}).budget_width == 3
    assert make_recipe({"method": "mixllm", "bits": 3}).budget_width is None, "the width of the low rows"


@pytest.mark.parametrize(("settings", "bits"), BUDGETS, ids=str)
def test_bits_with_a_decimal_point_are_an_average(settings: dict[str, Any], bits: float | None) -> None:
    """A whole number is a width, whatever the method and the format."""
    assert make_recipe(settings).average_bits == bits


NEEDS: list[tuple[dict[str, Any], bool, bool]] = [
    ({"method": "rtn"}, False, False),
    ({"method": "gptq"}, True, False),
    ({"method": "gwq", "quantizer": "rtn"}, True, True),
    ({"method": "gwq", "quantizer": "rtn", "outlier_ranking": "magnitude"}, False, False),
    ({"method": "gwq", "quantizer": "rtn", "outliers": 0.0}, False, False),
    (LAYERWISE | {"quantizer": "rtn", "importance": "zd"}, False, False),
    (LAYERWISE | {"quantizer": "rtn", "importance": "random"}, False, False),
    (LAYERWISE | {"quantizer": "rtn", "importance": "lim"}, True, False),
    (LAYERWISE | {"quantizer": "rtn", "importance": "reverse"}, True, False),
    (MIXLLM | {"quantizer": "rtn"}, True, True),
    (MIXLLM | {"quantizer": "rtn", "importance": "reverse"}, True, True),
    (MIXLLM | {"quantizer": "rtn", "importance": "cost"}, True, True),
    (MIXLLM | {"quantizer": "rtn", "importance": "random"}, False, False),
    ({"bits": 2.5, "quantizer": "rtn"}, True, True),
    ({"bits": 2.5, "quantizer": "rtn", "importance": "uniform"}, False, False),
]


@pytest.mark.parametrize(("settings", "text", "gradients"), NEEDS, ids=str)
def test_text_and_gradients_are_wanted_only_where_something_needs_them(
    settings: dict[str, Any], text: bool, gradients: bool
) -> None:
    recipe = make_recipe(settings)
    assert (recipe.needs_text, recipe.needs_gradients) == (text, gradients)


@pytest.mark.parametrize(
    "settings",
    [LAYERWISE | {"low_bits": 1}, LAYERWISE | {"low_bits": 1, "symmetric": False}, MIXLLM | {"low_bits": 1}],
    ids=str,
)
def test_one_bit_means_half_integer_levels_or_is_refused(settings: dict[str, Any]) -> None:
    """As `Grid` promises: a grid of one bit is always a half one."""
    try:
        recipe = make_recipe(settings)
    except RecipeError as error:
        assert "low-bits 1" in str(error)  # noqa: PT017 - either is right
    else:
        assert recipe_grid(recipe, 1).half


# ---------------------------------------------------------------------------------------------------- round trips

SAMPLE: list[dict[str, Any]] = [
    {},
    *({"method": method} for method in METHODS if method not in ("auto", "coded", "budget")),
]
for method in (LAYERWISE, MIXLLM, BUDGET):
    SAMPLE += [method | {"importance": order, "bits": 2.75} for order in METHODS[method["method"]].importance]
SAMPLE += [settings for settings, _ in FILLED] + [settings for settings, _ in IMPLIED]
SAMPLE += [
    {"method": "budget", "bits": 3},
    {"method": "coded", "bits": 3},
    {"method": "auto", "size": "1GB"},
    {"bits": 2.5, "row_outliers": "0.005,0.01", "group_sizes": "64,-1", "skip": ["*.o_proj"], "seed": 7},
    {"bits": 2.5, "importance": "uniform", "calibration": "text.txt", "samples": 3, "seq_len": 64},
    {"method": "gwq", "outliers": 0.02, "outlier_scope": "global", "outlier_ranking": "magnitude", "bits": 4},
    LAYERWISE | {"outliers": 0.01, "quantizer": "gptq", "symmetric": False},
]


@pytest.mark.parametrize("settings", SAMPLE, ids=str)
def test_a_recipe_made_of_a_recipe_is_the_same(settings: dict[str, Any]) -> None:
    """Also by way of YAML and JSON, as plans and `llmsqueeze.json` keep it."""
    recipe = make_recipe(settings)
    values = recipe.as_dict()
    assert make_recipe(values) == recipe
    assert make_recipe(yaml.safe_load(yaml.safe_dump(values))) == recipe
    assert make_recipe(json.loads(json.dumps(values))) == recipe


def test_every_quantizer_is_a_method() -> None:
    assert set(rounding_methods()) < set(METHODS)
    for name in rounding_methods():
        assert make_recipe({"method": name}).quantizer == name


def test_a_default_group_size_bends_to_the_model() -> None:
    columns = {"q_proj": 576, "down_proj": 1536}
    recipe, note = fitted(make_recipe({"bits": 4}), columns)
    assert recipe.group_size == 64
    assert note == "groups of 64 columns: 128 does not divide the 576 columns of q_proj"
    assert fitted(make_recipe({"bits": 4, "group_size": 128}), columns) == (make_recipe({"bits": 4}), None), "asked for"
    assert fitted(make_recipe({"bits": 4}), {"a": 4096})[1] is None
    assert fitted(make_recipe({"bits": 4}), {"a": 200, "b": 4096})[0].group_size == 128, "no size divides both"


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", bundled_recipes(), ids=recipe_name)
def test_every_bundled_recipe_is_sound(path: Path) -> None:
    recipe = make_recipe(read_recipe(path))
    assert make_recipe(recipe.as_dict()) == recipe
    assert find_recipe(recipe_name(path)) == path


def test_every_bundled_recipe_says_its_purpose() -> None:
    described = {entry["name"]: entry["purpose"] for entry in describe_recipes()}
    assert list(described) == [recipe_name(path) for path in bundled_recipes()]
    assert len(described) >= 5
    for name, purpose in described.items():
        assert len(purpose) > 20, name
        assert purpose[0] not in "# "
        assert purpose[-1] != "."
    assert len(set(described.values())) == len(described), "no two promise the same"


def test_a_purpose_is_the_first_sentence_of_the_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "mine.yaml").write_text("# Two lines of a\n# first sentence. And a second one.\nbits: 3\n")
    (tmp_path / "papers" / "gwq.yaml").write_text("# As published (arXiv 2411.00850).\nmethod: gwq\n")
    files = [tmp_path / "mine.yaml", tmp_path / "papers" / "gwq.yaml"]
    monkeypatch.setattr("llmsqueeze.recipe.bundled.bundled_recipes", lambda: files)
    assert describe_recipes() == [
        {"name": "mine", "purpose": "Two lines of a first sentence"},
        {"name": "papers/gwq", "purpose": "As published (arXiv 2411.00850)"},
    ]


def test_a_file_wins_over_a_recipe_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gptq-4bit").write_text("bits: 5\n")
    assert read_recipe(find_recipe("gptq-4bit")) == {"bits": 5}
    assert find_recipe("descent-3bit").name == "descent-3bit.yaml"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'gptq-4bit'.*descent-3bit"):
        find_recipe("gptq-4bits")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"- a\n- b\n", "map keys to values"), (b"3: 4\n", "map keys"), (b"", "map keys"), (b"a: [\n", "YAML")],
    ids=["list", "number", "empty", "broken"],
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        read_recipe(tmp_path / "x.yaml")


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder; name a recipe file"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("# für\nbits: 3\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="not readable"):
        read_recipe(tmp_path / "latin.yaml")
