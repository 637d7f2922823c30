"""`llmsqueeze recipes`: list the bundled recipes."""

from __future__ import annotations

from llmsqueeze.cli.terminal import Outcome, verb


@verb
def recipes() -> Outcome:
    """List the bundled recipes; `--recipe NAME` uses one."""
    from llmsqueeze.cli.tables.runs import print_recipes
    from llmsqueeze.recipe.bundled import describe_recipes

    return Outcome({"recipes": describe_recipes()}, print_recipes)
