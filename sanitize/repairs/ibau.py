"""Implicit Backdoor Adversarial Unlearning (I-BAU; Zeng et al. 2022, "Adversarial Unlearning of Backdoors via Implicit
Hypergradient", algorithm 1). With a few clean images and no trigger, the network unlearns the universal perturbation
that raises its loss most.

    min over theta of  H(delta(theta), theta),     delta(theta) = argmax over ||delta||_2 <= C of H(delta, theta)

H is the mean cross-entropy of the images with delta added. A round ascends from delta = 0. Then theta takes a step for
each batch of clean images, along the gradient in which delta depends on theta (equations 2 and 3):

    grad psi = grad_2 E + grad_21 H v,     -grad_11 H v = grad_1 E

with the outer loss E, here a mixture of H(delta, .) and H(0, .). The linear system is solved with Hessian-vector
products, by K steps of the fixed point v <- v + step (grad_1 E + grad_11 H v) (Grazzi et al. 2020) or of conjugate
gradient; no matrix is formed.

The best round, and the round to stop after, are chosen on held-out clean images. Shapes: B batch, C H W image.
"""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.ascent import l2_ball, projected_ascent
from sanitize.compute import Compute
from sanitize.errors import NumericsError
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs

Loss = Callable[[Tensor], Tensor]  # from the perturbation to the loss, with the current weights of the network


class IBAUConfig(BaseRepairConfig):
    """Unlearn a universal perturbation.

    Attributes:
        radius: C, largest l2 norm of the perturbation in normalised images, which are not clipped.
        rounds: largest number of rounds.
        inner_learning_rate: learning rate of the ascent, one plain gradient step a batch. If it is too small, the
            perturbation stays inside the ball and is not the trigger: with 10 and one pass the attack success rate of
            BadNets stayed at 96 % (LOG.md).
        inner_passes: passes over the images in each ascent.
        optimizer, learning_rate: optimiser of the weights.
        perturbed_weight: weight of the perturbed images in the outer loss; the rest is the weight of the clean images.
        implicit: False uses the direct gradient grad_2 E alone, which is adversarial training against delta.
        solver: solver of the linear system.
        solver_steps: K.
        fixed_point_step: step of the fixed-point iteration.
        batch_size: images in a step.
        max_drop: largest loss of accuracy on held-out images; rounds with a larger loss are not chosen.
        patience: rounds without improvement until the repair stops.
    """

    kind: Literal["ibau"] = "ibau"
    needs: ClassVar[Needs] = "clean"
    radius: float = Field(default=10.0, gt=0)
    rounds: int = Field(default=12, ge=1)
    inner_learning_rate: float = Field(default=100.0, gt=0)
    inner_passes: int = Field(default=3, ge=1)
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    perturbed_weight: float = Field(default=0.1, gt=0, le=1)
    implicit: bool = True
    solver: Literal["fixed_point", "conjugate_gradient"] = "fixed_point"
    solver_steps: int = Field(default=5, ge=1)
    fixed_point_step: float = Field(default=0.1, gt=0)
    batch_size: int = Field(default=100, ge=1)
    max_drop: float = Field(default=0.04, ge=0, le=1)
    patience: int = Field(default=3, ge=1)

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: IBAUConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Unlearn, in a copy of the network; BatchNorm keeps its statistics.

    Raises:
        ConfigError: there are no clean images.
        NumericsError: the loss is not finite.
    """
    start = time.perf_counter()
    clean = inputs.clean_images()
    device = compute.torch_device
    model = copy.deepcopy(model).to(device).eval()
    x_NCHW = inputs.config.normalise(clean.images_NCHW.to(device))
    held_MCHW = inputs.config.normalise(clean.held_out_MCHW.to(device))
    labels_N, held_M = clean.labels_N.to(device), clean.held_out_labels_M.to(device)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=config.learning_rate)
    chosen = _Chosen(config.max_drop)
    for number in range(config.rounds + 1):
        order_N = torch.randperm(len(labels_N), generator=compute.generator("repair", "ibau", number)).to(device)
        batches = [(x_NCHW[rows], labels_N[rows]) for rows in order_N.split(config.batch_size)]
        delta_CHW = ascend(model, batches * config.inner_passes, config.radius, config.inner_learning_rate)
        right = _share_right(model, held_MCHW, held_M), _share_right(model, held_MCHW + delta_CHW, held_M)
        chosen.see(model, *right, float(delta_CHW.norm()))
        if number == config.rounds or chosen.rounds_since >= config.patience:
            break
        _unlearn(config, model, optimizer, batches, delta_CHW, number)
    model.load_state_dict(chosen.state)
    seconds = {"total": time.perf_counter() - start}
    return Repaired(model.cpu().eval(), {"rounds": chosen.rows, "taken": chosen.best}, seconds)


def _unlearn(
    config: IBAUConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    delta_CHW: Tensor,
    number: int,
) -> None:
    """One step of the weights a batch."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for x_BCHW, labels_B in batches:

        def inner(delta: Tensor, x_BCHW: Tensor = x_BCHW, labels_B: Tensor = labels_B) -> Tensor:
            return nn.functional.cross_entropy(model(x_BCHW + delta), labels_B)

        def outer(delta: Tensor, inner: Loss = inner) -> Tensor:
            perturbed = config.perturbed_weight * inner(delta)
            return perturbed + (1 - config.perturbed_weight) * inner(torch.zeros_like(delta))

        solver = config.solver if config.implicit else None
        steps = config.solver_steps, config.fixed_point_step
        gradients = hypergradient(inner, outer, delta_CHW, weights, solver, *steps)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise NumericsError(f"the hypergradient is not finite in round {number + 1}; lower learning_rate")
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()


