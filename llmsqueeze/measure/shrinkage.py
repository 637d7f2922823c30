"""How much of measured second moments is chance, and their shrinkage towards the diagonal by that share.

The moments of few samples are those of the text by chance only: rounding under them fits the errors of the calibration
text, and what it gains there is lost on any other. The best mixture with the diagonal, in the mean squared error of the
entries off the diagonal, is (O. Ledoit and M. Wolf, Journal of Multivariate Analysis 88, 2004; for correlations J.
Schaefer and K. Strimmer, Statistical Applications in Genetics and Molecular Biology 4, 2005)

    S* = (1 - share) S + share diag(S),   share = sum of var(s_ij) / sum of s_ij^2   over i != j, at most 1

with every s_ij divided by sqrt(s_ii s_jj), so that columns of any size count the same. Two things differ. The variance
is that of the means of whole samples, because the tokens of a text are not independent: taken from token to token it is
three to thirty times too small. And neither sum is formed entry by entry, which would take a second matrix and another
product for each sample. A few random vectors z of +-1 stand for all columns: the mean of |A z|^2 is the sum of the
squares of A (M. Hutchinson, 1989), and A z of a sample is Y^T (Y z) without its diagonal. z is divided by the sizes of
the columns before they are known: it takes those of the first sample.

The drift, D = mean of (x - y) y^T or the mean of e y^T for what an output e has lost, shrinks towards nothing: D* =
(1 - share) D, with the sums over all its entries.

    Y [tokens, cols]: one sample's inputs.  Cost: 4 * PROBES * cols products for a token, and as many for the
    drift; the moments take 9/8 * cols^2.  Memory: 3 * PROBES * cols.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsqueeze.parallel import processes
from llmsqueeze.parallel.shares import Sums

PROBES = 8
SEED = 0
FLOOR = 1e-3  # of the mean: the least size of a column by which probes are divided


class Chance:
    """The share of a mean of products of two inputs of a token that is chance, from the samples that it is over.

    The first sample counts as two, its halves, so that there are always two to compare, if its share of the samples
    has it: shares are summed up apart (parallel/shares.py).
    """

    def __init__(
        self,
        cols: int,
        dtype: torch.dtype,
        device: torch.device,
        sums: Sums | None = None,
        name: str = "chance",
        diagonal: bool = False,
    ) -> None:
        """sums, name: where it is kept; diagonal: whether products of a column with itself count."""
        self._sums, self._name, self._diagonal = sums or Sums(), name, diagonal
        self._probes: Tensor | None = None
        self._cols, self._like = cols, {"dtype": dtype, "device": device}
        self._new = processes.first()

    def probe_with(self, probes: Tensor) -> None:
        """Takes probes [PROBES, cols] of `probes_for` that others have too."""
        self._probes = probes

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y [tokens, cols]: the inputs of one sample."""
        if self._probes is None:
            self._probes = processes.told(probes_for(y))
        if self._new and not self._sums.shares:
            half = len(y) // 2
            self._add(x[:half], y[:half])
            self._add(x[half:], y[half:])
        else:
            self._add(x, y)
        self._new &= not len(y)

    def _add(self, x: Tensor, y: Tensor) -> None:
        if not len(y):
            return
        assert self._probes is not None
        products = (self._probes @ y.T) @ x  # of matrices that lie so, a fifth of the time of y^T (y z)
        if not self._diagonal:
            products.addcmul_((x * y).sum(dim=0), self._probes, value=-1)
        self._of("tokens", 3, dtype=torch.float64).add_(torch.tensor([1.0, len(y), len(y) ** 2]))
        self._of("sum", PROBES, self._cols, **self._like).add_(products)
        self._of("weighted", PROBES, self._cols, **self._like).add_(products, alpha=len(y))
        self._of("squares", self._cols, **self._like).add_(products.square_().sum(dim=0))

    def _of(self, what: str, *shape: int, **like: Any) -> Tensor:
        return self._sums.of(f"{self._name} {what}", *shape, **like)

    def share(self, squares: Tensor, tokens: int) -> float:
        """Between 0 and 1, of the mean over so many tokens; nothing can be added afterwards.

        squares [cols]: the mean square of each input, by which entries are made alike.
        """
        sums = self._sums.total()
        if f"{self._name} tokens" not in sums:
            return 0.0
        total, weighted, of_squares = (
            sums[f"{self._name} {what}"].to(squares.device) for what in ("sum", "weighted", "squares")
        )
        count, seen, seen_squares = sums[f"{self._name} tokens"].tolist()
        if count < 2:
            return 0.0
        mean = total / seen
        sizes = mean.square().sum(dim=0)
        spread = of_squares - 2 * (weighted * mean).sum(dim=0)
        spread.add_(sizes, alpha=seen_squares)
        weights = torch.where(squares > 0, 1 / squares.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)
        variance = float(weights @ spread) / seen**2 * count / (count - 1)
        of_all = variance * seen / tokens
        size = float(weights @ sizes) - variance + of_all
        return min(max(of_all / size, 0.0), 1.0) if size > 0 else float(of_all > 0)


def shrink(xtx: Tensor, share: float) -> Tensor:
    """`xtx` [cols, cols] with `share` of what lies off its diagonal taken away, in place."""
    diagonal = xtx.diagonal().clone()
    xtx.mul_(1 - share).diagonal().copy_(diagonal)
    return xtx


def probes_for(y: Tensor) -> Tensor:
    """[PROBES, cols]: +-1, divided by the size of each column of y [tokens, cols]."""
    drawn = torch.randint(0, 2, (PROBES, y.shape[1]), generator=torch.Generator().manual_seed(SEED))
    size = y.square().mean(dim=0)
    size = size.clamp(min=FLOOR * float(size.mean())).clamp(min=torch.finfo(y.dtype).tiny)
    return (2 * drawn - 1).to(y) * size.rsqrt()
