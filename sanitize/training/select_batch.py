"""The samples of a batch that update the model: B. Liu (2022), Algorithms 3 (PRL(G)) and 4 (PRL(L)), and others.

Every rule except `all` ranks the samples by one number and keeps the smallest. B batch.
"""

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.errors import ConfigError


class SelectBatchConfig(BaseModel):
    """The rule and the share that it drops.

    Attributes:
        kind: all; prl_l drops the largest gradients of the loss with respect to the output (Algorithm 4), prl_g the
            largest with respect to all weights (Algorithm 3), spl the largest losses (self-paced learning, Kumar et
            al. 2010); min_sgd keeps only the sample with the smallest loss (Shah et al. 2020).
        tau: share of each batch dropped after the warm-up by prl_l, prl_g and spl; an upper bound on the share of
            corrupted samples. Overestimate rather than underestimate (chapter 4, Table 4.4).
        warmup_epochs: T_k, epochs in which the share grows from 0 to tau.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["all", "prl_l", "prl_g", "spl", "min_sgd"] = "all"
    tau: float = Field(default=0.0, ge=0, lt=1)
    warmup_epochs: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _tau_is_used(self) -> Self:
        filters = self.kind in ("prl_l", "prl_g", "spl")
        if filters != (self.tau > 0):
            raise ConfigError(
                f"select_batch.kind={self.kind} {'needs tau > 0' if filters else 'does not use tau: set tau=0'}"
            )
        return self

    def kept_fraction(self, epoch: int) -> float:
        """R(T) = 1 - min(T / T_k tau, tau) (Algorithm 5), T = finished epochs: the first epoch drops nothing."""
        return 1 - min(epoch / self.warmup_epochs * self.tau, self.tau)

    def n_kept(self, n: int, epoch: int) -> int:
        """Number of samples out of `n` that update the model, at least one."""
        return 1 if self.kind == "min_sgd" else max(1, round(self.kept_fraction(epoch) * n))

    def is_warm(self, epoch: int) -> bool:
        """True once the full share tau is dropped, so that counts of drops are evidence about a sample."""
        return self.kind != "all" and (self.kind == "min_sgd" or epoch >= self.warmup_epochs)


def keep_smallest(suspicion_B: Tensor, n_kept: int) -> Tensor:
    """True for the `n_kept` smallest, (B,) bool, by topk on the device; NaN counts as the largest."""
    kept = suspicion_B.topk(n_kept, largest=False, sorted=False).indices
    return torch.zeros_like(suspicion_B, dtype=torch.bool).index_fill_(0, kept, True)
