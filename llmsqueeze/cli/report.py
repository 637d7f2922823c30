"""`llmsqueeze report`: write one HTML file about a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsqueeze.cli.options import Debug, Json
from llmsqueeze.cli.terminal import friendly, print_result


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that llmsqueeze wrote")],
    out: Annotated[Path | None, typer.Option(help="File to write. [<folder>/report.html]")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file about a compressed FOLDER: sizes, scores, bits and errors of every weight, its recipe."""
    with friendly(debug):
        from llmsqueeze.publish.report import write_report

        result = write_report(folder, out)
        print_result(result, as_json, lambda page: typer.echo(f"written to {page['out']}; open it in any browser"))
