"""Processes of their own that need not import anything: forks of one that has."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

IMPORTED = ("llmsqueeze.compress.quantize", "llmsqueeze.distillation.distill", "transformers.models.llama")


class Child:
    """A process that calls a function of a module's top level; what it writes to stderr goes into a file."""

    def __init__(self, scratch: Path, call: Callable[..., object], *given: object, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        self.errors = scratch / f"stderr-{len(list(scratch.glob('stderr-*')))}"
        self.errors.touch()
        self.process = context.Process(target=_called, args=(self.errors, environment, call, given))
        self.process.start()

    def ended(self) -> tuple[int | None, str]:
        """Its exit status, negative for a signal, and what it wrote to stderr."""
        self.process.join()
        return self.process.exitcode, self.errors.read_text()


def tokenized_once() -> Callable[[str, Any], list[int]]:
    """`tokens.token_ids`, which keeps what a fast tokenizer has made of a text."""
    from llmsqueeze.text.tokens import token_ids

    known = dict[tuple[str, str], list[int]]()

    def tokens_of(content: str, tokenizer: Any) -> list[int]:
        if not getattr(tokenizer, "is_fast", False):
            return token_ids(content, tokenizer)
        key = tokenizer.backend_tokenizer.to_str(), content
        if key not in known:
            known[key] = token_ids(content, tokenizer)
        return known[key].copy()

    return tokens_of


def _called(
    errors: Path, environment: Mapping[str, str], call: Callable[..., object], given: tuple[object, ...]
) -> None:
    from transformers.utils import logging

    from llmsqueeze.formats import verify
    from llmsqueeze.formats.inspection.opening import Opened
    from llmsqueeze.text import rows

    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    os.environ.update(environment)
    logging.disable_progress_bar()
    rows.token_ids = tokenized_once()
    verify.open_as_user, verify.waiting, verify.tried = (
        lambda *_: Opened(),
        nullcontext,
        lambda *_: {},
    )  # as in all others
    call(*given)
