"""lm-eval tasks on a model that is in memory."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.evaluation.options import Limit
from llmsqueeze.evaluation.tasks.definitions import find_specs, load_tasks, translated_errors
from llmsqueeze.evaluation.tasks.options import GENERATING, TaskOptions
from llmsqueeze.evaluation.tasks.results_files import BOOTSTRAPS, make_folder, write_results
from llmsqueeze.evaluation.tasks.scores import TaskScores, documents_of, group_documents, metrics_of
from llmsqueeze.model.blockwise.attention import AttentionInPieces
from llmsqueeze.model.config import vocabulary
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress


@dataclass(frozen=True)
class Tasks:
    """lm-eval tasks, ready to run on one model after the other.

    names: as the user called them. limit: documents of each task, or the share of them, at most. batch_size: requests
    that go through the model at a time, or `auto`. loaded: lm-eval's tasks with their data; None in processes that do
    not measure them.
    """

    names: list[str]
    options: TaskOptions = field(default_factory=TaskOptions)
    limit: Limit | None = None
    batch_size: int | str = 8
    loaded: Any = None

    def check(self, opened: OpenModel) -> None:
        """Raises UnsupportedError or RecipeError for a model whose tokenizer lacks what the tasks need."""
        if self.names:
            processes.of_first(lambda: self._check(opened))

    def _check(self, opened: OpenModel) -> None:
        types = {task.get_config("output_type") for task in self.loaded["tasks"].values()}
        check_tokenizer(opened, self.options, generates=GENERATING in types)

    def run(self, opened: OpenModel, progress: Progress) -> dict[str, TaskScores]:
        """label -> scores, which of several processes the first one measures.

        Raises as `check`, and HubError or UnsupportedError for what lm-eval fails at.
        """
        return processes.of_first(lambda: self._scores(opened, progress)) if self.names else {}

    def _scores(self, opened: OpenModel, progress: Progress) -> dict[str, TaskScores]:
        self._check(opened)
        with progress.foreign("tasks"), translated_errors(self.names):
            return scores_of(self._outcome(opened), self.options)

    def _outcome(self, opened: OpenModel) -> dict[str, Any]:
        # the steps of lm_eval.simple_evaluate that change a score; the rest of it describes the machine, by starting
        # git and other commands, whose complaints reach the terminal
        import lm_eval

        from llmsqueeze.evaluation.tasks.harness import Harness

        set_seeds(self.options.seed)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=self.options.seed[3])
        model = Harness(opened, self.batch_size, self.options.prefix_token_id)
        with AttentionInPieces():
            outcome: dict[str, Any] = lm_eval.evaluate(
                lm=model,
                task_dict=self.loaded,
                limit=self.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                system_instruction=self.options.system_instruction,
                apply_chat_template=self.options.apply_chat_template,
                fewshot_as_multiturn=True,
            )
        write_results(outcome, opened, model, self.options, self.limit)
        return outcome


def find_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    limit: Limit | None = None,
    batch_size: int | str = 8,
    options: TaskOptions | None = None,
    progress: Progress | None = None,
) -> Tasks:
    """lm-eval tasks by name, group, wildcard or YAML file, the built-in `demo_stories` among them, with their data.

    Raises RecipeError for an unknown name and for options that do not fit, HubError if data cannot be loaded.
    """
    options, progress = options or TaskOptions(), progress or Progress()
    if not names:
        return Tasks([], options, limit, batch_size)
    loaded: list[Any] = []

    def load() -> list[str]:
        make_folder(options.output_path)
        specs = find_specs(names, include_path)
        set_seeds(options.seed)
        with progress.foreign("reading tasks"), translated_errors(names):
            content, notes = load_tasks(specs, include_path, options)
        loaded.append(content)
        return notes

    for note in processes.of_first(load):
        progress.note(note)
    return Tasks(list(names), options, limit, batch_size, *loaded)


def set_seeds(seeds: Sequence[int]) -> None:
    """Of Python's generator, of NumPy's, of torch's."""
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])


def check_tokenizer(opened: OpenModel, options: TaskOptions, generates: bool) -> None:
    """Raises UnsupportedError for a tokenizer without a token or a chat template that the tasks need, RecipeError for
    a prefix token that the model does not have."""
    tokenizer, prefix = opened.tokenizer, options.prefix_token_id
    if prefix is None and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UnsupportedError(
            f"the tokenizer of {opened.name} has neither a BOS nor an EOS token, and tasks begin a text with one of "
            "them; say which token is to stand there: --prefix-token-id N"
        )
    if prefix is not None and not 0 <= prefix < vocabulary(opened.model.config):
        raise RecipeError(
            f"--prefix-token-id is {prefix}; the tokens of {opened.name} are 0 to {vocabulary(opened.model.config) - 1}"
        )
    if generates and tokenizer.eos_token_id is None:
        raise UnsupportedError(
            f"the tokenizer of {opened.name} has no EOS token, which ends generated text; name one in its "
            "tokenizer_config.json, as eos_token"
        )
    if options.apply_chat_template:
        check_chat_template(opened, options.system_instruction)


def check_chat_template(opened: OpenModel, system_instruction: str | None) -> None:
    """Raises UnsupportedError if the tokenizer has no chat template, or one that takes no system instruction."""
    from jinja2.exceptions import TemplateError

    if not opened.tokenizer.chat_template:
        raise UnsupportedError(f"the tokenizer of {opened.name} has no chat template for --apply-chat-template")
    if system_instruction is not None:
        chat = [{"role": "system", "content": system_instruction}, {"role": "user", "content": "?"}]
        try:
            opened.tokenizer.apply_chat_template(chat, tokenize=False)
        except TemplateError as error:  # lm-eval would leave the instruction out
            raise UnsupportedError(
                f"the chat template of {opened.name} takes no --system-instruction: {error}"
            ) from error


def scores_of(outcome: Mapping[str, Any], options: TaskOptions) -> dict[str, TaskScores]:
    """label -> scores, of what lm-eval returns; groups that sum up nothing are left out."""
    answers, members, scores = outcome.get("samples") or {}, outcome["group_subtasks"], {}
    for name, values in outcome["results"].items():
        output_type = outcome["configs"].get(name, {}).get("output_type")  # None for a group
        settings = options.settings(name, output_type, outcome["n-shot"].get(name))
        if metrics := metrics_of(values):
            documents = group_documents(name, members, answers) if name in members else documents_of(answers[name])
            scores[options.label(settings)] = TaskScores(metrics, documents, settings)
    return scores
