"""`llmsqueeze check`: check that a folder is whole, and which programs open it."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsqueeze.cli.options import TrustCode
from llmsqueeze.cli.terminal import Outcome, hush, verb


@verb
def check(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    target: Annotated[
        str | None, typer.Option(help="Program to check for: native, transformers or vllm. [all]")
    ] = None,
    trust_remote_code: TrustCode = False,
) -> Outcome:
    """Check that FOLDER is whole and sound, and which programs open it; run no model."""
    from llmsqueeze.cli.tables.results import print_check
    from llmsqueeze.formats.check import check as check_folder

    hush()
    result = check_folder(folder, target, trust_remote_code)
    met = result["sound"] and not (target and result["verdicts"][target])
    return Outcome(result, print_check, met)
