"""`llmsqueeze compare`: measure models beside each other."""

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
    task_names,
)
from llmsqueeze.cli.terminal import friendly, hush, print_result
from llmsqueeze.errors import RecipeError


def compare(
    model: Annotated[str, typer.Argument(help="The original: " + MODEL_HELP)],
    folders: Annotated[
        list[str] | None,
        typer.Argument(help="Compressed folders or Hub ids of the same model, by llmsqueeze or another tool"),
    ] = None,
    bnb: Annotated[
        list[str] | None, typer.Option(help="Also measure the original in bitsandbytes: nf4 or int8; repeatable.")
    ] = None,
    tasks: Tasks = None,
    text: EvaluationText = None,
    html: Annotated[Path | None, typer.Option(help="Also write the comparison as an HTML page.")] = None,
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
    """Measure MODEL and FOLDERS in one harness: bytes, loss, divergence, changed tokens, tasks; draw the result."""
    with friendly(debug):
        names = task_names(tasks)

        from llmsqueeze.cli.console import TerminalProgress
        from llmsqueeze.cli.tables.results import print_comparison
        from llmsqueeze.evaluation import compare as comparing
        from llmsqueeze.files import FRONTIER
        from llmsqueeze.formats.public import shown
        from llmsqueeze.publish.page.comparison import write_page
        from llmsqueeze.publish.plots.draw import draw_frontier
        from llmsqueeze.recipe.values import choice

        hush()
        if html is not None and (html.is_dir() or not html.parent.is_dir()):
            raise RecipeError(f"--html {html} cannot be written: name a file in a folder that exists")
        types = [choice(("nf4", "int8"))("bnb", one) for one in bnb or []]
        with TerminalProgress(quiet) as progress:
            result = comparing.compare(
                model,
                folders or [],
                bnb_types=types,
                text=text,
                tasks=names,
                include_path=include_path,
                limit=limit,
                window=seq_len,
                batch_size=batch_size,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        kept = comparing.save_comparison(result) if limit is None else []
        for folder in kept:
            draw_frontier(shown(result), Path(folder) / FRONTIER)
        print_result(result | {"kept_in": kept}, as_json, print_comparison)
        if html is not None:
            write_page(result, html)
        if result["left_out"]:
            raise typer.Exit(2)
