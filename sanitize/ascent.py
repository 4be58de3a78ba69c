"""Projected gradient ascent, for everything that searches for the worst input:

    x <- project(x + step(gradient of loss at x))

The caller gives loss, step and projection; a step against the gradient makes it descent. X is any shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]  # (X,) -> (X,)


def projected_ascent(start_X: Tensor, loss: Callable[[Tensor, int], Tensor], step: Map, project: Map, n: int) -> Tensor:
    """The point after `n` steps, without a gradient; `start_X` stays as it is.

    Args:
        start_X: the first point, float.
        loss: scalar loss of a point and the number of the step, from 0; differentiable in the point.
        step: displacement (X,) for a gradient (X,).
        project: nearest allowed point.
        n: number of steps.
    """
    x_X = start_X.detach()
    for number in range(n):
        x_X = x_X.detach().requires_grad_()
        with torch.enable_grad():
            (gradient_X,) = torch.autograd.grad(loss(x_X, number), x_X)
        x_X = project(x_X.detach() + step(gradient_X))
    return x_X


def linf_ball(
    center_X: Tensor, radius: float | Tensor, low: float | Tensor = -torch.inf, high: float | Tensor = torch.inf
) -> Map:
    """Projection onto the points within `radius` of `center_X` in every coordinate and between `low` and `high`.

    Tensors broadcast against `center_X`.
    """
    low_X, high_X = (center_X - radius).clamp(min=low), (center_X + radius).clamp(max=high)
    return lambda x_X: x_X.clamp(low_X, high_X)


def l2_ball(radius: float) -> Map:
    """Projection onto the points with an l2 norm of at most `radius`."""
    return lambda x_X: x_X * (radius / x_X.norm().clamp(min=1e-12)).clamp(max=1.0)
