"""The frame of every verb: quiet libraries, errors as one line, results as a table or JSON.

Exit codes: 0 done; 2 bad input (one line says what is wrong); 130 interrupted; 1 a defect of llmsqueeze.
"""

from __future__ import annotations

import inspect
import json
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from llmsqueeze.cli.schema import SCHEMA_VERSION
from llmsqueeze.errors import ProcessError, RecipeError, SqueezeError, first_line
from llmsqueeze.parallel import launched

JSON = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for every weight.")]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
SHARED = {"quantize": "quantize", "evaluate": "eval", "compare": "compare", "distill": "distill"}  # function -> verb
UNFINISHED = "no half-written result was left under the final name"
GIVEN = ("progress", "as_text")  # what a verb gets that is no option of its own
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Outcome:
    """What a verb prints: its result (cli/schema has its fields), and how that is printed as text. Not `met`: the exit
    code is 2."""

    result: dict[str, Any]
    print_text: Callable[[dict[str, Any]], None]
    met: bool = True


def verb(command: Callable[..., Outcome]) -> Callable[..., None]:
    """A command with `--json` and `--debug`, which prints its outcome; with `--quiet`, if it takes `progress`. One that
    takes `as_text` prints as it goes: it is told whether what it prints is text."""
    own = inspect.signature(command, eval_str=True).parameters
    of_progress = {"quiet": QUIET, "verbose": VERBOSE} if "progress" in own else {}
    kinds = {"as_json": JSON, **of_progress, "debug": DEBUG}
    common = [keyword(flag, kind, False) for flag, kind in kinds.items()]
    name = SHARED.get(command.__name__, command.__name__)

    def wrapped(**arguments: Any) -> None:
        flags = (arguments.pop(name, False) for name in ("as_json", "quiet", "verbose", "debug"))
        as_json, quiet, verbose, debug = flags
        quiet |= launched.follows()
        arguments |= {"as_text": not as_json} if "as_text" in own else {}
        with friendly(debug), _joined(command.__name__):
            if "progress" in own:
                from llmsqueeze.cli.console import TerminalProgress

                with TerminalProgress(quiet, verbose) as arguments["progress"]:
                    outcome = command(**arguments)
            else:
                outcome = command(**arguments)
            if launched.follows():
                pass  # the first process prints
            elif as_json:
                typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, "verb": name} | outcome.result))
            else:
                outcome.print_text(outcome.result)
            if not outcome.met:
                raise typer.Exit(2)

    return with_parameters(wrapped, command, [*(p for p in own.values() if p.name not in GIVEN), *common])


@contextmanager
def _joined(verb: str) -> Iterator[None]:
    """In the context the processes that a launcher started are one run, if the verb can be shared."""
    if launched.count() == 1:
        yield
        return
    if verb not in SHARED:
        shared = ", ".join(SHARED.values())
        raise RecipeError(
            f"{verb} runs in one process, and WORLD_SIZE says that there are {launched.count()}; a launcher can start "
            f"{shared}"
        )
    from llmsqueeze.parallel import processes

    with processes.joined():
        yield


def keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
    """A parameter that is given by its name."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def with_parameters(
    wrapped: Callable[..., Any], command: Callable[..., Any], parameters: list[inspect.Parameter]
) -> Callable[..., Any]:
    """`wrapped` with the name and the help of `command`, and with these parameters, which typer reads."""
    signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__doc__, wrapped.__name__, wrapped.__module__ = command.__doc__, command.__name__, command.__module__
    return wrapped


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
        with _terminable():
            yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        if debug:
            raise
        fail(f"interrupted; {_goes_on(error) or UNFINISHED}", 130)
    except SqueezeError as error:
        if debug:
            raise
        fail(str(error), 2, by_all=isinstance(error, ProcessError))
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        if _out_of_memory(error):
            fail("; ".join(filter(None, [_unexpected(error), _note(error)])), 2)
        fail(_unexpected(error), 1)


@contextmanager
def _terminable() -> Iterator[None]:
    """In the context SIGTERM interrupts as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _note(error: BaseException) -> str:
    """What the outermost folder that was being written says of the error; empty if there is nothing to say."""
    notes: list[str] = getattr(error, "__notes__", [])
    return notes[-1] if notes else ""


def _goes_on(error: BaseException) -> str:
    """The note of an error; with the command, if this process has one, that goes on with what was kept."""
    note = _note(error)
    same = "the same command goes on from there"
    if not note.endswith(same) or not launched.command:
        return note
    return note.replace(same, f"this goes on from there: {shlex.join(launched.command)}")


def _unexpected(error: Exception) -> str:
    reason = first_line(error)
    if _out_of_memory(error):
        return f"out of memory: {reason}; fewer or shorter samples (--samples, --seq-len) or --device cpu need less"
    return f"unexpected {type(error).__name__}: {reason}; this is a defect, run again with --debug to see where"


def _out_of_memory(error: Exception) -> bool:
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or "can't allocate memory" in str(error)


def fail(message: str, code: int, by_all: bool = False) -> None:
    """by_all: whether every process of a run says it; else the first one speaks for them."""
    from llmsqueeze.cli.console import print_error

    if by_all or not launched.follows():
        print_error(message)
    raise typer.Exit(code)
