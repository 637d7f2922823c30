"""`llmsqueeze quantize`: compress a model into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze.cli.options import (
    FIRST,
    MODEL_HELP,
    Adapter,
    Device,
    FromQuantized,
    MergeAdapter,
    Overwrite,
    ProfileTime,
    Revision,
    TrustCode,
    takes_recipe,
    written_to,
)
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.progress import Progress, stopwatch


@verb
@takes_recipe
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    given: dict[str, Any],
    plan: Annotated[Path | None, typer.Option(help="Plan from `llmsqueeze plan`, as it is or edited.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Measurements from `llmsqueeze plan`.")] = None,
    out: Annotated[Path | None, written_to("Folder to write. [./<model>-<bits>bit]", FIRST)] = None,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Read the result back from disk and compare it with the computed weights."
        ),
    ] = True,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over, instead of going on with what a killed run has done.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Run even if memory or disk do not seem to suffice.")] = False,
    profile_time: ProfileTime = False,
    device: Device = "auto",
    adapter: Adapter = None,
    merge_adapter: MergeAdapter = False,
    from_quantized: FromQuantized = False,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    *,
    progress: Progress,
) -> Outcome:
    """Compress MODEL into a folder that transformers opens."""
    from llmsqueeze.cli.tables.runs import print_summary
    from llmsqueeze.compress.quantize import quantize as quantize_model
    from llmsqueeze.model.original import Source

    hush()
    with stopwatch.of_command(profile_time):
        summary = quantize_model(
            Source(model, revision, trust_remote_code, adapter, merge_adapter, from_quantized),
            given,
            out,
            plan=plan,
            profile=profile,
            device=device,
            overwrite=overwrite,
            verify=verify,
            restart=restart,
            force=force,
            progress=progress,
        )
    return Outcome(summary, print_summary)
