"""Perturbed inputs: the inner step of B. Liu (2022), Algorithm 6 and Eq. 5.5.

A trigger is a small change of the input that changes the answer. A network that answers alike in a small ball around
every sample it trusts cannot depend on one. X is (C, H, W) or (D,), B batch.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class AdversaryConfig(BaseModel):
    """One step of the fast gradient sign method inside ||c||_inf <= tau_x, or none.

    Attributes:
        kind: none or at.
        tau_x: radius, in the units of `InputSpace`: pixels on [0, 1], or whatever a table's columns are in.
        averaged: Eq. 5.5 to the letter, one c for the whole batch, tau_x times the mean sign over the trusted
            samples. By default each trusted sample has a c of its own, which is what gives the chapter's results
            (docs/methods.md).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "at"] = "none"
    tau_x: float = Field(default=0.05, gt=0)
    averaged: bool = False


class InputSpace(NamedTuple):
    """Where valid inputs lie, in the units that the network sees; each broadcasts against (B, X).

    Attributes:
        low, high: bounds; infinite where there are none.
        unit: length of one unit of tau_x.
    """

    low: Tensor
    high: Tensor
    unit: Tensor

    @classmethod
    def images(cls, mean: Sequence[float], std: Sequence[float]) -> "InputSpace":
        """Pixels on [0, 1], normalised with `mean` and `std` of each channel."""
        mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return cls((0 - mean_C11) / std_C11, (1 - mean_C11) / std_C11, 1 / std_C11)

    @classmethod
    def unbounded(cls) -> "InputSpace":
        """Inputs as they are, without bounds."""
        return cls(torch.tensor(-torch.inf), torch.tensor(torch.inf), torch.tensor(1.0))

    def to(self, device: torch.device) -> "InputSpace":
        """The same on another device."""
        return InputSpace(*(tensor.to(device) for tensor in self))


def perturb(config: AdversaryConfig, x_BX: Tensor, gradient_BX: Tensor, trusted_B: Tensor, space: InputSpace) -> Tensor:
    """x + c, (B, X), clipped to valid inputs.

    Args:
        config: radius and reading of Eq. 5.5.
        x_BX: inputs.
        gradient_BX: of each sample's loss with respect to its input.
        trusted_B: bool; only these are asked where to go and, unless `averaged`, only these move.
        space: bounds and unit.
    """
    trusted_BX = trusted_B.view(-1, *[1] * (x_BX.dim() - 1))
    sign_BX = torch.where(trusted_BX, gradient_BX.sign(), 0.0)
    if config.averaged:
        sign_BX = sign_BX.sum(0, keepdim=True) / trusted_B.sum().clamp(min=1)
    return (x_BX + config.tau_x * space.unit * sign_BX).clamp(space.low, space.high)
