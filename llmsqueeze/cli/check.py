"""`llmsqueeze check`: check that a folder is whole, and which programs open it."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsqueeze.cli.options import Debug, Json, TrustCode
from llmsqueeze.cli.terminal import friendly, hush, print_result


def check(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    target: Annotated[
        str | None, typer.Option(help="Program to check for: native, transformers or vllm. [all]")
    ] = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that FOLDER is whole and sound, and which programs open it; run no model."""
    with friendly(debug):
        from llmsqueeze.cli.tables.results import print_check
        from llmsqueeze.formats.check import check as check_folder

        hush()
        result = check_folder(folder, target, trust_remote_code)
        print_result(result, as_json, print_check)
        if not result["sound"] or (target and result["verdicts"][target]):
            raise typer.Exit(2)
