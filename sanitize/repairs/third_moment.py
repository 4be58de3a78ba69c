"""Orthonormal directions of maximal third central moment: DRR's criterion (algorithm 1), on the Stiefel manifold.

    max  sum_j E[(v_j^T (x - mean))^3]   over V with V^T V = I

The Euclidean gradient of column j is 3 E[x (v_j^T x)^2]. A step retracts by QR, V <- qf(gradient): a step of infinite
length, which for one column is the symmetric tensor power method. The best V of all steps is kept. The raw moment is
maximised; the skewness E[p^3] / E[p^2]^(3/2) of p = v^T (x - mean) is compared with a threshold, because the raw moment
has the unit of the features. Shapes: N samples, D features, k directions, S starts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Directions(NamedTuple):
    """Orthonormal columns, largest moment first, float64."""

    v_Dk: Tensor
    moment_k: Tensor
    skewness_k: Tensor

    def above(self, tau: float) -> "Directions":
        """The directions with a skewness above tau."""
        kept_k = self.skewness_k > tau
        return Directions(self.v_Dk[:, kept_k], self.moment_k[kept_k], self.skewness_k[kept_k])


def third_moment_directions(
    x_ND: Tensor, k: int, n_starts: int, n_steps: int, generator: torch.Generator
) -> Directions:
    """Directions of maximal third moment, from several random orthonormal starts.

    Args:
        x_ND: features, float64.
        k: number of directions, at most D.
        n_starts: number of starts.
        n_steps: steps from each start.
        generator: generator of the starts, on the CPU.
    """
    x_ND = x_ND - x_ND.mean(0)
    start_SDk = torch.randn(n_starts, x_ND.shape[1], min(k, x_ND.shape[1]), generator=generator)
    v_SDk = torch.linalg.qr(start_SDk).Q
    search_ND = x_ND.float()  # twice as fast, and only the ranking matters
    best_S, best_SDk = torch.full((n_starts,), -torch.inf), v_SDk.clone()
    for _ in range(n_steps):
        place_SNk = search_ND @ v_SDk
        value_S = place_SNk.pow(3).mean(1).sum(1)
        better_S = value_S > best_S
        best_S, best_SDk[better_S] = torch.where(better_S, value_S, best_S), v_SDk[better_S]
        v_SDk = torch.linalg.qr(search_ND.T @ place_SNk.square()).Q
        # QR leaves the sign of a column open, and the third moment is odd in it
        v_SDk = v_SDk * (search_ND @ v_SDk).pow(3).mean(1, keepdim=True).sign()
    return measured(x_ND, torch.linalg.qr(best_SDk[best_S.argmax()].double()).Q)


def measured(x_ND: Tensor, v_Dk: Tensor) -> Directions:
    """Third moment and skewness of orthonormal columns, turned to the positive side, largest moment first."""
    place_Nk = (x_ND - x_ND.mean(0)) @ v_Dk
    moment_k, variance_k = place_Nk.pow(3).mean(0), place_Nk.square().mean(0)
    order_k = moment_k.abs().argsort(descending=True)
    skewness_k = moment_k.abs() / variance_k.clamp(min=1e-30) ** 1.5
    return Directions((v_Dk * moment_k.sign())[:, order_k], moment_k.abs()[order_k], skewness_k[order_k])


def of_every_class(
    x_ND: Tensor, labels_N: Tensor, k: int, tau: float, n_starts: int, n_steps: int, generator: torch.Generator
) -> Directions:
    """The k most skewed directions of single classes, orthonormalised, with moment and skewness in their class."""
    found = [
        third_moment_directions(x_ND[labels_N == label], 1, n_starts, n_steps, generator)
        for label in labels_N.unique().tolist()
        if int((labels_N == label).sum()) > 2
    ]
    v_DK, moment_K, skewness_K = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    first = skewness_K.argsort(descending=True)[:k]
    first = first[: max(1, int((skewness_K[first] > tau).sum()))]  # below tau only the most skewed one, for the report
    return Directions(torch.linalg.qr(v_DK[:, first]).Q, moment_K[first], skewness_K[first])
