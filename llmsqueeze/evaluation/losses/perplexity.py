"""Perplexity of a model on text, and its KL divergence from a baseline.

    perplexity = exp(mean_t nll_t)                       nll_t = -log q_t[token t], q_t the model's distribution
    KL_t = sum_v p_t[v] (log p_t[v] - log q_t[v])        p_t the baseline's distribution; all in nats

t runs over the tokens that count, as windows.py says. Losses are float32. A standard error treats the windows as the
independent units, and the mean as a ratio of sums, because the last window may be shorter. Memory: the head's inputs
for one batch of 4096 tokens, and the logits of both models for a slice of it (slices.py), at most LOGITS_BYTES each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.evaluation.losses.divergence import divergence, token_losses
from llmsqueeze.evaluation.losses.slices import Logits, sliced
from llmsqueeze.evaluation.losses.windows import Windows
from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.evaluation.scores import Evaluation, Scores
from llmsqueeze.model.config import vocabulary
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress

T = TypeVar("T")
Batch = tuple[Tensor, int]  # tokens [rows, length]; how many of the last tokens of each row count
BATCH_TOKENS = 4096
LOGITS_BYTES = 128 << 20  # of one model's logits in float32, at a time


@dataclass(frozen=True)
class PairedLosses:
    """A model beside a baseline: losses per window [predicted tokens] float64, KL [tokens] float64, changed tokens."""

    model: list[Tensor]
    baseline: list[Tensor]
    kl: Tensor
    changed: int

    @property
    def differences(self) -> list[Tensor]:
        """Per window [predicted tokens]: the model's loss minus the baseline's."""
        return [a - b for a, b in zip(self.model, self.baseline, strict=True)]

    @property
    def nll_difference(self) -> float:
        """Mean over all tokens, nats."""
        return float(torch.cat(self.differences).mean())

    @property
    def kl_mean(self) -> float:
        """Mean over all tokens, nats."""
        return float(self.kl.mean())


def score_text(opened: OpenModel, baseline: OpenModel | None, windows: Windows, progress: Progress) -> Evaluation:
    """Scores on the windows of a text. Raises UnsupportedError if the two vocabularies differ in size."""
    if baseline is None:
        own = losses(opened, windows.rows, progress, windows.counted)
        return Evaluation(text_scores(opened, own), window=windows.length)
    pair = paired_losses(opened, baseline, windows.rows, progress, windows.counted)
    scores = replace(
        text_scores(opened, pair.model),
        kl_mean=pair.kl_mean,
        kl_p99=float(pair.kl.kthvalue(max(1, math.ceil(0.99 * len(pair.kl)))).values),
        top1_changed=pair.changed / len(pair.kl),
    )
    same = replace(text_scores(baseline, pair.baseline), kl_mean=0.0, kl_p99=0.0, top1_changed=0.0)
    return Evaluation(
        scores,
        same,
        window=windows.length,
        nll_difference=pair.nll_difference,
        nll_difference_stderr=standard_error(pair.differences),
    )


def no_scores(opened: OpenModel) -> Scores:
    """The scores of a model before anything is measured."""
    return Scores(opened.name, computed_in=opened.computed_in)


def text_scores(opened: OpenModel, per_window: list[Tensor]) -> Scores:
    """Perplexity, its standard error and the count of tokens, from the losses in each window."""
    every = torch.cat(per_window)
    perplexity = math.exp(min(float(every.mean()), 700.0))
    error = standard_error(per_window)
    stderr = None if error is None else perplexity * error
    return replace(no_scores(opened), perplexity=perplexity, perplexity_stderr=stderr, tokens=len(every))


@torch.no_grad()
def losses(
    opened: OpenModel, rows: Sequence[Tensor], progress: Progress, counted: Sequence[int] | None = None
) -> list[Tensor]:
    """The losses of the last `counted` tokens of each row [1, length], in nats: float64 [counted]; by default of all
    that have one before them, length - 1."""
    batches, logits = list(_batches(rows, counted)), sliced(opened.model, rows[0])

    def of_batch(given: Batch) -> list[Tensor]:
        batch = given[0]
        parts = [token_losses(one, labels).cpu() for (one,), labels in _slices([logits], opened, *given)]
        return list(torch.cat(parts).view(len(batch), -1).unbind())

    return [losses for batch in _shared(batches, of_batch, progress) for losses in batch]


def _shared(batches: Sequence[Batch], of_batch: Callable[[Batch], T], progress: Progress) -> list[T]:
    """of_batch(batch) for every batch; each process takes some."""
    own = processes.turns(len(batches))
    values = [of_batch(batches[number]) for number in progress.over(own, "text", len(own))]
    return processes.all_of(own, values, len(batches))


@torch.no_grad()
def paired_losses(
    opened: OpenModel,
    baseline: OpenModel,
    rows: Sequence[Tensor],
    progress: Progress,
    counted: Sequence[int] | None = None,
) -> PairedLosses:
    """The losses of both models on each row, as `losses`, and the divergences.

    Raises UnsupportedError for other vocabularies.
    """
    if vocabulary(opened.model.config) != vocabulary(baseline.model.config):
        raise UnsupportedError("model and baseline have vocabularies of different size, so they cannot be compared")
    batches, both = list(_batches(rows, counted)), [sliced(one.model, rows[0]) for one in (opened, baseline)]

    def of_batch(given: Batch) -> PairedLosses:
        batch = given[0]
        parts = [divergence(q, p, labels) for (q, p), labels in _slices(both, opened, *given)]
        own, others = (
            list(torch.cat(losses).cpu().view(len(batch), -1).unbind())
            for losses in ([one.model for one in parts], [one.baseline for one in parts])
        )
        kl = torch.cat([one.kl.cpu() for one in parts])
        return PairedLosses(own, others, kl, sum(int(one.changed.sum()) for one in parts))

    measured = _shared(batches, of_batch, progress)
    return PairedLosses(
        [losses for one in measured for losses in one.model],
        [losses for one in measured for losses in one.baseline],
        torch.cat([one.kl for one in measured]),
        sum(one.changed for one in measured),
    )


def _batches(rows: Sequence[Tensor], counted: Sequence[int] | None) -> Iterator[Batch]:
    """Rows of equal length of which equally many tokens count, several at a time."""
    size = max(1, BATCH_TOKENS // rows[0].shape[1])
    kinds = [(row.shape[1], row.shape[1] - 1 if counted is None else counted[i]) for i, row in enumerate(rows)]
    for start in range(0, len(rows), size):
        chunk = range(start, min(start + size, len(rows)))
        for kind in dict.fromkeys(kinds[i] for i in chunk):
            yield torch.cat([rows[i] for i in chunk if kinds[i] == kind]), kind[1]


def _slices(
    models: Sequence[Logits], opened: OpenModel, batch: Tensor, counted: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Over the last `counted` tokens of each row of `batch` [rows, length]: logits [slice, vocabulary] per model that
    predict them, and the tokens [slice]. The vocabulary and the device are those of `opened`.
    """
    labels = batch[:, -counted:].flatten().to(opened.model.device)
    size = max(1, LOGITS_BYTES // (4 * vocabulary(opened.model.config)))
    states = [model.states(batch)[:, -counted - 1 : -1].flatten(0, 1) for model in models]
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield [model.logits(own[part]) for model, own in zip(models, states, strict=True)], labels[part]


def standard_error(per_window: list[Tensor]) -> float | None:
    """Standard error of the mean over all tokens, with the windows as the independent units; None for one window."""
    if len(per_window) < 2:
        return None
    tokens = sum(len(values) for values in per_window)
    mean = float(torch.cat(per_window).mean())
    spread = sum((float(values.sum()) - mean * len(values)) ** 2 for values in per_window)
    return math.sqrt(spread * len(per_window) / (len(per_window) - 1)) / tokens
