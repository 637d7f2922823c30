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

    Y [tokens, cols]: one sample's inputs.  Cost: 4 * PROBES * cols products for a token of the first samples, and as
    many for the drift; the moments take 9/8 * cols^2.  Memory: 3 * PROBES * cols.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROBES = 8
ENOUGH = 16  # samples that tell how much samples differ
SEED = 0
FLOOR = 1e-3  # of the mean: the least size of a column by which probes are divided


class Chance:
    """The share of a mean of products of two inputs of a token that is chance, from the samples that it is over.

    The first sample counts as two, its halves, so that there are always two to compare. After `ENOUGH` samples no more
    are looked at.
    """

    def __init__(self, cols: int, dtype: torch.dtype, device: torch.device, diagonal: bool = False) -> None:
        """diagonal: whether products of a column with itself count."""
        self._probes, self._diagonal = torch.empty(0), diagonal
        self._sum, self._weighted = (torch.zeros(PROBES, cols, dtype=dtype, device=device) for _ in range(2))
        self._squares = torch.zeros(cols, dtype=dtype, device=device)
        self._tokens: list[int] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y [tokens, cols]: the inputs of one sample."""
        if len(y) and not self._tokens:
            self._probes, half = _probes(y), len(y) // 2
            self._add(x[:half], y[:half])
            self._add(x[half:], y[half:])
        elif len(self._tokens) <= ENOUGH:
            self._add(x, y)

    def _add(self, x: Tensor, y: Tensor) -> None:
        if len(y):
            products = (self._probes @ y.T) @ x  # of matrices that lie so, a fifth of the time of y^T (y z)
            if not self._diagonal:
                products.addcmul_((x * y).sum(dim=0), self._probes, value=-1)
            self._sum += products
            self._weighted.add_(products, alpha=len(y))
            self._squares += products.square_().sum(dim=0)
            self._tokens.append(len(y))

    def share(self, squares: Tensor, tokens: int) -> float:
        """Between 0 and 1, of the mean over so many tokens.

        squares [cols]: the mean square of each input, by which entries are made alike.
        """
        count, seen = len(self._tokens), sum(self._tokens)
        if count < 2:
            return 0.0
        mean = self._sum / seen
        sizes = mean.square().sum(dim=0)
        spread = self._squares - 2 * (self._weighted * mean).sum(dim=0)
        spread.add_(sizes, alpha=sum(of_sample**2 for of_sample in self._tokens))
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


def _probes(y: Tensor) -> Tensor:
    """[PROBES, cols]: +-1, divided by the size of each column of y [tokens, cols]."""
    drawn = torch.randint(0, 2, (PROBES, y.shape[1]), generator=torch.Generator().manual_seed(SEED))
    size = y.square().mean(dim=0)
    size = size.clamp(min=FLOOR * float(size.mean())).clamp(min=torch.finfo(y.dtype).tiny)
    return (2 * drawn - 1).to(y) * size.rsqrt()
