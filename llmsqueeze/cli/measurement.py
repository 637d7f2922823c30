"""The options of `eval` and `compare`: what is measured, on which text, on which tasks. Those of tasks have the names
that lm-eval gives them. What is wrong with them is told before anything heavy is imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze.cli.options import Device, TrustCode, with_options
from llmsqueeze.cli.terminal import Outcome
from llmsqueeze.errors import RecipeError
from llmsqueeze.evaluation.options import PROTOCOLS, Reading, limit_of
from llmsqueeze.evaluation.tasks.options import SEEDS, TaskOptions, batch_size_of, gen_kwargs_of, seeds_of

TEXT, TASKS = "Perplexity of a text", "Tasks of lm-eval"
PREFIX = "Token that a text begins with. [the tokenizer's BOS, or EOS if it has none]"
RESULTS = "Folder for lm-eval's own results files, results_*.json in a folder per model."


def takes_measurement(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Gives a command the options of `eval` and `compare`; it gets them as `given`, by the names of `evaluate`."""
    options = list(inspect.signature(_measurement, eval_str=True).parameters.values())
    return with_options(command, options, lambda arguments: _measurement(**arguments))


def _of(panel: str, text: str, *flags: str, **settings: Any) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=panel, **settings)


def _measurement(
    text: Annotated[
        str | None, _of(TEXT, "Text file or Hub data set for perplexity. [WikiText-2 test, unless --tasks]")
    ] = None,
    seq_len: Annotated[int | None, _of(TEXT, "Window in tokens. [context length, at most 2048]")] = None,
    stride: Annotated[
        int | None,
        _of(TEXT, "Windows begin this many tokens apart and overlap; of each, tokens beyond the one before count."),
    ] = None,
    protocol: Annotated[
        str | None,
        _of(
            TEXT,
            f"{', '.join(PROTOCOLS)}: as GPTQ, QuIP#, QTIP measure: rows of the WikiText-2 test split (or lines of "
            "--text) joined with two newlines, cut into windows of --seq-len [2048], no BOS for each, the rest "
            "dropped; exp of the mean loss, in float32.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        _of(
            TASKS,
            "Tasks, groups, wildcards, YAML files, separated by commas; demo_stories is built in. Log-softmax in "
            "float32; a whole text is read after one BOS.",
        ),
    ] = None,
    num_fewshot: Annotated[int | None, _of(TASKS, "Examples in each prompt. [as the task is defined]")] = None,
    apply_chat_template: Annotated[
        bool, _of(TASKS, "Prompts are turns of the model's chat, and so are examples.", "--apply-chat-template")
    ] = False,
    system_instruction: Annotated[str | None, _of(TASKS, "What stands before each prompt.")] = None,
    gen_kwargs: Annotated[
        str | None, _of(TASKS, "For tasks that generate: key=value,key=value, such as temperature=0.8,do_sample=true.")
    ] = None,
    include_path: Annotated[Path | None, _of(TASKS, "Folder with your own task definitions.")] = None,
    batch_size: Annotated[str, _of(TASKS, "Requests at a time, or auto (what fits into memory).")] = "8",
    seed: Annotated[
        str | None,
        _of(TASKS, f"One, or four: Python, NumPy, torch, few-shot. [{','.join(map(str, SEEDS))}]"),
    ] = None,
    prefix_token_id: Annotated[int | None, _of(TASKS, PREFIX)] = None,
    output_path: Annotated[Path | None, _of(TASKS, RESULTS)] = None,
    log_samples: Annotated[
        bool, _of(TASKS, "Also each question and the model's answers, in --output-path.", "--log-samples")
    ] = False,
    limit: Annotated[
        str | None, typer.Option(help="At most N windows of text and N documents a task, or this share (below 1).")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Compute in: stored (that of the model), float32, or auto (the faster here).")
    ] = "auto",
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
) -> dict[str, Any]:
    """Raises RecipeError for values that are out of range or do not go together."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise RecipeError("--tasks is empty; name lm-eval tasks separated by commas, such as piqa,arc_easy")
    options = TaskOptions(
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction or None,
        gen_kwargs=gen_kwargs_of(gen_kwargs),
        prefix_token_id=prefix_token_id,
        seed=seeds_of(seed),
        output_path=output_path,
        log_samples=log_samples,
    )
    if not names and (given := options.given()):
        raise RecipeError(f"{given[0]} is for --tasks, and none is named")
    reading = Reading(seq_len, stride, protocol, limit_of(limit))
    return {
        "tasks": names,
        "text": text,
        "limit": reading.limit,
        "window": seq_len,
        "stride": stride,
        "protocol": protocol,
        "include_path": include_path,
        "batch_size": batch_size_of(batch_size),
        "task_options": options,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
