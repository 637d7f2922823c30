"""Perplexity of a model on text, and its KL divergence from a baseline.

    perplexity = exp(mean_t nll_t)                       nll_t = -log q_t[token t], q_t the model's distribution
    KL_t = sum_v p_t[v] (log p_t[v] - log q_t[v])        p_t the baseline's distribution; all in nats

The windows cover the whole text and do not overlap. Each begins with BOS if the tokenizer has one, and t runs over all
tokens after the first of each window. Losses are float32. A standard error treats the windows as the independent
units, and the mean as a ratio of sums, because the last window may be shorter. Memory: the head's inputs for one batch
of 4096 tokens, and the logits of both models for a slice of it (slices.py), at most LOGITS_BYTES each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.evaluation.divergence import divergence, token_losses
from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.evaluation.scores import Evaluation, Scores
from llmsqueeze.evaluation.slices import Logits, sliced
from llmsqueeze.model.config import context_length, vocabulary
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress

T = TypeVar("T")
BATCH_TOKENS = 4096
DEFAULT_WINDOW = 2048
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


def choose_window(opened: OpenModel, length: int | None) -> int:
    """Tokens in a window of text: `length`, but no more than the context; by default the context, at most 2048."""
    context = context_length(opened.model.config) or DEFAULT_WINDOW
    return min(length or min(context, DEFAULT_WINDOW), context)


def score_text(opened: OpenModel, baseline: OpenModel | None, rows: Sequence[Tensor], progress: Progress) -> Evaluation:
    """Scores on token rows [1, length]. Raises UnsupportedError if the two vocabularies differ in size."""
    window = rows[0].shape[1]
    if baseline is None:
        return Evaluation(text_scores(opened, losses(opened, rows, progress)), window=window)
    pair = paired_losses(opened, baseline, rows, progress)
    scores = replace(
        text_scores(opened, pair.model),
        kl_mean=pair.kl_mean,
        kl_p99=float(pair.kl.kthvalue(max(1, math.ceil(0.99 * len(pair.kl)))).values),
        top1_changed=pair.changed / len(pair.kl),
    )
    same = replace(text_scores(baseline, pair.baseline), kl_mean=0.0, kl_p99=0.0, top1_changed=0.0)
    return Evaluation(scores, same, None, window, pair.nll_difference, standard_error(pair.differences))


def no_scores(opened: OpenModel) -> Scores:
    """The scores of a model before anything is measured."""
    return Scores(opened.name, computed_in=opened.computed_in)


def text_scores(opened: OpenModel, per_window: list[Tensor]) -> Scores:
    """Perplexity, its standard error and the count of tokens, from the losses in each window."""
    every = torch.cat(per_window)
    perplexity = math.exp(min(float(every.mean()), 700.0))
    stderr = perplexity * standard_error(per_window)
    return replace(no_scores(opened), perplexity=perplexity, perplexity_stderr=stderr, tokens=len(every))


@torch.no_grad()
def losses(opened: OpenModel, rows: Sequence[Tensor], progress: Progress) -> list[Tensor]:
    """The losses of each row [1, length], in nats: float64 [length - 1]."""
    batches, logits = list(_batches(rows)), sliced(opened.model, rows[0])

    def of_batch(batch: Tensor) -> list[Tensor]:
        parts = [token_losses(one, labels).cpu() for (one,), labels in _slices([logits], opened, batch)]
        return list(torch.cat(parts).view(len(batch), -1).unbind())

    return [losses for batch in _shared(batches, of_batch, progress) for losses in batch]


def _shared(batches: Sequence[Tensor], of_batch: Callable[[Tensor], T], progress: Progress) -> list[T]:
    """of_batch(batch) for every batch; each process takes some."""
    own = processes.turns(len(batches))
    values = [of_batch(batches[number]) for number in progress.over(own, "text", len(own))]
    return processes.all_of(own, values, len(batches))


@torch.no_grad()
def paired_losses(opened: OpenModel, baseline: OpenModel, rows: Sequence[Tensor], progress: Progress) -> PairedLosses:
    """The losses of both models on each row, and the divergences. Raises UnsupportedError for other vocabularies."""
    if vocabulary(opened.model.config) != vocabulary(baseline.model.config):
        raise UnsupportedError("model and baseline have vocabularies of different size, so they cannot be compared")
    batches, both = list(_batches(rows)), [sliced(one.model, rows[0]) for one in (opened, baseline)]

    def of_batch(batch: Tensor) -> PairedLosses:
        parts = [divergence(q, p, labels) for (q, p), labels in _slices(both, opened, batch)]
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


def _batches(rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Rows of equal length, several at a time."""
    size = max(1, BATCH_TOKENS // rows[0].shape[1])
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        for length in dict.fromkeys(row.shape[1] for row in chunk):
            yield torch.cat([row for row in chunk if row.shape[1] == length])


def _slices(models: Sequence[Logits], opened: OpenModel, batch: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Over the predicted tokens of `batch` [rows, length]: logits [slice, vocabulary] per model, next tokens [slice].

    The vocabulary and the device are those of `opened`.
    """
    labels = batch[:, 1:].flatten().to(opened.model.device)
    size = max(1, LOGITS_BYTES // (4 * vocabulary(opened.model.config)))
    states = [model.states(batch)[:, :-1].flatten(0, 1) for model in models]
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield [model.logits(own[part]) for model, own in zip(models, states, strict=True)], labels[part]


def standard_error(per_window: list[Tensor]) -> float:
    """Standard error of the mean over all tokens, with the windows as the independent units; 0 for one window."""
    if len(per_window) < 2:
        return 0.0
    tokens = sum(len(values) for values in per_window)
    mean = float(torch.cat(per_window).mean())
    spread = sum((float(values.sum()) - mean * len(values)) ** 2 for values in per_window)
    return math.sqrt(spread * len(per_window) / (len(per_window) - 1)) / tokens
