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
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    bits: Annotated[int | None, typer.Option(help="Width of a code, 2 to 8. [3]")] = None,
    method: Annotated[str | None, typer.Option(help="descent, gwq, gptq or rtn. [descent]")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1: whole rows. [128]")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Grid. [symmetric]")] = None,
    quantizer: Annotated[str | None, typer.Option(help="For gwq: descent, gptq or rtn. [descent]")] = None,
    outliers: Annotated[float | None, typer.Option(help="For gwq: fraction kept at 16 bits. [0.01]")] = None,
    outlier_ranking: Annotated[
        str | None,
        typer.Option(help="gradient, gradient-weight, gradient-error, magnitude or random. [gradient]"),
    ] = None,
    outlier_scope: Annotated[str | None, typer.Option(help="layer (per matrix) or global. [layer]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file (txt, jsonl) or Hub data set name[:config[:split]]. [WikiText-2 train]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples. [128]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sample, at most the context. [2048]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of whatever is random. [0]")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of linears to leave alone; repeatable.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with these settings; options win over it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [./<model>-<bits>bit]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    device: Device = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into a folder that transformers opens."""
    with _friendly(debug):
        from llmsqueeze.recipe import make_recipe, read_recipe

        options = {
            "bits": bits,
            "method": method,
            "group_size": group_size,
            "symmetric": symmetric,
            "quantizer": quantizer,
            "outliers": outliers,
            "outlier_ranking": outlier_ranking,
            "outlier_scope": outlier_scope,
            "calibration": calibration,
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
            "skip": skip or None,
        }
        given = {key: value for key, value in options.items() if value is not None}
        wanted = make_recipe((read_recipe(recipe) if recipe else {}) | given)
        folder = out or Path(f"{Path(model).expanduser().resolve().name}-{wanted.bits}bit")

        from llmsqueeze import compress, report

        _hush()
        with report.TerminalProgress(quiet) as progress:
            summary = compress.quantize(
                model,
                wanted,
                folder,
                device=device,
                overwrite=overwrite,
                revision=revision,
                trust_remote_code=trust_remote_code,
                progress=progress,
            ).as_dict()
        _print(summary, as_json, report.print_summary)


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
        from llmsqueeze.compress import pick_device

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
