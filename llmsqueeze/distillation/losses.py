"""Deviation-aware distillation: "DB-LLM: Accurate Dual-Binarization for Efficient LLMs" (arXiv 2402.11960).

    KD_i = - sum_v p_i[v] log q_i[v]                                   p teacher, q student, at token i
    a_i  = sqrt(Hn(p_i) * Hn(q_i)),  Hn = entropy / log V              how ambiguous the token is, 0 to 1, not trained
    L    = mean_i  w_i KD_i,         w_i = (1 + weight * a_i ** gamma) / mean of the same

p, q [tokens, V]; a, w [tokens]. The paper's formula is not published in full: this weighting is our reading of its
description, by which ambiguous tokens count more where the compressed model deviates. `gamma = 0` or `weight = 0` is
plain distillation, exactly.

What differs besides: the teacher's distribution is kept as its `k` largest probabilities, all others being one outcome,
"something else", for teacher and student alike; that is a lower bound of the divergence, and exact where k = V. What is
trained, trained.py has. Memory: a few copies of the logits [tokens, V].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """What the teacher says of some tokens: index and log_p [tokens, k], its log of the rest's mass [tokens] (-inf
    for none), its entropy [tokens] in nats."""

    index: Tensor
    log_p: Tensor
    log_rest: Tensor
    entropy: Tensor


def token_losses(logits: Tensor, teacher: Teacher) -> Tensor:
    """KD_i [tokens] for the student's `logits` [tokens, V]."""
    log_z = logits.logsumexp(dim=1)
    chosen = logits.gather(1, teacher.index) - log_z[:, None]
    loss = -(teacher.log_p.exp() * chosen).sum(dim=1)
    if teacher.index.shape[1] == logits.shape[1]:
        return loss
    rest = logits.scatter(1, teacher.index, -torch.inf).logsumexp(dim=1) - log_z
    return loss - teacher.log_rest.exp() * rest


def teacher_losses(teacher: Teacher) -> Tensor:
    """The least that `token_losses` can be [tokens]: the entropy of the teacher's kept outcomes."""
    least = -(teacher.log_p.exp() * teacher.log_p).sum(dim=1)
    rest = teacher.log_rest.clamp(min=-80)
    return least - rest.exp() * rest


def divergences(logits: Tensor, teacher: Teacher) -> Tensor:
    """KL(teacher || student) [tokens], nats, over the kept outcomes."""
    return token_losses(logits, teacher) - teacher_losses(teacher)


def token_weights(logits: Tensor, teacher: Teacher, weight: float, gamma: float) -> Tensor:
    """w_i [tokens] before they are brought to a mean of 1; no gradient flows through them."""
    log_q = logits.detach().log_softmax(dim=1)
    entropy = -(log_q.exp() * log_q).sum(dim=1)
    ambiguity = (entropy.clamp(min=0) * teacher.entropy.clamp(min=0)).sqrt() / math.log(logits.shape[1])
    return 1 + weight * ambiguity**gamma


def distillation_loss(logits: Tensor, teacher: Teacher, weight: float = 0.0, gamma: float = 1.0) -> Tensor:
    """L over the tokens: plain distillation with `weight` or `gamma` 0, else weighted by ambiguity."""
    losses = token_losses(logits, teacher)
    if not weight or not gamma:
        return losses.mean()
    weights = token_weights(logits, teacher, weight, gamma)
    return (losses * weights).sum() / weights.sum()
