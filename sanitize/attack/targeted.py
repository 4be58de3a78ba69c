"""Targeted poisoning: a model trained on the data is to predict another class for one image, the target.

The attacker changes P images of that class, keeps their labels, and moves no pixel by more than eps. The attacks differ
in their objective (`dm_poisoning`, `gradient_matching`) and share the search, `perturb`. The direct attack replaces the
images by the target itself.

Pixels are whole levels from 0 to 255 throughout: the optimised images are those that are written, and the bound holds
exactly.
Shapes: N images of a data set, P poisoned ones, C H W image.
"""

import math
from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.ascent import linf_ball, projected_ascent
from sanitize.compute import Compute
from sanitize.errors import ConfigError, NumericsError
from sanitize.plural import counted

# Images (P, C, H, W) as float levels, and names of a random stream -> scalar to minimise.
Objective = Callable[[Tensor, tuple[str | int, ...]], Tensor]


class PerturbConfig(BaseModel):
    """Search in an l_inf ball (Zheng & Li, Algorithms 1 and 2).

    Attributes:
        eps: largest change of a pixel, of 255.
        step: change of a pixel in one iteration, of 255.
        momentum: decay of the mean gradient; its sign is the direction, as in Adam with the sign of its step.
        iterations: iterations of each restart.
        restarts: random starts in the ball; the images with the smallest objective at the end are kept.
        n_judges: random draws of the objective, the same for all restarts, to compare them by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eps: int = Field(default=64, ge=1, le=255)
    step: int = Field(default=1, ge=1, le=255)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    iterations: int = Field(default=250, ge=1)
    restarts: int = Field(default=8, ge=1)
    n_judges: int = Field(default=16, ge=1)


def perturb(images_PCHW: Tensor, objective: Objective, config: PerturbConfig, compute: Compute) -> Tensor:
    """Images (P, C, H, W), uint8 on the CPU, within eps of the given ones and with a small `objective`.

    Args:
        images_PCHW: uint8.
        objective: function of images on the device, differentiable; the same stream gives the same draw.
        config: the ball and the search.
        compute: device and seed.

    Raises:
        NumericsError: the objective is not finite.
    """
    clean_PCHW = images_PCHW.to(compute.torch_device, torch.float32)
    project = linf_ball(clean_PCHW, config.eps, 0, 255)
    found_PCHW, least = clean_PCHW, math.inf
    for restart in range(config.restarts):
        draws = compute.generator("attack", "start", restart)
        start_PCHW = torch.randint(-config.eps, config.eps + 1, images_PCHW.shape, generator=draws)
        start_PCHW = project(clean_PCHW + start_PCHW.to(clean_PCHW.device))
        x_PCHW = _search(start_PCHW, objective, restart, project, config)
        with torch.no_grad():
            value = sum(float(objective(x_PCHW, ("judge", i))) for i in range(config.n_judges)) / config.n_judges
        if not math.isfinite(value):
            raise NumericsError(f"the objective of the attack is {value} after restart {restart}")
        if value < least:
            found_PCHW, least = x_PCHW, value
    return found_PCHW.to("cpu", torch.uint8)


def _search(
    start_PCHW: Tensor, objective: Objective, restart: int, project: Callable[[Tensor], Tensor], config: PerturbConfig
) -> Tensor:
    """Last images (P, C, H, W) of one descent with momentum."""
    mean_PCHW = torch.zeros_like(start_PCHW)

    def loss(x_PCHW: Tensor, iteration: int) -> Tensor:
        return objective(x_PCHW, ("search", restart, iteration))

    def step(gradient_PCHW: Tensor) -> Tensor:
        mean_PCHW.mul_(config.momentum).add_((1 - config.momentum) * gradient_PCHW)
        return -config.step * mean_PCHW.sign()

    return projected_ascent(start_PCHW, loss, step, project, config.iterations)


def direct_attack(images_PCHW: Tensor, target_CHW: Tensor) -> Tensor:
    """The direct attack (Zheng & Li, section 5.3): the target in place of each image."""
    return target_CHW.expand_as(images_PCHW).clone()


def plant(
    images_NCHW: Tensor,
    labels_N: Tensor,
    label: int,
    rate: float,
    craft: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Poison round(rate N) images of one class, chosen at random; labels stay as they are.

    Args:
        images_NCHW: images of all classes, uint8.
        labels_N: int64.
        label: class that the model is to predict for the target.
        rate: poisoned images as a share of the whole data set.
        craft: poison from clean images (P, C, H, W) of the class.
        generator: random generator of the choice, on the CPU.

    Returns:
        images (N, C, H, W), a copy, and a mask of the poisoned ones, (N,) bool.

    Raises:
        ConfigError: the class has too few images.
    """
    wanted = round(rate * len(labels_N))
    of_class_X = (labels_N == label).nonzero()[:, 0]
    if wanted > len(of_class_X):
        raise ConfigError(
            f"rate {rate} asks for {counted(wanted, 'image')}, but class {label} has only {len(of_class_X)}"
        )
    rows_P = of_class_X[torch.randperm(len(of_class_X), generator=generator)[:wanted]]
    poisoned_NCHW, is_poisoned_N = images_NCHW.clone(), torch.zeros(len(labels_N), dtype=torch.bool)
    poisoned_NCHW[rows_P] = craft(images_NCHW[rows_P])
    is_poisoned_N[rows_P] = True
    return poisoned_NCHW, is_poisoned_N
