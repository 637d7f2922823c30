"""`llmsqueeze eval`: measure a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsqueeze.cli.measurement import takes_measurement
from llmsqueeze.cli.options import MODEL_HELP
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.parallel import launched
from llmsqueeze.progress import Progress


@verb
@takes_measurement
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + "; compressed or not")],
    baseline: Annotated[str | None, typer.Option(help="Model to compare with, usually the original.")] = None,
    *,
    given: dict[str, Any],
    progress: Progress,
) -> Outcome:
    """Measure MODEL: perplexity, divergence from a baseline, lm-eval tasks."""
    from llmsqueeze.cli.tables.results import print_evaluation
    from llmsqueeze.evaluation import evaluate as evaluation
    from llmsqueeze.evaluation.scores import save_scores

    hush()
    result = evaluation.evaluate(model, baseline, **given, progress=progress).as_dict()
    if not launched.follows():
        save_scores(model, result)
    return Outcome(result, print_evaluation)
