"""Evasion: the worst image near an image, by projected gradient descent (Madry et al., 2018; in l_inf with one restart
and no random start the basic iterative method of Kurakin et al., 2017).

The accuracy under this attack is an upper bound of the robust accuracy; a certificate gives a lower one. Images stay on
[0, 1], and no perturbation is larger than the radius, measured in float64.

Shapes: N images, B of a batch, X their shape (C, H, W), K classes.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.ascent import projected_ascent
from sanitize.compute import Compute

_ROUNDING = 2.0**-24  # half the distance of float32 numbers below 1: largest rounding error of x + d


class EvasionConfig(BaseModel):
    """The attack.

    Attributes:
        norm: norm of the radius.
        radius: largest perturbation, for pixels on [0, 1].
        steps: gradient steps in each restart.
        step_size: length of a step, in the same norm; None is 2.5 radius / steps.
        loss: loss to increase: cross_entropy, or margin, the largest logit of another class minus the logit of the
            label; its gradient does not vanish for a confident network.
        targeted: True decreases the loss of one wrong class, drawn uniformly for each image.
        restarts: number of attempts; the image with the largest margin on all paths is kept.
        random_start: True starts at a point drawn uniformly from the ball, False at the image (all restarts are equal).
        batch_size: images at once; the random starts depend on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: Literal["l2", "linf"] = "linf"
    radius: float = Field(ge=0)
    steps: int = Field(default=20, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    loss: Literal["cross_entropy", "margin"] = "cross_entropy"
    targeted: bool = False
    restarts: int = Field(default=1, ge=1)
    random_start: bool = True
    batch_size: int = Field(default=256, ge=1)


def evade(model: nn.Module, images_NX: Tensor, labels_N: Tensor, config: EvasionConfig, compute: Compute) -> Tensor:
    """Adversarial images (N, X), float32 on the CPU; misclassified images are returned unchanged.

    Args:
        model: logits (B, K) of float images on [0, 1] (`sanitize.models.pixels.OnPixels`); moved to the device and set
            to eval mode.
        images_NX: uint8, or float on [0, 1].
        labels_N: true labels, int64.
        config: the attack.
        compute: device, precision, and seed of the random starts and targets.

    Raises:
        ValueError: a float image is not on [0, 1].
    """
    images_NX = _ready(model, images_NX, compute)
    device, generator = compute.torch_device, compute.generator("evade", device=compute.torch_device)
    found = []
    for x_BX, y_B in zip(images_NX.split(config.batch_size), labels_N.split(config.batch_size), strict=True):
        x_BX, radius_B = x_BX.to(device), torch.full((len(x_BX),), config.radius, dtype=torch.float64, device=device)
        goal, right_B = _goal(model, x_BX, y_B.to(device), config, compute, generator)
        worst_BX = _evade(model, x_BX, goal, radius_B, config, compute, generator)
        found.append(torch.where(_like(right_B, x_BX), worst_BX, x_BX).cpu())
    return torch.cat(found) if found else images_NX


def smallest_perturbation(
    model: nn.Module, images_NX: Tensor, labels_N: Tensor, config: EvasionConfig, compute: Compute, searches: int = 10
) -> Tensor:
    """Length of the smallest perturbation that `evade` finds for each image (N,), float64, in its norm.

    The radius is bisected for each image, `searches` times between 0 and `config.radius`; the shortest perturbation of
    all searches counts. 0 for misclassified images; infinite where the whole radius does not reach the goal (a wrong
    class or, if targeted, the drawn one). The length is an upper bound. Arguments and errors are those of `evade`.
    """
    images_NX = _ready(model, images_NX, compute)
    device, generator = compute.torch_device, compute.generator("evade", device=compute.torch_device)
    lengths = []
    for x_BX, y_B in zip(images_NX.split(config.batch_size), labels_N.split(config.batch_size), strict=True):
        x_BX = x_BX.to(device)
        goal, right_B = _goal(model, x_BX, y_B.to(device), config, compute, generator)
        low_B = torch.zeros(len(x_BX), dtype=torch.float64, device=device)
        high_B, length_B = torch.full_like(low_B, config.radius), torch.full_like(low_B, torch.inf)
        for search in range(searches):
            radius_B = high_B if search == 0 else (low_B + high_B) / 2
            worst_BX = _evade(model, x_BX, goal, radius_B, config, compute, generator)
            with torch.inference_mode(), compute.autocast():
                reached_B = goal.margin(model(worst_BX).float()) > 0
            of_this_B = _length((worst_BX.double() - x_BX.double()), config.norm)
            length_B = torch.where(reached_B, torch.minimum(length_B, of_this_B), length_B)
            high_B = torch.where(reached_B, torch.minimum(radius_B, of_this_B), high_B)
            low_B = torch.where(reached_B, low_B, radius_B)
        lengths.append(torch.where(right_B, length_B, 0.0).cpu())
    return torch.cat(lengths) if lengths else torch.zeros(0, dtype=torch.float64)


def _ready(model: nn.Module, images_NX: Tensor, compute: Compute) -> Tensor:
    """Images on [0, 1]; moves the model to the device."""
    compute.activate()
    model.to(compute.torch_device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    images_NX = images_NX / 255 if images_NX.dtype == torch.uint8 else images_NX.float()
    if len(images_NX) and not (images_NX.min() >= 0 and images_NX.max() <= 1):
        raise ValueError("images are not on [0, 1]")
    return images_NX


def _evade(
    model: nn.Module,
    x_BX: Tensor,
    goal: "_Goal",
    radius_B: Tensor,
    config: EvasionConfig,
    compute: Compute,
    generator: torch.Generator,
) -> Tensor:
    ball = _Ball(config, radius_B, x_BX)
    worst_BX, worst_B = x_BX.clone(), torch.full((len(x_BX),), -torch.inf, device=x_BX.device)

    def loss(at_BX: Tensor, _number: int = 0) -> Tensor:
        """The loss at a point; the images there that have the largest margin so far are kept."""
        with compute.autocast():
            logits_BK = model(at_BX).float()
        margin_B = goal.margin(logits_BK)
        worse_B = margin_B.detach() > worst_B
        worst_B[worse_B], worst_BX[worse_B] = margin_B.detach()[worse_B], at_BX.detach()[worse_B]
        return (margin_B if config.loss == "margin" else goal.cross_entropy(logits_BK)).sum()

    def project(at_BX: Tensor) -> Tensor:
        return ball.project(x_BX, at_BX - x_BX)

    with torch.no_grad():
        loss(x_BX)
        for _ in range(config.restarts):
            at_BX = ball.project(x_BX, ball.sample(x_BX, generator)) if config.random_start else x_BX
            loss(projected_ascent(at_BX, loss, ball.step, project, config.steps))
    return worst_BX


class _Goal(NamedTuple):
    """Goal of an attack: away from `label_B` with sign 1, towards it with sign -1."""

    label_B: Tensor
    sign: int

    def margin(self, logits_BK: Tensor) -> Tensor:
        """Above zero where the goal is reached, (B,)."""
        return self.sign * _margin(logits_BK, self.label_B)

    def cross_entropy(self, logits_BK: Tensor) -> Tensor:
        """Loss to increase, (B,)."""
        return self.sign * nn.functional.cross_entropy(logits_BK, self.label_B, reduction="none")


def _goal(
    model: nn.Module, x_BX: Tensor, y_B: Tensor, config: EvasionConfig, compute: Compute, generator: torch.Generator
) -> tuple[_Goal, Tensor]:
    """The goal of each image, and a mask of those that are classified correctly."""
    with torch.inference_mode(), compute.autocast():
        logits_BK = model(x_BX).float()
    right_B = _margin(logits_BK, y_B) <= 0
    if not config.targeted:
        return _Goal(y_B, 1), right_B
    n_classes = logits_BK.shape[1]
    shift_B = torch.randint(1, n_classes, y_B.shape, generator=generator, device=y_B.device)
    return _Goal((y_B + shift_B) % n_classes, -1), right_B


class _Ball:
    """Perturbations of each image up to its radius (B,)."""

    def __init__(self, config: EvasionConfig, radius_B: Tensor, x_BX: Tensor) -> None:
        self.is_l2 = config.norm == "l2"
        step_B = torch.full_like(radius_B, config.step_size) if config.step_size else 2.5 * radius_B / config.steps
        # Below the radius by the largest rounding error of the sum.
        rounding = _ROUNDING * (x_BX[0].numel() ** 0.5 if self.is_l2 else 1)
        aim_B = (radius_B * (1 - 1e-6) - rounding).clamp(min=0)
        self.radius, self.step_size, self._aim = (_like(of_B.float(), x_BX) for of_B in (radius_B, step_B, aim_B))

    def sample(self, x_BX: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in the ball."""
        if not self.is_l2:
            return self.radius * (2 * torch.rand(x_BX.shape, generator=generator, device=x_BX.device) - 1)
        direction_BX = _unit(torch.randn(x_BX.shape, generator=generator, device=x_BX.device))
        share_B = torch.rand(len(x_BX), generator=generator, device=x_BX.device) ** (1 / x_BX[0].numel())
        return self.radius * _like(share_B, x_BX) * direction_BX

    def step(self, gradient_BX: Tensor) -> Tensor:
        """Steepest ascent of length `step_size`; zero for a zero gradient."""
        return self.step_size * (_unit(gradient_BX) if self.is_l2 else gradient_BX.sign())

    def project(self, x_BX: Tensor, d_BX: Tensor) -> Tensor:
        """x + d with d projected onto the ball, then clamped to [0, 1], which only shortens d: x is on [0, 1]."""
        if self.is_l2:
            d_BX = d_BX * (self._aim / _like(_length(d_BX), d_BX).clamp(min=1e-30)).clamp(max=1)
        else:
            d_BX = d_BX.clamp(-self._aim, self._aim)
        return (x_BX + d_BX).clamp(0, 1)


def _margin(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Largest logit of another class minus the logit of the label: above zero where the prediction is wrong."""
    own_B1 = logits_BK.gather(1, y_B[:, None])
    return (logits_BK.scatter(1, y_B[:, None], -torch.inf).amax(1, keepdim=True) - own_B1)[:, 0]


def _length(d_BX: Tensor, norm: str = "l2") -> Tensor:
    return torch.linalg.vector_norm(d_BX.flatten(1), 2 if norm == "l2" else torch.inf, dim=1)


def _unit(d_BX: Tensor) -> Tensor:
    # Divided by the largest entry first: the square of a small gradient is zero in float32.
    d_BX = d_BX / _like(d_BX.flatten(1).abs().amax(1).clamp(min=1e-38), d_BX)
    return d_BX / _like(_length(d_BX).clamp(min=1e-30), d_BX)


def _like(of_B: Tensor, x_BX: Tensor) -> Tensor:
    return of_B.view(-1, *[1] * (x_BX.dim() - 1))
