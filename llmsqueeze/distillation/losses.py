"""Deviation-aware distillation: "DB-LLM: Accurate Dual-Binarization for Efficient LLMs" (arXiv 2402.11960).

    KD_i = - sum_v p_i[v] log q_i[v]                                   p teacher, q student, at token i
    a_i  = sqrt(Hn(p_i) * Hn(q_i)),  Hn = entropy / log V              how ambiguous the token is, 0 to 1, not trained
    L    = mean_i  w_i KD_i,         w_i = (1 + weight * a_i ** gamma) / mean of the same

p, q [tokens, V]; a, w [tokens]. The paper does not publish its formula in full. This weighting is our reading of its
description: ambiguous tokens count more. `gamma = 0` or `weight = 0` is exactly plain distillation.

What else differs: of the teacher's distribution only the `k` largest probabilities are kept. All other tokens are one
outcome, for teacher and student alike. So the divergence is a lower bound, and exact if k = V. Memory: a few copies of
the logits [tokens, V].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """The teacher's distributions of the next token, in nats.

    index, log_p [tokens, k]: the k most likely tokens. log_rest [tokens]: log of the probability of all others, -inf if
    there are none. entropy [tokens]: of the whole distribution.
    """

    index: Tensor
    log_p: Tensor
    log_rest: Tensor
    entropy: Tensor


def cross_entropies(logits: Tensor, teacher: Predictions) -> Tensor:
    """KD_i [tokens] for the student's `logits` [tokens, V]."""
    log_z = logits.logsumexp(dim=1)
    chosen = logits.gather(1, teacher.index) - log_z[:, None]
    loss = -(teacher.log_p.exp() * chosen).sum(dim=1)
    if teacher.index.shape[1] == logits.shape[1]:
        return loss
    rest = logits.scatter(1, teacher.index, -torch.inf).logsumexp(dim=1) - log_z
    return loss - teacher.log_rest.exp() * rest


def least_cross_entropies(teacher: Predictions) -> Tensor:
    """The least value of `cross_entropies` [tokens]: the entropy of the teacher's kept outcomes."""
    least = -(teacher.log_p.exp() * teacher.log_p).sum(dim=1)
    rest = teacher.log_rest.clamp(min=-80)
    return least - rest.exp() * rest


def kl_from_teacher(logits: Tensor, teacher: Predictions) -> Tensor:
    """KL(teacher || student) over the kept outcomes, in nats [tokens], for the student's `logits` [tokens, V]."""
    return cross_entropies(logits, teacher) - least_cross_entropies(teacher)


def token_weights(logits: Tensor, teacher: Predictions, weight: float, gamma: float) -> Tensor:
    """w_i [tokens] before the division by their mean; without a gradient."""
    log_q = logits.detach().log_softmax(dim=1)
    entropy = -(log_q.exp() * log_q).sum(dim=1)
    ambiguity = (entropy.clamp(min=0) * teacher.entropy.clamp(min=0)).sqrt() / math.log(logits.shape[1])
    return 1 + weight * ambiguity**gamma


def distillation_loss(logits: Tensor, teacher: Predictions, weight: float = 0.0, gamma: float = 1.0) -> Tensor:
    """L, a scalar in nats per token: plain distillation if `weight` or `gamma` is 0, else weighted by ambiguity."""
    losses = cross_entropies(logits, teacher)
    if not weight or not gamma:
        return losses.mean()
    weights = token_weights(logits, teacher, weight, gamma)
    return (losses * weights).sum() / weights.sum()
