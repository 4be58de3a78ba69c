"""Three tests of a batch against its reference, each with a p-value and an effect size. An alarm needs both: in a huge
batch every small effect is significant, in a small batch chance effects are large.

**Shift** of the samples of a class, their mean and their covariance at once: the squared Frechet distance between two
Gaussians (Dowson & Landau, 1982, Eq. 4; Heusel et al., 2017, "FID", section 3),

    d2 = |m - m'|^2 + tr(S + S' - 2 (S^(1/2) S' S^(1/2))^(1/2)).

It is positive for two samples of one distribution as well. Its null distribution comes from the reference: samples of
the size of the batch are drawn from the reference, and each is compared with the rest of the reference. A Gamma
distribution is fitted to their distances by mean and variance (Satterthwaite, 1946); it gives the p-value, and its mean
is subtracted from the distance. The effect is the difference in units of the class's variance, tr S'.

**Rate**: x of n samples were removed, in the reference x' of n'. With Jeffreys' prior the expected number is
beta-binomial, which includes the uncertainty of the reference: p = P(X >= x), X ~ BetaBin(n, x' + 1/2, n' - x' + 1/2).
The effect is x / n - x' / n'. Only an excess counts. The samples of a batch are judged at a level, those of the
reference were not; the share removed by this level is counted as removed from the reference too.

**Priors**: the share of each class. Pearson's chi-squared for two samples; the effect is the total variation distance
minus its mean between two samples of one distribution, sum_y sqrt(p_y (1 - p_y) (1/n + 1/n') / (2 pi)).

Shapes: r components, N rows, T draws, K classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from sanitize.streaming import Moments


class Comparison(NamedTuple):
    """Result of a test: p-value under equal distributions, and effect size."""

    p_value: float
    effect: float


class Distance(NamedTuple):
    """A squared Frechet distance, and its mean and variance between samples of one distribution."""

    squared: float
    mean: float
    variance: float


def frechet_squared(mean_Tr: Tensor, cov_Trr: Tensor, other_Tr: Tensor, other_Trr: Tensor) -> Tensor:
    """Squared Frechet distances (T,) between pairs of Gaussians of these means and covariances, float64, >= 0."""
    values_Tr, vectors_Trr = torch.linalg.eigh(cov_Trr)
    root_Trr = (vectors_Trr * values_Tr.clamp(min=0).sqrt()[:, None]) @ vectors_Trr.mT
    # The eigenvalues of S^(1/2) S' S^(1/2); rounding makes some of those that are zero negative.
    products_Tr = torch.linalg.eigvalsh(root_Trr @ other_Trr @ root_Trr).clamp(min=0)
    traces_T = (cov_Trr + other_Trr).diagonal(dim1=1, dim2=2).sum(1) - 2 * products_Tr.sqrt().sum(1)
    return (mean_Tr - other_Tr).square().sum(1) + traces_T.clamp(min=0)


def distance(batch: Moments, reference: Moments, pool_Nr: Tensor, n_draws: int, generator: torch.Generator) -> Distance:
    """Distance of a class of a batch from the reference, and the null distribution.

    Args:
        batch: moments of the class in the batch; two samples at least.
        reference: moments of the class in the reference; two samples at least.
        pool_Nr: sampled rows of the class in the reference, at least four.
        n_draws: T, draws from the pool.
        generator: random source of the draws.
    """
    n = min(batch.count, len(pool_Nr) // 2)
    at_TN = torch.rand(n_draws, len(pool_Nr), generator=generator).argsort(1)[:, :n]
    drawn_TNr = pool_Nr[at_TN]
    mean_Tr = drawn_TNr.mean(1)
    centred_TNr = drawn_TNr - mean_Tr[:, None]
    scatter_Trr = centred_TNr.transpose(1, 2) @ centred_TNr
    # The reference without the drawn rows: Chan's update backwards, for all draws at once.
    rest, total = reference.count - n, reference.count
    rest_Tr = (total * reference.mean_D - n * mean_Tr) / rest
    delta_Tr = mean_Tr - rest_Tr
    rest_Trr = reference.scatter_DD - scatter_Trr - delta_Tr[:, :, None] * delta_Tr[:, None] * (n * rest / total)
    drawn_T = frechet_squared(rest_Tr, rest_Trr / (rest - 1), mean_Tr, scatter_Trr / (n - 1))
    # Second moments of both terms go as 1/n + 1/n': draws may be smaller than the batch, and are from a smaller rest.
    scale = (1 / batch.count + 1 / total) / (1 / n + 1 / rest)
    both = [(moments.mean_D[None], moments.covariance()[None]) for moments in (reference, batch)]
    squared = frechet_squared(*both[0], *both[1])
    return Distance(float(squared), scale * float(drawn_T.mean()), scale**2 * float(drawn_T.var()))


def shift(found: Distance, reference: Moments) -> Comparison:
    """Test of a distance; effect 0 where the distance is no larger than between samples of one distribution."""
    variance = float(reference.covariance().trace())
    return Comparison(gamma_tail(found), max(0.0, found.squared - found.mean) / max(variance, 1e-300))


def gamma_tail(found: Distance) -> float:
    """P(X >= squared) for the Gamma distribution of this mean and variance."""
    mean, variance = max(found.mean, 1e-300), max(found.variance, 1e-300)
    return float(stats.gamma.sf(found.squared, mean**2 / variance, scale=variance / mean))


def together(found: Sequence[Distance], weights: Sequence[float]) -> Distance:
    """The weighted mean of independent distances."""
    shares = np.array(weights) / sum(weights)
    squared, mean, variance = np.array(found).T
    return Distance(float(shares @ squared), float(shares @ mean), float(shares**2 @ variance))


def excess(x: int, n: int, reference_x: int, reference_n: int, by_design: float = 0.0) -> Comparison:
    """Test of a rate: x of n samples, against the reference's rate.

    Args:
        x: removed samples of the batch.
        n: samples of the batch.
        reference_x: removed samples of the reference.
        reference_n: samples of the reference.
        by_design: share of clean samples, in [0, 1), that are removed from a batch but were not from the reference.
    """
    expected = reference_x + by_design * (reference_n - reference_x)
    p_value = stats.betabinom.sf(x - 1, n, expected + 0.5, reference_n - expected + 0.5)
    return Comparison(float(p_value), x / n - expected / max(1, reference_n))


def priors(counts_K: np.ndarray, reference_K: np.ndarray) -> Comparison:
    """Test of the shares of classes, by counts (K,) of batch and reference, int64, each with a positive count."""
    seen_k = (counts_K + reference_K) > 0
    table_2k = np.stack([counts_K[seen_k], reference_K[seen_k]])
    n, reference_n = table_2k.sum(1)
    p_value = 1.0 if table_2k.shape[1] < 2 else float(stats.chi2_contingency(table_2k, correction=False).pvalue)
    shares_k = table_2k.sum(0) / table_2k.sum()
    by_chance = np.sqrt(shares_k * (1 - shares_k) * (1 / n + 1 / reference_n) / (2 * math.pi)).sum()
    variation = np.abs(table_2k[0] / n - table_2k[1] / reference_n).sum() / 2
    return Comparison(p_value, max(0.0, float(variation - by_chance)))
