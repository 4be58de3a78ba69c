"""Perturbed inputs: the inner step of B. Liu (2022), Algorithm 6 and Eq. 5.5, and of adversarial training.

A trigger is a small change of the input that changes the prediction. A network with constant predictions in a small
ball around every trusted sample cannot depend on a trigger. PGD-AT (Madry et al., 2018) trains on the worst inputs of
the ball; TRADES (Zhang et al., 2019) trains on the inputs and penalises other outputs on the worst inputs.

X is (C, H, W) or (D,), B batch, K outputs.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.ascent import linf_ball, projected_ascent
from sanitize.compute import Compute


class AdversaryConfig(BaseModel):
    """A perturbation inside ||c||_inf <= tau_x, or none.

    Attributes:
        kind: at is one step of the fast gradient sign method; pgd and trades take `steps` smaller steps from a random
            start, to increase the loss or the divergence from the output on the unperturbed input.
        tau_x: radius, in the units of `InputSpace`: pixels on [0, 1], or the units of a table's columns.
        averaged: True is Eq. 5.5 as written: one c for the whole batch, tau_x times the mean sign over the trusted
            samples. False gives each trusted sample its own c, which reproduces the chapter's results
            (docs/methods.md). For `at` only.
        steps: number of steps of pgd and trades.
        step_size: length of a step, in the units of tau_x; None is 2.5 tau_x / steps.
        beta: weight of the second term of TRADES.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "at", "pgd", "trades"] = "none"
    tau_x: float = Field(default=0.05, gt=0)
    averaged: bool = False
    steps: int = Field(default=10, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    beta: float = Field(default=6.0, gt=0)


class InputSpace(NamedTuple):
    """The range of valid inputs, in the units of the network's inputs; each field broadcasts against (B, X).

    Attributes:
        low, high: bounds; infinite for inputs without bounds.
        unit: length of one unit of tau_x.
    """

    low: Tensor
    high: Tensor
    unit: Tensor

    @classmethod
    def images(cls, mean: Sequence[float], std: Sequence[float]) -> "InputSpace":
        """Pixels on [0, 1], normalised by `mean` and `std` of each channel."""
        mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return cls((0 - mean_C11) / std_C11, (1 - mean_C11) / std_C11, 1 / std_C11)

    @classmethod
    def unbounded(cls) -> "InputSpace":
        """Inputs without normalisation and bounds."""
        return cls(torch.tensor(-torch.inf), torch.tensor(torch.inf), torch.tensor(1.0))

    def to(self, device: torch.device) -> "InputSpace":
        """The space on another device."""
        return InputSpace(*(tensor.to(device) for tensor in self))


def perturb(config: AdversaryConfig, x_BX: Tensor, gradient_BX: Tensor, trusted_B: Tensor, space: InputSpace) -> Tensor:
    """x + c, (B, X), clipped to valid inputs.

    Args:
        config: radius and reading of Eq. 5.5.
        x_BX: inputs.
        gradient_BX: gradient of the loss of each sample with respect to its input.
        trusted_B: bool; only trusted samples contribute to the direction and, unless `averaged`, only they move.
        space: bounds and unit.
    """
    trusted_BX = trusted_B.view(-1, *[1] * (x_BX.dim() - 1))
    sign_BX = torch.where(trusted_BX, gradient_BX.sign(), 0.0)
    if config.averaged:
        sign_BX = sign_BX.sum(0, keepdim=True) / trusted_B.sum().clamp(min=1)
    return (x_BX + config.tau_x * space.unit * sign_BX).clamp(space.low, space.high)


def ascend(
    config: AdversaryConfig,
    network: nn.Module,
    x_BX: Tensor,
    losses: Callable[[Tensor], Tensor],
    trusted_B: Tensor,
    space: InputSpace,
    generator: torch.Generator,
    compute: Compute,
) -> Tensor:
    """The worst x + c that projected gradient ascent finds from a random start, (B, X), clipped to valid inputs.

    Args:
        config: radius, number and length of steps.
        network: evaluated in eval mode, so that BatchNorm does not learn from perturbed inputs; its mode is restored.
        x_BX: inputs.
        losses: function from outputs (B, K) to the loss to increase for each sample, (B,).
        trusted_B: bool; the others do not move.
        space: bounds and unit.
        generator: CPU generator of the random start.
        compute: precision.
    """
    radius = config.tau_x * space.unit
    step = (config.step_size or 2.5 * config.tau_x / config.steps) * space.unit
    project = linf_ball(x_BX, radius, space.low, space.high)
    start_BX = 2 * torch.rand(x_BX.shape, generator=generator).to(x_BX.device) - 1

    def loss(at_BX: Tensor, _number: int) -> Tensor:
        with compute.autocast():
            outputs_BK = network(at_BX).float()
        return losses(outputs_BK).sum()

    was_training = network.training
    network.eval()
    start_BX = project(x_BX + radius * start_BX)
    at_BX = projected_ascent(start_BX, loss, lambda g_BX: step * g_BX.sign(), project, config.steps)
    network.train(was_training)
    return torch.where(trusted_B.view(-1, *[1] * (x_BX.dim() - 1)), at_BX, x_BX)


def divergence(outputs_BK: Tensor, from_BK: Tensor) -> Tensor:
    """KL(softmax(from) || softmax(outputs)) of each sample, (B,)."""
    kl_BK = nn.functional.kl_div(outputs_BK.log_softmax(1), from_BK.log_softmax(1), reduction="none", log_target=True)
    return kl_BK.sum(1)
