"""Channels of a network: where those methods read and prune that judge one neuron at a time.

Unlike the sites that a projection folds into (`repair.sites`), a channel survives pooling: between a convolution and
its norm a pool may lie, as in `ConvNet`. Shapes: B batch, C channels, X what follows.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.models.config import ModelConfig
from sanitize.repair.inputs import RepairInputs, held_out_accuracy
from sanitize.repair.sites import Linear, Norm, Site


def find_channels(model: nn.Module, config: ModelConfig) -> list[Site]:
    """Every convolution and Linear but the last Linear, in the order in which they run.

    A layer's norm is the BatchNorm that runs next, before any other layer, and has as many channels.
    """
    ran: list[tuple[str, nn.Module]] = []
    handles = [
        module.register_forward_hook(lambda module, _x, _y, name=name: ran.append((name, module)))
        for name, module in model.named_modules()
        if isinstance(module, Linear | Norm)
    ]
    try:
        with torch.inference_mode():
            model.eval()(config.example().to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    head = next((name for name, module in reversed(ran) if isinstance(module, nn.Linear)), None)
    sites = []
    for (name, module), (next_name, following) in zip(ran, [*ran[1:], ("", nn.Identity())], strict=True):
        if not isinstance(module, Linear) or name == head:
            continue
        n_channels = module.weight.shape[0]
        is_normed = isinstance(following, Norm) and following.affine and following.num_features == n_channels
        sites.append(
            Site(next_name if is_normed else name, name, next_name if is_normed else None, "output", n_channels)
        )
    return sites


def scaled_by(model: nn.Module, site: Site) -> str:
    """Name of the module whose weight and bias scale and shift each channel: the norm, or else the layer itself."""
    return site.norm or site.linear


@torch.no_grad()
def prune(model: nn.Module, site: Site, channels_C: Tensor, keep_bias: bool) -> None:
    """Set channels to a constant, in place.

    Args:
        model: the network.
        site: one of `find_channels`.
        channels_C: True for those to prune, bool, or their numbers, int64.
        keep_bias: the constant is the bias, which behind a BatchNorm is the channel's mean before the non-linearity;
            else it is 0.
    """
    module: Any = model.get_submodule(scaled_by(model, site))
    channels_C = channels_C.to(module.weight.device)
    module.weight[channels_C] = 0
    if module.bias is not None and not keep_bias:
        module.bias[channels_C] = 0


def prune_in_order(
    model: nn.Module,
    order: list[tuple[Site, int]],
    max_drop: float,
    keep_bias: bool,
    inputs: RepairInputs,
    compute: Compute,
) -> tuple[nn.Module, dict[str, list[int]]]:
    """Prune one channel after the other until the next would cost too much.

    Args:
        model: left as it is.
        order: layer and number of each channel that may go, the first to go first.
        max_drop: of the accuracy on held-out clean images, a share.
        keep_bias: as for `prune`.
        inputs: holds the clean images.
        compute: device.

    Returns:
        The pruned network, and by name of the layer the channels that went.
    """
    least = held_out_accuracy(model, inputs, compute) - max_drop
    pruned: dict[str, list[int]] = {site.name: [] for site, _ in order}
    for site, channel in order:
        trial = copy.deepcopy(model)
        prune(trial, site, torch.tensor([channel]), keep_bias)
        if held_out_accuracy(trial, inputs, compute) < least:
            break
        model = trial
        pruned[site.name].append(channel)
    return model, pruned


def outliers(of_C: Tensor, n_deviations: float) -> Tensor:
    """True where a channel is more than so many standard deviations above the mean of its layer, (C,) bool."""
    return of_C > of_C.mean() + n_deviations * of_C.std()


def spatial_max(y_BCX: Tensor) -> Tensor:
    """The largest value of each channel, (B, C), of an activation (B, C) or (B, C, H, W)."""
    return y_BCX.flatten(2).amax(2) if y_BCX.dim() > 2 else y_BCX
