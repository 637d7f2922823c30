"""How much the weights at the two ends of a model count: embeddings and head.

    embeddings  a row is added to the stream wherever its token stands:
                cost = 1/2 * sum_v f[v] * d_v G d_v^T,   f[v] = (times v occurs + 1/2) / labels, G = mean of g g^T
    head        a row makes one logit:
                cost = 1/2 * sum_v q[v] * d_v X d_v^T,   q[v] = mean of p[v] (1 - p[v]), X = mean of x x^T
    tied        one weight is both; its second moments are the two, by the rows' total each, and a row's share is that
                of its trace:  H = F G + Q X,  w[v] = (f[v] tr G + q[v] tr X) / tr H,  F = sum of f, Q = sum of q

g [width] is the gradient of the summed loss at what the embeddings give, x the head's input, p the model's probability
of token v, which makes p (1 - p) the mean squared gradient of the logit where labels are drawn from the model. The half
token of every row is the prior that keeps a row alive which the calibration text does not use. Embeddings that multiply
their rows are found by how much larger their results are. Soft caps on logits are not followed.
Memory: three matrices [width, width], two numbers per token of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.measure.moments import SecondMoments
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.parallel import processes
from llmsqueeze.parallel.shares import Sums
from llmsqueeze.progress.stopwatch import timed

UNSEEN = 0.5  # occurrences that every token has beforehand


class Ends:
    """Sums up what embeddings and head see over the samples of a walk."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.device, self.names = walk, walk.device, walk.skeleton.ends
        vocabulary, width = walk.skeleton.embedding_shape
        self.of_head, self.of_embeddings = Sums(), Sums()
        self.vocabulary = vocabulary
        self.gradients = SecondMoments(width, torch.float32, self.device, self.of_embeddings)
        self.inputs = SecondMoments(width, torch.float32, self.device, self.of_head)
        self.scale = 0.0

    @property
    def labels(self) -> int:
        """How many labels were seen."""
        return self.inputs.tokens

    @timed("moments")
    def see_head(self, probability: Tensor, x: Tensor) -> None:
        """Probabilities [some, vocabulary] and head inputs [some, width] of some tokens."""
        self.of_head.add("logits", probability.sum(dim=0) - probability.square().sum(dim=0))
        self.inputs.add(x)

    @timed("moments")
    def see_embeddings(self, sample: int, gradient: Tensor) -> None:
        """The gradient of the sample's mean loss at the first block's input. What is outside the blocks is resident."""
        tokens = self.walk.samples[sample][0].to(self.device)
        self.of_embeddings.add("counts", torch.bincount(tokens, minlength=self.vocabulary).float())
        given, gradient = self.walk.embedding_gradient(sample, gradient)
        of_sum = gradient[0] * (len(tokens) - 1)
        self.gradients.add(of_sum)
        if not self.scale:
            rows = self.weight(self.names[0])[tokens]
            scale = float((rows * given[0]).sum() / rows.square().sum().clamp(min=1e-30))
            self.scale = processes.told(scale)

    def seen(self, sample: int) -> None:
        """All of a sample was seen, of the head or of the embeddings, whichever is their turn."""
        if sample in self.walk.shares.ends:
            of_turn = self.of_head if self.of_head.shares < len(self.walk.shares.ends) else self.of_embeddings
            of_turn.fold(self.walk.shares.ends[sample])

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> second moments [width, width] and how much each row counts [vocabulary]; nothing can be seen
        afterwards."""
        G, X = (moments.shrunk(moments.mean())[0] for moments in (self.gradients, self.inputs))
        G *= self.scale**2
        logits, counts = self.of_head.total()["logits"], self.of_embeddings.total()["counts"]
        q = logits.to(self.device) / self.labels
        f = (counts.to(self.device) + UNSEEN) / self.labels
        if self.walk.skeleton.ties_head:
            H = f.sum() * G + q.sum() * X
            return {self.names[0]: (H, (f * G.trace() + q * X.trace()) / H.trace().clamp(min=1e-30))}
        return dict(zip(self.names, ((G, f), (X, q)), strict=False))

    def weight(self, name: str) -> Tensor:
        """float32 [vocabulary, width]"""
        return self.walk.skeleton.read(f"{name}.weight").to(self.device).float()
