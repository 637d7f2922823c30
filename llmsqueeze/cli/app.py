"""The command line: one file per verb. Each parses, makes one call, and prints; heavy modules are imported by the verb.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmsqueeze import __version__
from llmsqueeze.cli.check import check
from llmsqueeze.cli.command import Verb
from llmsqueeze.cli.compare import compare
from llmsqueeze.cli.distill import distill
from llmsqueeze.cli.eval import evaluate
from llmsqueeze.cli.export import export
from llmsqueeze.cli.generate import generate
from llmsqueeze.cli.plan import plan
from llmsqueeze.cli.push import push
from llmsqueeze.cli.quantize import quantize
from llmsqueeze.cli.recipes import recipes
from llmsqueeze.cli.report import report
from llmsqueeze.cli.show import show
from llmsqueeze.cli.threads import spin_little
from llmsqueeze.parallel import launched

app = typer.Typer(
    name="llmsqueeze",
    help="Compress the weights of large language models; evaluate, inspect and share the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (quantize, plan, recipes, distill, export):
    app.command(cls=Verb)(verb)
app.command("eval", cls=Verb)(evaluate)
for verb in (generate, compare, show, check, report, push):
    app.command(cls=Verb)(verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmsqueeze {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    spin_little()
    launched.command = ["llmsqueeze", *sys.argv[1:]]
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
