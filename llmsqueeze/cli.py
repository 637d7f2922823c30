"""The command line: parse, one call, print. Heavy modules are imported by the command that needs them.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze import __version__
from llmsqueeze.errors import RecipeError
from llmsqueeze.options import settings_of, takes_distillation, takes_recipe
from llmsqueeze.terminal import friendly, hush, print_result

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
    with friendly(debug):
        settings = settings_of(given)

        from llmsqueeze import report
        from llmsqueeze.prepare import Source
        from llmsqueeze.run import quantize as quantize_model

        hush()
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
        print_result(summary, as_json, report.print_summary)


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
    with friendly(debug):
        settings = settings_of(given)
        if weights not in ("all", "none"):
            raise RecipeError(f"unknown weights {weights!r}; choose all or none")

        from llmsqueeze import report
        from llmsqueeze.planning import plan as plan_model
        from llmsqueeze.prepare import Source

        hush()
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
        print_result(result, as_json, report.print_plan)


@app.command()
def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come along; `--recipe NAME` uses one."""
    with friendly(debug):
        from llmsqueeze import report
        from llmsqueeze.recipes import describe_recipes

        print_result({"recipes": describe_recipes()}, as_json, report.print_recipes)


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
    with friendly(debug):
        from llmsqueeze.distillation.settings import make_distillation

        settings = make_distillation(given)

        from llmsqueeze import report
        from llmsqueeze.distilling import distill as distill_folder

        hush()
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
        print_result(summary, as_json, report.print_distillation)


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    to: Annotated[str, typer.Option(help="compressed-tensors (stock transformers, vLLM) or dense (anything).")],
    dtype: Annotated[str | None, typer.Option(help="For dense: bf16, fp16 or fp32. [the model's own]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [<folder>-<to>]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a compressed FOLDER in another format; nothing is rounded again."""
    with friendly(debug):
        from llmsqueeze import report
        from llmsqueeze.exporting import export as export_folder

        hush()
        with report.TerminalProgress(quiet) as progress:
            summary = export_folder(
                folder,
                to,
                out,
                dtype=dtype,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        print_result(summary, as_json, report.print_export)


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
    with friendly(debug):
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        if tasks is not None and not names:
            raise RecipeError("--tasks is empty; name lm-eval tasks separated by commas, such as piqa,arc_easy")

        from llmsqueeze import evaluate as evaluation
        from llmsqueeze import report
        from llmsqueeze.prepare import pick_device

        hush()
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
        print_result(result, as_json, report.print_evaluation)


@app.command()
def show(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id that llmsqueeze wrote")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what each weight of a compressed folder holds, and its size."""
    with friendly(debug):
        from llmsqueeze import report
        from llmsqueeze.show import contents

        print_result(contents(folder).as_dict(), as_json, report.print_contents)


@app.command()
def check(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    target: Annotated[str | None, typer.Option(help="native, transformers or vllm. [all]")] = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that FOLDER is whole and sound, and what opens it; no model is run."""
    with friendly(debug):
        from llmsqueeze import report
        from llmsqueeze.checking import check as check_folder

        hush()
        result = check_folder(folder, target, trust_remote_code)
        print_result(result, as_json, report.print_check)
        if not result["sound"] or (target and result["verdicts"][target]):
            raise typer.Exit(2)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that llmsqueeze wrote")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a compressed folder to the Hub, with a model card."""
    with friendly(debug):
        from llmsqueeze.hub import push as upload

        typer.echo(upload(folder, repo, private))


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
