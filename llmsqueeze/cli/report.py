"""`llmsqueeze report`: write one HTML file about a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsqueeze.cli.options import written_to
from llmsqueeze.cli.terminal import Outcome, verb


@verb
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that llmsqueeze wrote")],
    out: Annotated[Path | None, written_to("File to write. [<folder>/report.html]")] = None,
) -> Outcome:
    """Write one HTML file about a compressed FOLDER: sizes, scores, bits and errors of every weight, its recipe."""
    from llmsqueeze.publish.report import write_report

    result = write_report(folder, out)
    return Outcome(result, lambda page: typer.echo(f"written to {page['out']}; open it in any browser"))
