"""Adversarial neuron pruning (Wu & Wang, 2021): prune neurons whose small perturbation triggers the backdoor.

With masks m on the weights w and biases b of each channel (in its BatchNorm, or else in its layer), on clean images

    min over m in [0, 1] of  alpha L(m w, b) + (1 - alpha) max over |d|, |e| <= epsilon of L((m + d) w, (1 + e) b)

(Eq. 4 to 6); the maximum is approximated by one signed gradient step from a random start. Channels with a mask below a
threshold are pruned, the smallest mask first, as far as the accuracy on held-out images allows: in narrow layers the
paper's threshold alone prunes half of the network. BatchNorm keeps its statistics while the masks are learned, because
a few images would change them a lot.

Shapes: B batch, C channels of all layers together.
"""

import copy
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from sanitize.compute import Compute
from sanitize.errors import NumericsError
from sanitize.repairs.channels import find_channels, prune_in_order, scaled_by
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs, held_out_accuracy
from sanitize.repairs.sites import Site


class ANPConfig(BaseRepairConfig):
    """Learn masks, then prune.

    Attributes:
        epsilon: largest relative perturbation.
        alpha: weight of the loss without perturbation.
        learning_rate: learning rate of the masks, by SGD with momentum 0.9.
        steps: number of SGD steps; 2,000 in the paper.
        batch_size: clean images in a step.
        threshold: mask below which a channel is pruned.
        max_drop: largest loss of accuracy on held-out clean images; pruning ends before it is exceeded.
    """

    kind: Literal["anp"] = "anp"
    needs: ClassVar[Needs] = "clean"
    epsilon: float = Field(default=0.4, gt=0)
    alpha: float = Field(default=0.2, ge=0, le=1)
    learning_rate: float = Field(default=0.2, gt=0)
    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=128, ge=1)
    threshold: float = Field(default=0.2, ge=0, le=1)
    max_drop: float = Field(default=0.04, ge=0, le=1)

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: ANPConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Prune a copy of `model`; `done` has the number of pruned channels of each layer."""
    compute.activate()
    model = copy.deepcopy(model).to(compute.torch_device).eval()
    sites = find_channels(model, inputs.config.example())
    masks = _masks(config, model, sites, inputs, compute)
    found = [(mask, i, c) for i, mask_C in enumerate(masks) for c, mask in enumerate(mask_C.tolist())]
    order = [(sites[i], c) for mask, i, c in sorted(found) if mask < config.threshold]
    pruned = prune_in_order(model, order, config.max_drop, True, inputs, compute)
    counts = {site.name: len(pruned.get(site.name, ())) for site in sites}
    done = {"pruned": counts, "below_threshold": len(order)}
    return Repaired(model, done | {"held_out_accuracy": held_out_accuracy(model, inputs, compute)})


def _masks(
    config: ANPConfig, model: nn.Module, sites: list[Site], inputs: RepairInputs, compute: Compute
) -> list[Tensor]:
    """Masks of each layer, (C,)."""
    device = compute.torch_device
    generator = compute.generator("repair", "anp", "start", device=device)
    sizes = [site.n_features for site in sites]
    mask_C = torch.ones(sum(sizes), device=device, requires_grad=True)
    optimizer = torch.optim.SGD([mask_C], lr=config.learning_rate, momentum=0.9)

    def loss(x_BCHW: Tensor, y_B: Tensor, weight_C: Tensor, bias_C: Tensor) -> Tensor:
        scaled = scaled_parameters(model, sites, weight_C.split(sizes), bias_C.split(sizes))
        with compute.autocast():
            logits_BK = functional_call(model, scaled, (x_BCHW,))
        return nn.functional.cross_entropy(logits_BK.float(), y_B)

    for images_BCHW, y_B in inputs.clean_batches(config.steps, config.batch_size, compute, "anp"):
        x_BCHW = inputs.config.normalise(images_BCHW)
        start_2C = 2 * torch.rand(2, sum(sizes), generator=generator, device=device) - 1
        worst_2C = (config.epsilon * start_2C).requires_grad_()
        ascent = loss(x_BCHW, y_B, mask_C.detach() + worst_2C[0], 1 + worst_2C[1])
        (gradient_2C,) = torch.autograd.grad(ascent, worst_2C)
        d_C, e_C = (worst_2C.detach() + config.epsilon * gradient_2C.sign()).clamp(-config.epsilon, config.epsilon)
        plain = loss(x_BCHW, y_B, mask_C, torch.ones_like(mask_C))
        total = config.alpha * plain + (1 - config.alpha) * loss(x_BCHW, y_B, mask_C + d_C, 1 + e_C)
        (mask_C.grad,) = torch.autograd.grad(total, mask_C)
        optimizer.step()
        with torch.no_grad():
            mask_C.clamp_(0, 1)
    if not torch.isfinite(mask_C).all():
        raise NumericsError(f"masks are not finite; lower learning_rate={config.learning_rate}")
    return list(mask_C.detach().split(sizes))


def scaled_parameters(
    model: nn.Module, sites: list[Site], weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Parameters by name, with the weight and bias of each channel multiplied by its factors."""
    parameters = {}
    for site, weight_C, bias_C in zip(sites, weights, biases, strict=True):
        name = scaled_by(model, site)
        module = model.get_submodule(name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        parameters[f"{name}.weight"] = weight * weight_C.view(-1, *[1] * (weight.dim() - 1))
        if isinstance(module.bias, Tensor):
            parameters[f"{name}.bias"] = module.bias * bias_C
    return parameters
