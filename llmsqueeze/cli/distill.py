"""`llmsqueeze distill`: train the scales of a compressed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze.cli.options import Debug, Device, Json, Overwrite, Quiet, Revision, TrustCode, takes
from llmsqueeze.cli.terminal import friendly, hush, print_result
from llmsqueeze.distillation.options import DistillationOptions
from llmsqueeze.distillation.settings import make_distillation


@takes(DistillationOptions)
def distill(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    given: dict[str, Any],
    teacher: Annotated[str | None, typer.Option(help="The original model. [the model that FOLDER names]")] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the teacher's answers for another run. [not kept]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [<folder>-distilled]")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the scales in a compressed FOLDER towards the answers of the original; the size stays."""
    with friendly(debug):
        settings = make_distillation(given)

        from llmsqueeze.cli.console import TerminalProgress
        from llmsqueeze.cli.tables.runs import print_distillation
        from llmsqueeze.distillation.distill import distill as distill_folder

        hush()
        with TerminalProgress(quiet) as progress:
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
        print_result(summary, as_json, print_distillation)
