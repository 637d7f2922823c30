"""The help, and what is said of an option that there is not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import command, refused

from llmsqueeze.cli.command import right_word
from llmsqueeze.cli.options import PANELS
from llmsqueeze.recipe.options import Asked

KNOWN = ["--out", "--group-size", "--calibration", "--bits", "--samples"]


def test_every_option_of_a_recipe_has_one_group() -> None:
    assert sorted(name for names in PANELS.values() for name in names) == sorted(Asked.model_fields)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_in_groups_and_what_most_runs_need_comes_first(flag: str) -> None:
    code, out, _ = command("quantize", flag)
    assert code == 0
    heads = [line.removesuffix(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == ["Arguments", *PANELS, "Other options"]
    first = out.partition("What most runs need:")[2].partition("\n\n")[0]
    assert [name for name in ("--method", "--bits", "--calibration", "-o, --out") if name not in first] == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--group_size", "; it is --group-size"),
        ("--output_dir", "; here that is --out"),
        ("--dataset", "; here that is --calibration"),
        ("--nsamples", "; here that is --samples"),
        ("--scheme", "; here that is --bits"),
        ("--bit", "; did you mean '--bits'?"),
        ("--xyzzy", "; --help lists all"),
    ],
)
def test_the_right_word(wrong: str, said: str) -> None:
    assert right_word(wrong, KNOWN) == said


def test_words_of_other_tools_are_those_of_the_verb() -> None:
    assert "eval has no option --dataset; here that is --text" in refused("eval", "demo", "--dataset", "x")


def test_an_option_with_a_value_too_many_or_too_few() -> None:
    assert "Option '--json' does not take a value." in refused("eval", "demo", "--json=yes")
    assert "Option '--tasks' requires an argument." in refused("eval", "demo", "--tasks")


def test_a_wrong_method_is_refused_before_anything_heavy_is_imported() -> None:
    script = (
        "import sys; from llmsqueeze.cli.app import app\n"
        "try: app(['quantize', 'demo', '--method', 'desent'])\n"
        'except SystemExit as end: sys.exit(f\'{end.code} {sorted({*sys.modules} & {"torch", "transformers"})}\')\n'
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "unknown --method 'desent'; did you mean 'descent'?" in done.stderr
    assert done.stderr.splitlines()[-1] == "2 []"
