"""`llmsqueeze push`: upload a folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsqueeze.cli.options import TrustCode
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.progress import Progress


@verb
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
    *,
    progress: Progress,
) -> Outcome:
    """Upload a compressed folder to the Hub, with a model card. Repeat a push that failed: it continues."""
    from llmsqueeze.publish import push as hub

    hush()
    result = hub.push(folder, repo, private, dry_run, trust_remote_code, progress)
    return Outcome(result, lambda pushed: typer.echo(hub.describe(pushed, folder)))
