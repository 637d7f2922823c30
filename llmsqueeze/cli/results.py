"""The verbs about results: measure, compare, look into, check, report, push. cli.py has those that make them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsqueeze.cli.options import (
    MODEL_HELP,
    BatchSize,
    Debug,
    Device,
    EvaluationText,
    IncludePath,
    Json,
    Limit,
    Quiet,
    Tasks,
    TrustCode,
    Window,
)
from llmsqueeze.cli.terminal import friendly, hush, print_result
from llmsqueeze.errors import RecipeError


def register(app: typer.Typer) -> None:
    """Gives the app these verbs."""
    app.command("eval")(evaluate)
    app.command("report")(make_report)
    for verb in (compare, show, check, push):
        app.command()(verb)


def task_names(tasks: str | None) -> list[str]:
    """The names between the commas. Raises RecipeError for an option without any."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise RecipeError("--tasks is empty; name lm-eval tasks separated by commas, such as piqa,arc_easy")
    return names


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + "; compressed or not")],
    baseline: Annotated[str | None, typer.Option(help="Model to compare with, usually the original.")] = None,
    tasks: Tasks = None,
    text: EvaluationText = None,
    limit: Limit = None,
    seq_len: Window = None,
    include_path: IncludePath = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure MODEL: perplexity, divergence from a baseline, lm-eval tasks."""
    with friendly(debug):
        names = task_names(tasks)

        from llmsqueeze.cli import report, scoreboard
        from llmsqueeze.evaluation import evaluate as evaluation
        from llmsqueeze.model.original import pick_device

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
        print_result(result, as_json, scoreboard.print_evaluation)


def compare(
    model: Annotated[str, typer.Argument(help="The original: " + MODEL_HELP)],
    folders: Annotated[
        list[str] | None, typer.Argument(help="Folders or Hub ids made of it, by llmsqueeze or another tool")
    ] = None,
    bnb: Annotated[
        list[str] | None, typer.Option(help="nf4 or int8: the original in bitsandbytes, as well; repeatable.")
    ] = None,
    tasks: Tasks = None,
    text: EvaluationText = None,
    html: Annotated[Path | None, typer.Option(help="Write the comparison as a page as well.")] = None,
    limit: Limit = None,
    seq_len: Window = None,
    include_path: IncludePath = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure MODEL and FOLDERS under one harness: bytes, loss, divergence, changed tokens, tasks; and draw them."""
    with friendly(debug):
        names = task_names(tasks)

        from llmsqueeze.cli import report, scoreboard
        from llmsqueeze.evaluation import compare as comparing
        from llmsqueeze.evaluation.evaluate import choose_text
        from llmsqueeze.files import FRONTIER
        from llmsqueeze.formats.public import shown
        from llmsqueeze.model.original import pick_device
        from llmsqueeze.publish.page.comparison import write_page
        from llmsqueeze.publish.plots import draw_frontier
        from llmsqueeze.recipe.values import choice

        hush()
        if html is not None and (html.is_dir() or not html.parent.is_dir()):
            raise RecipeError(f"--html {html} cannot be written: name a file in a folder that exists")
        types = [choice(("nf4", "int8"))("bnb", one) for one in bnb or []]
        with report.TerminalProgress(quiet) as progress:
            result = comparing.compare(
                model,
                folders or [],
                bnb_types=types,
                text=choose_text(model, text, wanted=text is not None or not names),
                tasks=names,
                include_path=include_path,
                limit=limit,
                window=seq_len,
                batch_size=batch_size,
                device=pick_device(device),
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        kept = comparing.remember(result) if limit is None else []
        for folder in kept:
            draw_frontier(shown(result), Path(folder) / FRONTIER)
        print_result(result | {"kept_in": kept}, as_json, scoreboard.print_comparison)
        if html is not None:
            write_page(result, html)
        if result["left_out"]:
            raise typer.Exit(2)


def show(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id that llmsqueeze wrote")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what each weight of a compressed folder holds, and its size."""
    with friendly(debug):
        from llmsqueeze.cli import scoreboard
        from llmsqueeze.publish.show import contents

        print_result(contents(folder).as_dict(), as_json, scoreboard.print_contents)


def make_report(
    folder: Annotated[Path, typer.Argument(help="Folder that llmsqueeze wrote")],
    out: Annotated[Path | None, typer.Option(help="File to write. [<folder>/report.html]")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file about a compressed FOLDER: sizes, scores, bits and errors of every weight, its recipe."""
    with friendly(debug):
        from llmsqueeze.publish.page.report import write_report

        result = write_report(folder, out)
        print_result(result, as_json, lambda made: typer.echo(f"written to {made['out']}; open it in any browser"))


def check(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    target: Annotated[str | None, typer.Option(help="native, transformers or vllm. [all]")] = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that FOLDER is whole and sound, and what opens it; no model is run."""
    with friendly(debug):
        from llmsqueeze.cli import scoreboard
        from llmsqueeze.formats.check import check as check_folder

        hush()
        result = check_folder(folder, target, trust_remote_code)
        print_result(result, as_json, scoreboard.print_check)
        if not result["sound"] or (target and result["verdicts"][target]):
            raise typer.Exit(2)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that llmsqueeze wrote")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who sees a new repository. [private; one that exists stays as it is]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; send and write nothing.")] = False,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a compressed folder to the Hub, with a model card; a push that broke off goes on when it is repeated."""
    with friendly(debug):
        from llmsqueeze.cli import report
        from llmsqueeze.publish import push as hub

        hush()
        with report.TerminalProgress(quiet) as progress:
            result = hub.push(folder, repo, private, dry_run, trust_remote_code, progress)
        print_result(result, as_json, lambda pushed: typer.echo(hub.describe(pushed, folder)))
