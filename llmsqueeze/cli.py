"""The command line: parse, one call, print. Heavy modules are imported by the command that needs them.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 bad input (one line says what is wrong), 130
interrupted, 1 a defect of llmsqueeze.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze import __version__
from llmsqueeze.errors import RecipeError, SqueezeError, first_line
from llmsqueeze.options import settings_of, takes_distillation, takes_recipe

app = typer.Typer(
    name="llmsqueeze",
    help="Compress the weights of large language models; evaluate, inspect and share the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MODEL_HELP = "Hub id, local folder, or 'demo' (the built-in model)"
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:1 ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmsqueeze {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@takes_recipe
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    given: dict[str, Any],
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml that `llmsqueeze plan` wrote, edited or not.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Measurements that `llmsqueeze plan` wrote.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [./<model>-<bits>bit]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into a folder that transformers opens."""
    with _friendly(debug):
        settings = settings_of(given)

        from llmsqueeze import report
        from llmsqueeze.prepare import Source
        from llmsqueeze.run import quantize as quantize_model

        _hush()
        with report.TerminalProgress(quiet) as progress:
            summary = quantize_model(
                Source(model, revision, trust_remote_code),
                settings,
                out,
                plan=plan,
                profile=profile,
                device=device,
                overwrite=overwrite,
                progress=progress,
            )
        _print(summary, as_json, report.print_summary)


@app.command("plan")
@takes_recipe
def make_plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    given: dict[str, Any],
    weights: Annotated[
        str, typer.Option(help="all, or none: sizes alone, from config.json, with the same widths everywhere.")
    ] = "all",
    trial: Annotated[bool, typer.Option(help="Compress two blocks to predict time and memory.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for plan and profile. [./<model>-plan]")] = None,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decide what MODEL's weights become within a budget; measure, print, write plan.yaml; compress nothing."""
    with _friendly(debug):
        settings = settings_of(given)
        if weights not in ("all", "none"):
            raise RecipeError(f"unknown weights {weights!r}; choose all or none")

        from llmsqueeze import report
        from llmsqueeze.planning import plan as plan_model
        from llmsqueeze.prepare import Source

        _hush()
        with report.TerminalProgress(quiet) as progress:
            result = plan_model(
                Source(model, revision, trust_remote_code),
                settings,
                out,
                device=device,
                weights=weights == "all",
                trial=trial,
                progress=progress,
            )
        _print(result, as_json, report.print_plan)


@app.command()
def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come along; `--recipe NAME` uses one."""
    with _friendly(debug):
        from llmsqueeze import report
        from llmsqueeze.recipes import describe_recipes

        _print({"recipes": describe_recipes()}, as_json, report.print_recipes)


@app.command()
@takes_distillation
def distill(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    given: dict[str, Any],
    teacher: Annotated[str | None, typer.Option(help="The original. [what FOLDER says that it was made from]")] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(help="Folder to keep the teacher's answers in for the next time. [none is kept]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [<folder>-distilled]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the scales in a compressed FOLDER until it answers as the original does; the size stays."""
    with _friendly(debug):
        from llmsqueeze.distillation import make_distillation

        settings = make_distillation(given)

        from llmsqueeze import report
        from llmsqueeze.distilling import distill as distill_folder

        _hush()
        with report.TerminalProgress(quiet) as progress:
            summary = distill_folder(
                folder,
                teacher,
                settings,
                out,
                teacher_cache=teacher_cache,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                progress=progress,
            )
        _print(summary, as_json, report.print_distillation)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + "; compressed or not")],
    baseline: Annotated[str | None, typer.Option(help="Model to compare with, usually the original.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, separated by commas; demo_stories is built in.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text file or Hub data set for perplexity. [WikiText-2 test, unless --tasks]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most N windows of text and N documents a task.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Window in tokens. [context length, at most 2048]")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with own lm-eval task definitions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size for tasks.")] = 8,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure MODEL: perplexity, divergence from a baseline, lm-eval tasks."""
    with _friendly(debug):
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        if tasks is not None and not names:
            raise RecipeError("--tasks is empty; name lm-eval tasks separated by commas, such as piqa,arc_easy")

        from llmsqueeze import evaluate as evaluation
        from llmsqueeze import report
        from llmsqueeze.prepare import pick_device

        _hush()
        with report.TerminalProgress(quiet) as progress:
            result = evaluation.evaluate(
                model,
                baseline=baseline,
                text=evaluation.choose_text(model, text, wanted=text is not None or not names),
                tasks=names,
                include_path=include_path,
                limit=limit,
                window=seq_len,
                batch_size=batch_size,
                device=pick_device(device),
                trust_remote_code=trust_remote_code,
                progress=progress,
            ).as_dict()
        if limit is None:
            evaluation.remember(model, result)
        _print(result, as_json, report.print_evaluation)


@app.command()
def show(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id that llmsqueeze wrote")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what each weight of a compressed folder holds, and its size."""
    with _friendly(debug):
        from llmsqueeze import report
        from llmsqueeze.show import contents

        _print(contents(folder).as_dict(), as_json, report.print_contents)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that llmsqueeze wrote")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a compressed folder to the Hub, with a model card."""
    with _friendly(debug):
        from llmsqueeze.hub import push as upload

        typer.echo(upload(folder, repo, private))


def _print(result: dict[str, Any], as_json: bool, printer: Any) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        printer(result)


def _hush() -> None:
    """The libraries' own bars and warnings would mix with ours."""
    import logging as standard_logging
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.evaluator", "lm_eval.api.task"):
        standard_logging.getLogger(name).setLevel(standard_logging.ERROR)
    quiet: Any = logging  # its functions are not annotated
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()


@contextmanager
def _friendly(debug: bool) -> Iterator[None]:
    """Turns errors into one line and an exit code; `debug` lets them through."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        _fail("interrupted; no half-written result was left under the final name", 130)
    except SqueezeError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        _fail(_unexpected(error), 2 if _out_of_memory(error) else 1)


def _unexpected(error: Exception) -> str:
    reason = first_line(error)
    if _out_of_memory(error):
        return f"out of memory: {reason}; fewer or shorter samples (--samples, --seq-len) or --device cpu need less"
    return f"unexpected {type(error).__name__}: {reason}; this is a defect, run again with --debug to see where"


def _out_of_memory(error: Exception) -> bool:
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or "can't allocate memory" in str(error)


def _fail(message: str, code: int) -> None:
    from llmsqueeze.report import print_error

    print_error(message)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
