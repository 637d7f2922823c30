"""`llmsqueeze plan`: measure and decide; compress nothing."""

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
    ProfileTime,
    Revision,
    TrustCode,
    takes_recipe,
    written_to,
)
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.errors import RecipeError
from llmsqueeze.progress import Progress, stopwatch


@verb
@takes_recipe
def plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    given: dict[str, Any],
    weights: Annotated[
        str,
        typer.Option(help="all; or none: predict only sizes, from config.json, with the same widths in every linear."),
    ] = "all",
    trial: Annotated[bool, typer.Option(help="Compress two blocks to predict time and memory.")] = True,
    processes: Annotated[
        int, typer.Option(min=1, max=16, help="Predict the time that so many processes take together.")
    ] = 1,
    out: Annotated[Path | None, written_to("Folder for plan and profile. [./<model>-plan]", FIRST)] = None,
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
    """Measure MODEL, decide the width of every weight within a budget, write plan.yaml; compress nothing."""
    if weights not in ("all", "none"):
        raise RecipeError(f"unknown weights {weights!r}; choose all or none")

    from llmsqueeze.cli.tables.plans import print_plan
    from llmsqueeze.compress.plan import plan as plan_model
    from llmsqueeze.model.original import Source
    from llmsqueeze.publish.plots.draw import draw_plan
    from llmsqueeze.publish.plots.figure import available

    hush()
    with stopwatch.of_command(profile_time):
        result = plan_model(
            Source(model, revision, trust_remote_code, adapter, merge_adapter, from_quantized),
            given,
            out,
            device=device,
            weights=weights == "all",
            trial=trial,
            shared_among=processes,
            progress=progress,
        )
    if available():
        with progress.beside("no pictures"):
            draw_plan(result, Path(result["out"]))
    else:
        progress.note("no pictures: they need matplotlib (pip install 'llmsqueeze[plots]')")
    return Outcome(result, print_plan)
