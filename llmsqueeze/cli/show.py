"""`llmsqueeze show`: print the contents of each weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsqueeze.cli.terminal import Outcome, verb


@verb
def show(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id that llmsqueeze wrote")],
) -> Outcome:
    """Print the contents and the size of each weight of a compressed folder; of a `.partial`, how far its run is."""
    from llmsqueeze.cli.tables.results import print_contents
    from llmsqueeze.cli.tables.unfinished import print_unfinished
    from llmsqueeze.compress.unfinished import unfinished
    from llmsqueeze.publish.show import contents

    if (path := Path(folder)).name.endswith(".partial") and path.is_dir():
        return Outcome(unfinished(path).as_dict(), print_unfinished)
    return Outcome(contents(folder).as_dict(), print_contents)
