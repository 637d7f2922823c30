"""The command line: parse, one call, print. Heavy modules are imported by the command that needs them.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze import __version__
from llmsqueeze.cli import results
from llmsqueeze.cli.options import (
    MODEL_HELP,
    Debug,
    Device,
    Json,
    Quiet,
    Revision,
    TrustCode,
    settings_of,
    takes_distillation,
    takes_recipe,
)
from llmsqueeze.cli.terminal import friendly, hush, print_result
from llmsqueeze.errors import RecipeError

app = typer.Typer(
    name="llmsqueeze",
    help="Compress the weights of large language models; evaluate, inspect and share the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the result back and compare it with what was meant.")
    ] = True,
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

        from llmsqueeze.cli import report
        from llmsqueeze.compress.quantize import quantize as quantize_model
        from llmsqueeze.model.original import Source

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
                verify=verify,
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

        from llmsqueeze.cli import report
        from llmsqueeze.compress.plan import plan as plan_model
        from llmsqueeze.model.original import Source
        from llmsqueeze.publish import plots

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
            if plots.available():
                plots.draw_plan(result, Path(result["out"]))
            else:
                progress.note("no pictures: they need matplotlib (pip install 'llmsqueeze[plots]')")
        print_result(result, as_json, report.print_plan)


@app.command()
def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come along; `--recipe NAME` uses one."""
    with friendly(debug):
        from llmsqueeze.cli import report
        from llmsqueeze.recipe.bundled import describe_recipes

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

        from llmsqueeze.cli import report
        from llmsqueeze.distillation.distill import distill as distill_folder

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
    to: Annotated[
        str, typer.Option(help="compressed-tensors (stock transformers, vLLM), dense (anything), peft or gguf-map.")
    ],
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. [dense: the model's own; peft: fp32]")] = None,
    bits: Annotated[
        int | None, typer.Option(help="Width that coded weights are rounded to for compressed-tensors. [4]")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale then; -1: whole rows. [128, or what fits]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [<folder>-<to>]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a compressed FOLDER in another format; only coded weights are rounded again, for compressed-tensors."""
    with friendly(debug):
        from llmsqueeze.cli import report
        from llmsqueeze.formats.export import export as export_folder

        hush()
        with report.TerminalProgress(quiet) as progress:
            summary = export_folder(
                folder,
                to,
                out,
                dtype=dtype,
                bits=bits,
                group_size=group_size,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        print_result(summary, as_json, report.print_export)


results.register(app)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
