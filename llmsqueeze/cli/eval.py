"""`llmsqueeze eval`: measure a model."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsqueeze.cli.options import (
    MODEL_HELP,
    BatchSize,
    Debug,
    Device,
    EvaluationText,
    IncludePath,
    Json,
    Limit,
    Quiet,
    Tasks,
    TrustCode,
    Window,
    task_names,
)
from llmsqueeze.cli.terminal import friendly, hush, print_result


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + "; compressed or not")],
    baseline: Annotated[str | None, typer.Option(help="Model to compare with, usually the original.")] = None,
    tasks: Tasks = None,
    text: EvaluationText = None,
    limit: Limit = None,
    seq_len: Window = None,
    include_path: IncludePath = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure MODEL: perplexity, divergence from a baseline, lm-eval tasks."""
    with friendly(debug):
        names = task_names(tasks)

        from llmsqueeze.cli.console import TerminalProgress
        from llmsqueeze.cli.tables.results import print_evaluation
        from llmsqueeze.evaluation import evaluate as evaluation
        from llmsqueeze.evaluation.scores import save_scores

        hush()
        with TerminalProgress(quiet) as progress:
            result = evaluation.evaluate(
                model,
                baseline=baseline,
                text=text,
                tasks=names,
                include_path=include_path,
                limit=limit,
                window=seq_len,
                batch_size=batch_size,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress,
            ).as_dict()
        if limit is None:
            save_scores(model, result)
        print_result(result, as_json, print_evaluation)
