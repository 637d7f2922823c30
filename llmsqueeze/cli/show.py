"""`llmsqueeze show`: print the contents of each weight."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsqueeze.cli.terminal import Outcome, verb


@verb
def show(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id that llmsqueeze wrote")],
) -> Outcome:
    """Print the contents and the size of each weight of a compressed folder."""
    from llmsqueeze.cli.tables.results import print_contents
    from llmsqueeze.publish.show import contents

    return Outcome(contents(folder).as_dict(), print_contents)
