"""Losses and divergences of some tokens, from the logits of a model and of its baseline, in float32.

On a CPU compiled loops (logit_loops.py) go through the logits twice; on other devices torch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.parallel.threads import over_rows


@dataclass(frozen=True)
class Divergence:
    """For each token: the losses of the model and of the baseline, and KL(baseline || model), float64 in nats; whether
    the most likely tokens differ, bool."""

    model: Tensor
    baseline: Tensor
    kl: Tensor
    changed: Tensor


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in nats per row of logits [tokens, vocabulary] -> float64 [tokens]."""
    logits = logits.float()
    if logits.device.type != "cpu":
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
    from llmsqueeze.evaluation.losses.logit_loops import normalisers

    z = torch.empty(len(logits), dtype=torch.float64)
    rows, out = _rows(logits), z.numpy()
    over_rows(len(logits), lambda first, last: normalisers(rows, first, last, out))
    return z - picked(logits, labels)


def divergence(model: Tensor, baseline: Tensor, labels: Tensor) -> Divergence:
    """From the logits [tokens, vocabulary] of both for the same tokens, and the tokens that follow [tokens]."""
    q, p = model.float(), baseline.float()
    if q.device.type != "cpu":
        return by_torch(q, p, labels)
    from llmsqueeze.evaluation.losses.logit_loops import pairs

    z_q, z_p, kl = torch.empty(3, len(q), dtype=torch.float64)
    changed = torch.empty(len(q), dtype=torch.int64)
    ours, theirs = _rows(q), _rows(p)
    sums = z_q.numpy(), z_p.numpy(), kl.numpy()
    over_rows(len(q), lambda first, last: pairs(ours, theirs, first, last, sums, changed.numpy()))
    return Divergence(z_q - picked(q, labels), z_p - picked(p, labels), kl.clamp(min=0), changed.bool())


def _rows(logits: Tensor) -> tuple[Any, int, int]:
    """float32 logits [tokens, vocabulary] for the loops: their memory, the distance of two rows, and the vocabulary."""
    logits = logits.detach()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    (tokens, vocabulary), apart = logits.shape, logits.stride(0)
    return logits.as_strided(((tokens - 1) * apart + vocabulary,), (1,)).numpy(), apart, vocabulary


def by_torch(q: Tensor, p: Tensor, labels: Tensor) -> Divergence:
    """`divergence` of float32 logits, one operation of torch after the other."""
    changed = q.argmax(-1) != p.argmax(-1)
    log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp(min=0)
    return Divergence(-picked(log_q, labels), -picked(log_p, labels), kl.double(), changed)


def picked(values: Tensor, labels: Tensor) -> Tensor:
    """float64 [tokens]: the value of each label in its row of `values` [tokens, vocabulary]."""
    return values.gather(1, labels[:, None])[:, 0].double()
