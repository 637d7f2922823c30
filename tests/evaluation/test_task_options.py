"""What tasks are asked with: values as lm-eval's own command reads them, labels that keep scores apart, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval._cli.utils import key_val_to_dict

from llmsqueeze.errors import RecipeError
from llmsqueeze.evaluation.options import Reading, limit_of, part_of
from llmsqueeze.evaluation.tasks.options import (
    GENERATING,
    ROLLING,
    SEEDS,
    TaskOptions,
    batch_size_of,
    gen_kwargs_of,
    seeds_of,
)


@pytest.mark.parametrize(
    "text",
    [
        "temperature=0.8,top_p=0.95",
        "do_sample=true,max_gen_toks=32",
        "until=['a,b', 'c'],temperature=0",
        "until=[],name=two words,odd=[1",
        "x=-3,y=1e-3",
    ],
)
def test_generation_is_asked_for_as_lm_eval_reads_it(text: str) -> None:
    assert gen_kwargs_of(text) == key_val_to_dict(text)


def test_generation_is_asked_for_as_json_too() -> None:
    assert gen_kwargs_of('{"until": ["\\n"], "temperature": 0.5}') == {"until": ["\n"], "temperature": 0.5}
    assert gen_kwargs_of(None) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gen_kwargs_of("temperature"), "--gen-kwargs is 'temperature'; it must be key=value"),
        (lambda: gen_kwargs_of("=3"), "it must be key=value"),
        (lambda: gen_kwargs_of(" "), "it must be key=value"),
        (lambda: gen_kwargs_of("{x"), "is not JSON"),
        (lambda: limit_of("0"), "--limit is 0; it must be a whole number from 1, or a share"),
        (lambda: limit_of("1.5"), "--limit is 1.5"),
        (lambda: limit_of("-0.5"), "--limit is -0.5"),
        (lambda: limit_of("all"), "--limit is all"),
        (lambda: limit_of("nan"), "--limit is nan"),
        (lambda: batch_size_of("0"), "--batch-size is 0; it must be a whole number from 1, or auto"),
        (lambda: batch_size_of("many"), "--batch-size is many"),
        (lambda: batch_size_of("auto:4"), "--batch-size is auto:4; say auto"),
        (lambda: seeds_of("1,2"), "--seed is 1,2; it must be one whole number from 0, or four"),
        (lambda: seeds_of("1,2,None,4"), "would not get the same examples"),
        (lambda: TaskOptions(num_fewshot=-1), "--num-fewshot is -1"),
        (lambda: TaskOptions(prefix_token_id=-1), "--prefix-token-id is -1"),
        (lambda: TaskOptions(log_samples=True), "--log-samples needs --output-path"),
        (lambda: TaskOptions(output_path=Path("a/b.json")), "name a folder"),
        (lambda: Reading(window=1), "--seq-len is 1; it must be a whole number from 2"),
        (lambda: Reading(stride=0), "--stride is 0; it must be a whole number from 1"),
        (lambda: Reading(window=64, stride=64), "--stride is 64; it must be below the window of 64"),
        (lambda: Reading(protocol="paper"), "unknown --protocol 'paper'; did you mean 'papers'?"),
        (lambda: Reading(protocol="papers", stride=5), "leave out --stride"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        call()
    assert message in str(refused.value)


def test_values_of_every_form() -> None:
    assert [limit_of(value) for value in (None, "10", 3, "0.25", 0.5, "1e2")] == [None, 10, 3, 0.25, 0.5, 100]
    assert [part_of(10, limit) for limit in (None, 3, 30, 0.01, 0.25)] == [10, 3, 10, 1, 3]
    assert [batch_size_of(value) for value in ("auto", 4, "16")] == ["auto", 4, 16]
    assert [seeds_of(value) for value in (None, "7", "1, 2,3,4")] == [SEEDS, (7, 7, 7, 7), (1, 2, 3, 4)]


def label(options: TaskOptions, output_type: str | None = "multiple_choice", shots: int = 0) -> str:
    return options.label(options.settings("arc", output_type, shots))


def test_a_label_says_what_makes_a_score_another_one() -> None:
    assert label(TaskOptions()) == "arc"
    assert label(TaskOptions(), shots=25) == "arc", "as the task is defined"
    assert label(TaskOptions(num_fewshot=5), shots=5) == "arc (5-shot)"
    assert label(TaskOptions(num_fewshot=5), shots=0) == "arc", "the task is defined without examples"
    assert label(TaskOptions(num_fewshot=0), shots=0) == "arc (0-shot)"
    chat = TaskOptions(num_fewshot=1, apply_chat_template=True, system_instruction="Be brief.", seed=(1, 2, 3, 4))
    assert label(chat, shots=1) == 'arc (1-shot, chat template, system "Be brief.", seed 1,2,3,4)'
    assert label(TaskOptions(seed=(7, 7, 7, 7))) == "arc (seed 7)"
    generating = TaskOptions(gen_kwargs={"temperature": 0.5}, prefix_token_id=3)
    assert label(generating) == "arc (prefix 3)"
    assert label(generating, GENERATING) == "arc (temperature=0.5, prefix 3)"
    assert label(TaskOptions(num_fewshot=5, apply_chat_template=True), ROLLING) == "arc", "it has no prompt"


def test_long_instructions_are_cut_and_told_apart() -> None:
    one, two = (label(TaskOptions(system_instruction="You are an assistant that answers" + end)) for end in "ab")
    assert one != two
    start = 'arc (system "You are an assistant th…" '
    assert one.startswith(start)
    assert two.startswith(start)


def test_settings_are_recorded_by_lm_evals_names() -> None:
    options = TaskOptions(num_fewshot=2, apply_chat_template=True, system_instruction="Be brief.")
    expected = {"task": "arc", "num_fewshot": 2, "apply_chat_template": True, "system_instruction": "Be brief."}
    assert options.settings("arc", "multiple_choice", 2) == expected
    assert options.settings("arc", ROLLING, 0) == {"task": "arc"}
    assert options.given() == ["--num-fewshot", "--apply-chat-template", "--system-instruction"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "1.5"], "--limit is 1.5"),
        (["--num-fewshot", "5"], "--num-fewshot is for --tasks, and none is named"),
        (["--tasks", "x", "--log-samples"], "--log-samples needs --output-path"),
        (["--tasks", "x", "--batch-size", "auto:2"], "--batch-size is auto:2"),
    ],
)
def test_refused_before_anything_heavy_is_imported(arguments: list[str], message: str) -> None:
    script = (
        "import sys; from llmsqueeze.cli.app import app\n"
        f"try: app(['eval', 'demo', *{arguments!r}])\n"
        'except SystemExit as end: sys.exit(f\'{end.code} {sorted({*sys.modules} & {"torch", "transformers"})}\')\n'
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert message in " ".join(done.stderr.split())
    assert done.stderr.splitlines()[-1] == "2 []"
