"""`llmsqueeze show`: print the contents of each weight."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsqueeze.cli.options import Debug, Json
from llmsqueeze.cli.terminal import friendly, print_result


def show(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id that llmsqueeze wrote")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the contents and the size of each weight of a compressed folder."""
    with friendly(debug):
        from llmsqueeze.cli.tables.results import print_contents
        from llmsqueeze.publish.show import contents

        print_result(contents(folder).as_dict(), as_json, print_contents)
