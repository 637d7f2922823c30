"""The definitions of tasks: found by name, group, wildcard or file, loaded with their data, set to the options."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from llmsqueeze.demo import task as demo_task
from llmsqueeze.errors import HubError, RecipeError, UnsupportedError, first_line, foreign, nearest
from llmsqueeze.evaluation.tasks.options import GENERATING, ROLLING, TaskOptions

Spec = str | dict[str, Any]  # what lm-eval loads a task from: a name, the path of a YAML file, a configuration
WILDCARDS = frozenset("*?[")
FILES = (".yaml", ".yml")
# what lm-eval takes out of the settings for generation before transformers reads them
OWN_SETTINGS = ("until", "max_gen_toks", "max_tokens", "max_completion_tokens")


def find_specs(names: Sequence[str], include_path: Path | None) -> list[Spec]:
    """What lm-eval loads for names of tasks and groups, for wildcards, for YAML files; `demo_stories` is built in.

    A wildcard stands for tasks, and for groups only if it matches no task: a group's tasks are not measured twice.
    Raises RecipeError for an unknown name, with the nearest one, and if `include_path` is not a folder.
    """
    if include_path is not None and names and not include_path.is_dir():
        raise RecipeError(f"--include-path {include_path} is not a folder of task definitions")
    specs: dict[str, Spec] = {}
    for name in names:
        for one in [name] if name == demo_task.TASK_NAME or name.endswith(FILES) else _matches(name, include_path):
            specs[one] = demo_task.task_config() if one == demo_task.TASK_NAME else _file(one) or one
    return list(specs.values())


def _file(name: str) -> str | None:
    """The path of a YAML file, if the name is that of one. Raises RecipeError if it is not there."""
    if not name.endswith(FILES):
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise RecipeError(f"there is no task definition {name}")
    return str(path.resolve())


def _matches(name: str, include_path: Path | None) -> list[str]:
    """The name itself if lm-eval knows it, or what its wildcards match. Raises RecipeError."""
    if include_path is not None and name in task_index(include_path, False).all_tasks:
        return [name]
    index = task_index(include_path, True)
    every = [*index.all_tasks, demo_task.TASK_NAME]
    if name in every:
        return [name]
    if WILDCARDS & set(name):
        tasks = fnmatch.filter([*index.all_subtasks, demo_task.TASK_NAME], name) or fnmatch.filter(every, name)
        if not tasks:
            raise RecipeError(f"no task matches {name!r}")
        return tasks
    if Path(name).expanduser().is_dir():
        raise RecipeError(f"{name} is a folder; name its tasks, and the folder by --include-path")
    raise RecipeError(f"unknown task {name!r}{nearest(name, every)}")


@cache
def task_index(include_path: Path | None, defaults: bool) -> Any:
    """lm-eval's index of task definitions. To read its own definitions (`defaults`) takes many seconds."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    return TaskManager(include_path=path, include_defaults=defaults)


@contextmanager
def translated_errors(names: Sequence[str]) -> Iterator[None]:
    """Raises HubError if the data of a task cannot be loaded or a package is missing, UnsupportedError for whatever
    else lm-eval, or the definition of a task, fails at."""
    what = f"lm-eval cannot run {', '.join(names)}"
    with foreign(UnsupportedError, what):
        try:
            yield
        except (OSError, ImportError) as error:
            raise HubError(f"{what}: {first_line(error)}") from error


def load_tasks(specs: Sequence[Spec], include_path: Path | None, options: TaskOptions) -> tuple[Any, list[str]]:
    """lm-eval's tasks with their data, set to the options, and notes for the user.

    Raises RecipeError for options that do not fit the tasks.
    """
    loaded = task_index(include_path, need_defaults(specs, include_path)).load(list(specs))
    tasks = loaded["tasks"]
    refuse_unused(options, {name: task.get_config("output_type") for name, task in tasks.items()})
    notes = [note for name, task in tasks.items() for note in set_examples(name, task, options)]
    for task in tasks.values():
        if options.gen_kwargs and task.get_config("output_type") == GENERATING:
            task.set_config(key="generation_kwargs", value=dict(options.gen_kwargs), update=True)
    return loaded, notes


def need_defaults(specs: Sequence[Spec], include_path: Path | None) -> bool:
    """Whether lm-eval's own definitions may be needed: not for tasks of `include_path`; its groups, and files, may name
    others."""
    own = set() if include_path is None else set(task_index(include_path, False).all_subtasks)
    return any(isinstance(spec, str) and spec not in own for spec in specs)


def refuse_unused(options: TaskOptions, types: dict[str, str]) -> None:
    """Raises RecipeError for options that none of the tasks (name -> output type) uses."""
    names = ", ".join(types)
    if options.gen_kwargs:
        if GENERATING not in types.values():
            raise RecipeError(f"--gen-kwargs is for tasks that generate text; of {names} likelihoods are compared")
        from transformers import GenerationConfig

        known = {*GenerationConfig().to_dict(), *OWN_SETTINGS}
        if wrong := next((key for key in options.gen_kwargs if key not in known), None):
            raise RecipeError(f"--gen-kwargs has {wrong!r}, which generation does not know{nearest(wrong, known)}")
    if set(types.values()) == {ROLLING}:
        asked = {
            "--num-fewshot": options.num_fewshot is not None,
            "--apply-chat-template": options.apply_chat_template,
            "--system-instruction": options.system_instruction is not None,
        }
        if unused := [flag for flag, given in asked.items() if given]:
            raise RecipeError(f"{unused[0]} is for tasks with a prompt; of {names} a whole text is read")


def set_examples(name: str, task: Any, options: TaskOptions) -> list[str]:
    """Sets how many examples stand in the prompts of a task; notes for the user. Raises RecipeError."""
    has_prompt = task.get_config("output_type") != ROLLING
    fixed, asked = task.get_config("num_fewshot"), options.num_fewshot if has_prompt else None
    if asked is not None and fixed == 0 != asked:
        return [f"{name} is defined without examples in its prompts, and stays so"]
    if asked is not None or fixed is None:
        task.set_config(key="num_fewshot", value=asked or 0)
    pool = getattr(getattr(task, "sampler", None), "df", None)
    if asked and pool is not None and len(pool) < asked:
        raise RecipeError(f"--num-fewshot is {asked}; {name} has {len(pool)} examples")
    if task.get_config("num_fewshot") and answers_itself(task):
        raise RecipeError(
            f"{name} has no examples but the questions that it asks, so prompts could give the answer away; give its "
            "definition a fewshot_split"
        )
    return []


def answers_itself(task: Any) -> bool:
    """Whether a question may be among the examples of its own prompt: lm-eval takes it out only if the definition says
    that examples are from the test split."""
    drawn, config = getattr(task, "fewshot_cfg", None), task.config
    if drawn is None:
        return False
    if drawn.split is not None:
        return not task.has_test_docs() and drawn.split == config.validation_split
    return (
        drawn.samples is None
        and not task.has_training_docs()
        and not (task.has_test_docs() and task.has_validation_docs())
    )
