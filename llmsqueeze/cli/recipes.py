"""`llmsqueeze recipes`: list the bundled recipes."""

from __future__ import annotations

from llmsqueeze.cli.options import Debug, Json
from llmsqueeze.cli.terminal import friendly, print_result


def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the bundled recipes; `--recipe NAME` uses one."""
    with friendly(debug):
        from llmsqueeze.cli.tables.runs import print_recipes
        from llmsqueeze.recipe.bundled import describe_recipes

        print_result({"recipes": describe_recipes()}, as_json, print_recipes)
