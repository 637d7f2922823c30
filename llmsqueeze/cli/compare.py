"""`llmsqueeze compare`: measure models beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmsqueeze.cli.measurement import takes_measurement
from llmsqueeze.cli.methods import takes_methods
from llmsqueeze.cli.options import MODEL_HELP
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.errors import RecipeError
from llmsqueeze.parallel import launched
from llmsqueeze.progress import Progress


@verb
@takes_measurement
@takes_methods
def compare(
    model: Annotated[str, typer.Argument(help="The original: " + MODEL_HELP)],
    folders: Annotated[
        list[str] | None,
        typer.Argument(help="Compressed folders or Hub ids of the same model, by llmsqueeze or another tool"),
    ] = None,
    bnb: Annotated[
        list[str] | None, typer.Option(help="Also measure the original in bitsandbytes: nf4 or int8; repeatable.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the comparison as an HTML page.")] = None,
    *,
    methods: dict[str, Any] | None,
    given: dict[str, Any],
    progress: Progress,
) -> Outcome:
    """Measure MODEL and FOLDERS, or results of --methods, in one harness: bytes, loss, divergence, changed tokens,
    tasks; draw the result."""
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
    compared = list(folders or [])
    if methods is not None:
        from llmsqueeze.compress.several import quantize_each
        from llmsqueeze.model.original import Source

        comparing.refuse_unreadable(model, given, progress)  # before hours of compression
        source = Source(model, trust_remote_code=given["trust_remote_code"])
        compared += quantize_each(source, **methods, device=given["device"], progress=progress)
    result = comparing.compare(model, compared, bnb_types=types, **given, progress=progress)
    if launched.follows():
        return Outcome(result, print_comparison, met=not result["left_out"])
    kept = comparing.save_comparison(result)
    for folder in kept:
        with progress.beside(f"no picture in {folder}"):
            draw_frontier(shown(result), Path(folder) / FRONTIER)
    if html is not None:
        with progress.beside(f"no page {html}"):
            write_page(result, html)
    return Outcome(result | {"kept_in": kept}, print_comparison, met=not result["left_out"])
