"""The representation of a class: a mean, or a robust mean that few poisoned samples cannot shift far.

RDM-DC (Zheng & Li), section 4: a share eps of the N representations r_i of a class is poisoned, and k =
ceil(margin eps N) are left out of the mean.
    calibrated   the k with the largest |<r_i - r_bar, v>|, v the top eigenvector of their covariance (Algorithms 4, 5)
    truncated    the k with the largest ||r_i - r_bar||
    trimmed      the k/2 largest and the k/2 smallest of each coordinate
    median       all but the middle one or two of each coordinate
All classes at once, without gradients. Shapes: K classes, N samples of a class, D features.
"""

import math
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.errors import ConfigError


class AggregateConfig(BaseModel):
    """Aggregation of the representations of a class.

    Attributes:
        kind: see above; mean is plain distribution matching.
        eps: share of poisoned samples *within a class* to withstand. Poison that is 1 % of ten equal classes, all
            in one class, is 10 % of that class.
        margin: share left out as a multiple of eps. The paper uses 3. Clean samples left out beyond the poison come
            more from one tail and shift the mean: 1.5 removes the same poison with half the shift.
        power_iterations: iterations of the power method, for calibrated.
        min_kurtosis: least kurtosis of the projections on v for which a class is calibrated; other classes use the
            mean. None always calibrates, as in the paper. Below 3, the kurtosis of a normal distribution, no small
            group lies far out along v. Poison of a fifth of a class or more is missed: two points have the kurtosis
            1 / (eps - eps^2) - 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean", "calibrated", "median", "trimmed", "truncated"] = "calibrated"
    eps: float = Field(default=0.1, ge=0, lt=1 / 3)
    margin: float = Field(default=1.5, ge=1, le=3)
    power_iterations: int = Field(default=10, ge=1)
    min_kurtosis: float | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _kurtosis_is_used(self) -> Self:
        if self.min_kurtosis is not None and self.kind != "calibrated":
            raise ConfigError(f"aggregate.kind={self.kind} does not use min_kurtosis: leave it out")
        return self

    def n_dropped(self, n: int) -> int:
        """k = ceil(margin eps n), at most n - 1."""
        # Rounded first: 3 * 0.1 * 10 is above 3 in floating point, and its ceiling would be 4.
        return min(math.ceil(round(self.margin * self.eps * n, 6)), n - 1)


@torch.no_grad()
def aggregate(r_KND: Tensor, config: AggregateConfig, generator: torch.Generator) -> Tensor:
    """Aggregate the representations of each class to (K, D), float.

    Args:
        r_KND: representations.
        config: kind of mean.
        generator: CPU generator of the start of the power method, for calibrated.
    """
    if config.kind in ("median", "trimmed"):
        n = r_KND.shape[1]
        n_cut = (n - 1) // 2 if config.kind == "median" else min(-(-config.n_dropped(n) // 2), (n - 1) // 2)
        return r_KND.sort(1).values[:, n_cut : n - n_cut].mean(1)
    keep_KN = kept(r_KND, config, generator).to(r_KND)
    return (keep_KN[:, None] @ r_KND)[:, 0] / keep_KN.sum(1, keepdim=True)


@torch.no_grad()
def kept(r_KND: Tensor, config: AggregateConfig, generator: torch.Generator) -> Tensor:
    """Mask of the samples in the mean, (K, N) bool, for kinds that leave out samples."""
    keep_KN = torch.ones(r_KND.shape[:2], dtype=torch.bool, device=r_KND.device)
    if config.kind == "mean":
        return keep_KN
    centred_KND = r_KND - r_KND.mean(1, keepdim=True)
    if config.kind == "truncated":
        scores_KN = centred_KND.norm(dim=2)
    else:
        start_KD = torch.randn(r_KND[:, 0].shape, generator=generator).to(r_KND)
        v_KD = top_eigenvector(centred_KND, start_KD, config.power_iterations)
        scores_KN = (centred_KND @ v_KD[..., None])[..., 0].abs()
    largest_Kk = scores_KN.topk(config.n_dropped(r_KND.shape[1]), dim=1, sorted=False).indices
    keep_KN.scatter_(1, largest_Kk, False)
    if config.min_kurtosis is not None:
        kurtosis_K = (scores_KN**4).mean(1) / (scores_KN**2).mean(1) ** 2
        keep_KN |= (kurtosis_K < config.min_kurtosis)[:, None]
    return keep_KN


def top_eigenvector(centred_KND: Tensor, start_KD: Tensor, iterations: int) -> Tensor:
    """Unit eigenvector of the largest eigenvalue of each class covariance, (K, D), up to its sign.

    Algorithm 5; the covariance, D x D, is never formed: its product with v is R^T (R v).
    """
    v_KD1 = start_KD[..., None]
    for _ in range(iterations):
        v_KD1 = torch.nn.functional.normalize(centred_KND.mT @ (centred_KND @ v_KD1), dim=1)
    return v_KD1[..., 0]
