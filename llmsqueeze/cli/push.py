"""`llmsqueeze push`: upload a folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsqueeze.cli.options import Debug, Json, Quiet, TrustCode
from llmsqueeze.cli.terminal import friendly, hush, print_result


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that llmsqueeze wrote")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository. [private; an existing one stays as it is]"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files that a push would send; send and write nothing.")
    ] = False,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a compressed folder to the Hub, with a model card. Repeat a push that failed: it continues."""
    with friendly(debug):
        from llmsqueeze.cli.console import TerminalProgress
        from llmsqueeze.publish import push as hub

        hush()
        with TerminalProgress(quiet) as progress:
            result = hub.push(folder, repo, private, dry_run, trust_remote_code, progress)
        print_result(result, as_json, lambda pushed: typer.echo(hub.describe(pushed, folder)))
