"""Two models on the same documents: the difference of their scores, document by document.

If a document is right (1) or wrong (0), the documents that the two models answer alike say nothing of their difference.
Of the n others each falls either way with the same chance if the models are equally good, so the smaller side is
binomial: McNemar's exact test gives

    p = min(1, 2 sum_{k <= min(lost, won)} C(n, k) / 2^n)       lost: right -> wrong, won: wrong -> right
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from llmsqueeze.evaluation.tasks.scores import TaskScores


def paired_differences(after: TaskScores, before: TaskScores) -> dict[str, float]:
    """`<metric>_difference`, and over the documents that both answered: its standard error `_difference_stderr`, if it
    is the mean over them (not of groups whose tasks count alike), and of answers that are right or wrong
    `_right_to_wrong`, `_wrong_to_right` (counts) and `_mcnemar_p`."""
    differences: dict[str, float] = {}
    for metric, value in after.metrics.items():
        if metric.endswith("_stderr") or metric not in before.metrics:
            continue
        mine, theirs = after.documents.get(metric, {}), before.documents.get(metric, {})
        pairs = [(mine[document], theirs[document]) for document in mine if document in theirs]
        by_document, difference = [own - other for own, other in pairs], value - before.metrics[metric]
        differences[f"{metric}_difference"] = difference
        if len(pairs) > 1 and math.isclose(statistics.fmean(by_document), difference, abs_tol=1e-9):
            spread = statistics.stdev(by_document)
            differences[f"{metric}_difference_stderr"] = spread / math.sqrt(len(pairs))
        if pairs and all(one in (0, 1) for pair in pairs for one in pair):
            differences |= {f"{metric}_{key}": number for key, number in flips(pairs).items()}
    return differences


def flips(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of answers (after, before) that are right (1) or wrong (0): how many changed either way, and the p of that."""
    lost, won = pairs.count((0, 1)), pairs.count((1, 0))
    return {"right_to_wrong": lost, "wrong_to_right": won, "mcnemar_p": mcnemar(lost, won)}


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p of the exact test, 1 if nothing changed; exact up to the last rounding."""
    changed, term, ways = lost + won, 1, 0
    for k in range(min(lost, won) + 1):
        ways += term  # C(changed, k), in whole numbers
        term = term * (changed - k) // (k + 1)
    return min(1.0, float(2 * ways / (1 << changed)))
