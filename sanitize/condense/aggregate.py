"""What stands for the representations of a class: their mean, or a mean that a few poisoned samples cannot move far.

RDM-DC (Zheng & Li), section 4: of N representations r_i of a class a share eps is poisoned, and k = ceil(margin eps N)
are kept out of the mean.
    calibrated   the k with the largest |<r_i - r_bar, v>|, v the top eigenvector of their covariance (Algorithms 4, 5)
    truncated    the k with the largest ||r_i - r_bar||
    trimmed      of each coordinate the k/2 largest and the k/2 smallest
    median       of each coordinate all but the middle one or two
All classes at once, without gradients. Shapes: K classes, N samples of a class, D features.
"""

import math
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.errors import ConfigError


class AggregateConfig(BaseModel):
    """How the representations of a class become one.

    Attributes:
        kind: see above; mean is plain distribution matching.
        eps: share of poisoned samples *within a class* that is to be withstood: poison that is 1 % of ten classes, all
            of it in one, is 10 % there.
        margin: how many times that share is left out. The source has 3; what is left out beyond the poison is more of
            one tail of the class than of the other, and moves the mean: 1.5 finds the same and moves it half as far.
        power_iterations: of the power method, for calibrated.
        min_kurtosis: calibrate a class only where its projections on v have at least this kurtosis, and take its mean
            elsewhere; None always calibrates, as the source does. Below 3, a normal distribution's, no small group
            lies far out along v, and there is nothing to drop but one side of the class itself. Blind to poison of a
            fifth of a class and more, which is no small group: two points have the kurtosis 1 / (eps - eps^2) - 3.
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
            raise ConfigError(f"aggregate.kind={self.kind} looks at no kurtosis: leave min_kurtosis out")
        return self

    def n_dropped(self, n: int) -> int:
        """k = ceil(margin eps n), but never all of them."""
        # Rounded first: 3 * 0.1 * 10 is a little above 3 in floating point, and its ceiling would be 4.
        return min(math.ceil(round(self.margin * self.eps * n, 6)), n - 1)


@torch.no_grad()
def aggregate(r_KND: Tensor, config: AggregateConfig, generator: torch.Generator) -> Tensor:
    """One representation a class, (K, D), of theirs, float.

    Args:
        r_KND: representations.
        config: how.
        generator: on the CPU; draws where the power method begins, for calibrated.
    """
    if config.kind in ("median", "trimmed"):
        n = r_KND.shape[1]
        n_cut = (n - 1) // 2 if config.kind == "median" else min(-(-config.n_dropped(n) // 2), (n - 1) // 2)
        return r_KND.sort(1).values[:, n_cut : n - n_cut].mean(1)
    keep_KN = kept(r_KND, config, generator).to(r_KND)
    return (keep_KN[:, None] @ r_KND)[:, 0] / keep_KN.sum(1, keepdim=True)


@torch.no_grad()
def kept(r_KND: Tensor, config: AggregateConfig, generator: torch.Generator) -> Tensor:
    """Which samples are in the mean, (K, N) bool; of kinds that keep samples, not coordinates."""
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
    """Of the covariance of each class the unit eigenvector with the largest eigenvalue, (K, D), up to its sign.

    Algorithm 5; the covariance, D x D, is never formed: its product with v is R^T (R v).
    """
    v_KD1 = start_KD[..., None]
    for _ in range(iterations):
        v_KD1 = torch.nn.functional.normalize(centred_KND.mT @ (centred_KND @ v_KD1), dim=1)
    return v_KD1[..., 0]
