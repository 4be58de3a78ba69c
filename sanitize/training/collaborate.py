"""Two networks trained together. B batch, K outputs.

co: each network is updated with the samples that the other one keeps (B. Liu 2022, Algorithm 5: Co-PRL(L); with the
smallest losses it is Co-teaching, Han et al. 2018). decouple: both are updated with the samples on which their
predictions differ (Malach & Shalev-Shwartz 2017).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class CollaborateConfig(BaseModel):
    """Kind of collaboration: none (one network), co or decouple (two networks)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "co", "decouple"] = "none"


class Pair(nn.Module):
    """Two networks of one architecture and different initial weights, trained side by side by one optimiser.

    The pair computes the outputs of the first network; the second is discarded after training. A global gradient clip
    applies to the gradients of both.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList([first, second])

    def forward(self, x_B: Tensor) -> Tensor:
        """Outputs (B, K) of the first network."""
        return self.networks[0](x_B)


def networks_of(model: nn.Module) -> list[nn.Module]:
    """The trained networks: those of a `Pair`, or the model itself."""
    return list(model.networks) if isinstance(model, Pair) else [model]


def exchange(kind: str, keeps: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The samples that update each network.

    Args:
        kind: `CollaborateConfig.kind`.
        keeps: for each network, the samples that it keeps, (B,) bool.
        outputs: logits of each network, (B, K).

    Returns:
        For each network, the samples that update it, (B,) bool.
    """
    if kind == "co":
        return [keeps[1], keeps[0]]
    if kind == "decouple":
        differ_B = outputs[0].argmax(1) != outputs[1].argmax(1)
        return [torch.logical_and(keep_B, differ_B) for keep_B in keeps]
    return list(keeps)
