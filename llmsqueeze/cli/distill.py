"""`llmsqueeze distill`: train the scales of a compressed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze.cli.options import Adapter, Device, MergeAdapter, Overwrite, Revision, TrustCode, takes, written_to
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.distillation.options import DistillationOptions
from llmsqueeze.distillation.settings import make_distillation
from llmsqueeze.progress import Progress


@verb
@takes(DistillationOptions)
def distill(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    given: dict[str, Any],
    teacher: Annotated[str | None, typer.Option(help="The original model. [the model that FOLDER names]")] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the teacher's answers for another run. [not kept]"),
    ] = None,
    out: Annotated[Path | None, written_to("Folder to write. [<folder>-distilled]")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    adapter: Adapter = None,
    merge_adapter: MergeAdapter = False,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    *,
    progress: Progress,
) -> Outcome:
    """Train the scales in a compressed FOLDER towards the answers of the original; the size stays."""
    settings = make_distillation(given)

    from llmsqueeze.cli.tables.runs import print_distillation
    from llmsqueeze.distillation.distill import distill as distill_folder

    hush()
    summary = distill_folder(
        folder,
        teacher,
        settings,
        out,
        teacher_cache=teacher_cache,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        adapter=adapter,
        merge_adapter=merge_adapter,
        overwrite=overwrite,
        progress=progress,
    )
    return Outcome(summary, print_distillation)
