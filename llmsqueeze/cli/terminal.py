"""The frame of every command: quiet libraries, errors as one line, results as a table or JSON.

Exit codes: 0 done; 2 bad input (one line says what is wrong); 130 interrupted; 1 a defect of llmsqueeze.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from llmsqueeze.errors import SqueezeError, first_line


def print_result(result: dict[str, Any], as_json: bool, printer: Any) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        printer(result)


def hush() -> None:
    """Silences the bars and warnings of other libraries, which would mix with ours."""
    import logging as standard_logging
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "lm_eval", "lm_eval.models.huggingface", "lm_eval.evaluator", "lm_eval.api.task"):
        standard_logging.getLogger(name).setLevel(standard_logging.ERROR)
    quiet: Any = logging  # its functions are not annotated
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()


@contextmanager
def friendly(debug: bool) -> Iterator[None]:
    """Turns errors into one line and an exit code; `debug` lets them through."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        fail("interrupted; no half-written result was left under the final name", 130)
    except SqueezeError as error:
        if debug:
            raise
        fail(str(error), 2)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        fail(_unexpected(error), 2 if _out_of_memory(error) else 1)


def _unexpected(error: Exception) -> str:
    reason = first_line(error)
    if _out_of_memory(error):
        return f"out of memory: {reason}; fewer or shorter samples (--samples, --seq-len) or --device cpu need less"
    return f"unexpected {type(error).__name__}: {reason}; this is a defect, run again with --debug to see where"


def _out_of_memory(error: Exception) -> bool:
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or "can't allocate memory" in str(error)


def fail(message: str, code: int) -> None:
    from llmsqueeze.cli.console import print_error

    print_error(message)
    raise typer.Exit(code)
