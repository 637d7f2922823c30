"""How lm-eval asks its tasks. The names are those of lm-eval's own options; nothing heavy is imported here.

A score with examples in its prompt, or with a chat template, is another score than one without. So each has a label,
such as `arc_easy (5-shot, chat template)`, under which it is stored and shown.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.values import flag, whole

SEEDS = (0, 1234, 1234, 1234)  # those of lm-eval's own command: Python's generator, NumPy's, torch's, few-shot's
LONGEST = 24  # letters of a system instruction in a label
ROLLING, GENERATING = "loglikelihood_rolling", "generate_until"
# what a comma does not end: brackets, braces, quoted text
PART = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")


@dataclass(frozen=True)
class TaskOptions:
    """num_fewshot: examples in the prompt, where a task does not fix them at 0; None: as the task is defined.

    apply_chat_template: prompts are turns of a chat, examples too. system_instruction: what stands before a prompt.
    gen_kwargs: what generation is asked for, on top of what the task says. prefix_token_id: what a text begins with,
    in place of the tokenizer's BOS or EOS. seed: of Python's generator, NumPy's, torch's, and of few-shot examples.
    output_path: the folder for lm-eval's results files. log_samples: also each question with its answers.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    prefix_token_id: int | None = None
    seed: tuple[int, int, int, int] = SEEDS
    output_path: Path | None = None
    log_samples: bool = False

    def __post_init__(self) -> None:
        """Raises RecipeError for values out of range, and for what does not go together."""
        for name, value in (("num_fewshot", self.num_fewshot), ("prefix_token_id", self.prefix_token_id)):
            if value is not None:
                whole(0)(name, value)
        if self.log_samples and self.output_path is None:
            raise RecipeError("--log-samples needs --output-path, the folder for the samples")
        if self.output_path is not None and (self.output_path.suffix == ".json" or self.output_path.is_file()):
            raise RecipeError(f"--output-path {self.output_path} is a file; name a folder, which gets one per model")

    def given(self) -> list[str]:
        """The options that were asked for, as the command line names them."""
        return [flag(one.name) for one in fields(self) if getattr(self, one.name) != getattr(TaskOptions(), one.name)]

    def settings(self, task: str, output_type: str | None, num_fewshot: int | None) -> dict[str, Any]:
        """What was asked for and changes the scores of a task, by lm-eval's names; what the task does not use is left
        out. num_fewshot: the examples that were in its prompts."""
        asked: dict[str, Any] = {"task": task}
        if output_type != ROLLING:
            asked["num_fewshot"] = num_fewshot or 0
            asked |= {"apply_chat_template": True} if self.apply_chat_template else {}
            asked |= {"system_instruction": self.system_instruction} if self.system_instruction else {}
        if output_type in (GENERATING, None) and self.gen_kwargs:
            asked["gen_kwargs"] = dict(self.gen_kwargs)
        if self.prefix_token_id is not None:
            asked["prefix_token_id"] = self.prefix_token_id
        if self.seed != SEEDS:
            asked["seed"] = list(self.seed)
        return asked

    def label(self, settings: Mapping[str, Any]) -> str:
        """The name under which a score is stored and shown: the task, and what was asked for beside it."""
        asked = self.num_fewshot is not None and settings.get("num_fewshot") == self.num_fewshot
        notes = [f"{self.num_fewshot}-shot"] if asked else []
        notes += ["chat template"] if "apply_chat_template" in settings else []
        notes += [f"system {quoted(settings['system_instruction'])}"] if "system_instruction" in settings else []
        notes += [f"{key}={value}" for key, value in settings.get("gen_kwargs", {}).items()]
        notes += [f"prefix {settings['prefix_token_id']}"] if "prefix_token_id" in settings else []
        seeds = settings.get("seed", [])
        notes += [f"seed {','.join(map(str, seeds if len({*seeds}) > 1 else seeds[:1]))}"] if seeds else []
        return f"{settings['task']} ({', '.join(notes)})" if notes else str(settings["task"])


def quoted(instruction: str) -> str:
    """A system instruction for a label; a long one is cut, and told from others by its hash."""
    words = " ".join(instruction.split())
    if len(words) <= LONGEST:
        return f'"{words}"'
    return f'"{words[: LONGEST - 1]}…" {hashlib.sha256(instruction.encode()).hexdigest()[:6]}'


def batch_size_of(value: str | int) -> str | int:
    """`--batch-size`: a whole number from 1, or auto."""
    text = str(value).strip()
    if text == "auto":
        return text
    if text.startswith("auto:"):
        raise RecipeError(f"--batch-size is {text}; say auto: with a number, lm-eval fails on tasks of fewer requests")
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"--batch-size is {text}; it must be a whole number from 1, or auto")
    return int(text)


def seeds_of(text: str | None) -> tuple[int, int, int, int]:
    """`--seed`: one whole number for all, or four: of Python's generator, NumPy's, torch's, of few-shot examples."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not parts:
        return SEEDS
    if len(parts) not in (1, 4) or not all(part.isdecimal() and int(part) < 1 << 32 for part in parts):
        raise RecipeError(
            f"--seed is {text}; it must be one whole number from 0, or four with commas (Python, NumPy, torch, "
            "few-shot): without a seed, two models would not get the same examples"
        )
    python, numpy, torch, fewshot = map(int, parts * (4 if len(parts) == 1 else 1))
    return python, numpy, torch, fewshot


def gen_kwargs_of(text: str | None) -> dict[str, Any]:
    """`--gen-kwargs`: `key=value,key=value`, or a JSON object. Values are Python's, or else words."""
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"--gen-kwargs {text} is not JSON: {error}") from error
        return dict(values)
    pairs = [part.partition("=") for part in PART.findall(text) if part.strip()]
    if not pairs or not all(key.strip() and equals for key, equals, _ in pairs):
        raise RecipeError(f"--gen-kwargs is {text!r}; it must be key=value, with commas between, or a JSON object")
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _value(text: str) -> Any:
    """'0.8' -> 0.8, 'true' -> True, '["a"]' -> ['a'], 'beam' -> 'beam'."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