class _Chosen:
    """The network of the best round: of the rounds that lose at most `max_drop` accuracy on held-out images, the one
    with the highest accuracy on perturbed held-out images."""

    def __init__(self, max_drop: float) -> None:
        self.max_drop = max_drop
        self.rows: list[dict[str, float]] = []
        self.best = 0
        self.state: dict[str, Tensor] = {}

    @property
    def rounds_since(self) -> int:
        return len(self.rows) - 1 - self.best

    def see(self, model: nn.Module, clean: float, perturbed: float, norm: float) -> None:
        self.rows.append({"held_out_accuracy": clean, "perturbed_accuracy": perturbed, "perturbation_l2": norm})
        keeps = clean >= self.rows[0]["held_out_accuracy"] - self.max_drop
        if not self.state or (keeps and perturbed > self.rows[self.best]["perturbed_accuracy"]):
            self.best = len(self.rows) - 1
            self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def ascend(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], radius: float, learning_rate: float) -> Tensor:
    """The universal perturbation (C, H, W): from 0, one gradient step a batch, each brought back into the l2 ball."""

    def loss(delta_CHW: Tensor, number: int) -> Tensor:
        x_BCHW, labels_B = batches[number]
        return nn.functional.cross_entropy(model(x_BCHW + delta_CHW), labels_B)

    start_CHW = torch.zeros_like(batches[0][0][0])
    return projected_ascent(start_CHW, loss, lambda g_CHW: learning_rate * g_CHW, l2_ball(radius), len(batches))


def hypergradient(
    inner: Loss,
    outer: Loss,
    delta: Tensor,
    weights: Sequence[Tensor],
    solver: Literal["fixed_point", "conjugate_gradient"] | None,
    n_steps: int,
    step: float,
) -> list[Tensor]:
    """Gradient of outer(delta(theta), theta) in the weights, where delta(theta) maximises inner(., theta).

    Args:
        inner: H.
        outer: E.
        delta: value of delta(theta); any shape.
        weights: theta.
        solver: solver of -grad_11 H v = grad_1 E; None leaves the implicit term out.
        n_steps: steps of the solver.
        step: step of the fixed point; it converges below 2 over the largest eigenvalue of -grad_11 H.
    """
    delta = delta.detach().requires_grad_(True)
    of_delta, *direct = torch.autograd.grad(outer(delta), [delta, *weights], allow_unused=True)
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, direct, strict=True)]
    if solver is None:
        return gradients
    (ascent,) = torch.autograd.grad(inner(delta), delta, create_graph=True)

    def curvature(v: Tensor) -> Tensor:
        """-grad_11 H v."""
        return -torch.autograd.grad(ascent, delta, v, retain_graph=True)[0]

    if solver == "fixed_point":
        v = fixed_point(curvature, of_delta, n_steps, step)
    else:
        v = conjugate_gradient(curvature, of_delta, n_steps)
    implicit = torch.autograd.grad(ascent, weights, v, allow_unused=True)
    return [g if i is None else g + i for g, i in zip(gradients, implicit, strict=True)]


def fixed_point(curvature: Callable[[Tensor], Tensor], g: Tensor, n_steps: int, step: float) -> Tensor:
    """Solve curvature(v) = g by v <- v + step (g - curvature(v)), from 0."""
    v = torch.zeros_like(g)
    for _ in range(n_steps):
        v = v + step * (g - curvature(v))
    return v


def conjugate_gradient(curvature: Callable[[Tensor], Tensor], g: Tensor, n_steps: int) -> Tensor:
    """Solve curvature(v) = g from 0; stop where the curvature is not positive, because H has no maximum there."""
    v, residual = torch.zeros_like(g), g.clone()
    direction, square = residual.clone(), residual.square().sum()
    for _ in range(n_steps):
        image = curvature(direction)
        along = (direction * image).sum()
        if along <= 0 or square <= 1e-20:
            break
        v = v + square / along * direction
        residual = residual - square / along * image
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return v


@torch.no_grad()
def _share_right(model: nn.Module, x_NCHW: Tensor, labels_N: Tensor) -> float:
    predictions = [model(x_BCHW).argmax(1) for x_BCHW in x_NCHW.split(512)]
    return float((torch.cat(predictions) == labels_N).float().mean())
