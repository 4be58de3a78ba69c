"""Channels of a network, for methods that judge and prune one neuron at a time.

Between a convolution and its norm a pool may lie, as in `ConvNet`, which the sites of a projection (`repair.sites`) do
not allow: pooling does not mix channels. Shapes: B batch, C channels, X positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.models.trace import BatchNorm, Linear, last_linear, trace
from sanitize.repairs.inputs import RepairInputs, held_out_accuracy
from sanitize.repairs.sites import Site, follows


def find_channels(model: nn.Module, example_BCHW: Tensor) -> list[Site]:
    """Every convolution and Linear but the last Linear, in the order in which they run on an example.

    The norm of a layer is the BatchNorm that runs next, if it has as many channels and is computed from the output of
    this layer alone. In a pre-activation network it is not: it normalises a sum, or the sum reads the layer too.
    """
    calls = [call for call in trace(model, example_BCHW) if isinstance(call.module, Linear | BatchNorm)]
    head = last_linear(calls)
    sites = []
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        layer = call.module
        if not isinstance(layer, Linear) or call.name == head:
            continue
        n_channels, norm = layer.weight.shape[0], None
        if following is not None and _has_channels(following.module, n_channels):
            is_own = follows(model, example_BCHW, call.name, following.name, directly=False)
            norm = following.name if is_own else None
        sites.append(Site(norm or call.name, call.name, norm, "output", n_channels))
    return sites


def _has_channels(module: nn.Module, n_channels: int) -> bool:
    """True for a BatchNorm of `n_channels` channels with weights."""
    return isinstance(module, BatchNorm) and module.affine and module.num_features == n_channels


def scaled_by(model: nn.Module, site: Site) -> str:
    """Name of the module whose weight and bias scale and shift each channel: the norm, or else the layer."""
    return site.norm or site.linear


@torch.no_grad()
def prune(model: nn.Module, site: Site, channels_C: Tensor, keep_bias: bool) -> None:
    """Set channels to a constant, in place.

    Args:
        model: the network.
        site: layer, from `find_channels`.
        channels_C: channels to prune, as a mask (C,) bool or as indices, int64.
        keep_bias: the constant is the bias, which after a BatchNorm is the mean of the channel before the
            non-linearity; else it is 0.
    """
    module: Any = model.get_submodule(scaled_by(model, site))
    channels_C = channels_C.to(module.weight.device)
    module.weight[channels_C] = 0
    if module.bias is not None and not keep_bias:
        module.bias[channels_C] = 0


@torch.no_grad()
def prune_in_order(
    model: nn.Module,
    order: list[tuple[Site, int]],
    max_drop: float,
    keep_bias: bool,
    inputs: RepairInputs,
    compute: Compute,
) -> dict[str, list[int]]:
    """Prune one channel after the other, in place, until the next would cost too much accuracy.

    Args:
        model: the network; it is changed.
        order: layer and index of each channel that may be pruned, in the order of pruning.
        max_drop: largest loss of accuracy on held-out clean images, in [0, 1].
        keep_bias: as for `prune`.
        inputs: the clean images.
        compute: device.

    Returns:
        The pruned channels of each layer by its name.
    """
    least = held_out_accuracy(model, inputs, compute) - max_drop
    pruned: dict[str, list[int]] = {site.name: [] for site, _ in order}
    for site, channel in order:
        module: Any = model.get_submodule(scaled_by(model, site))
        before = {name: p[channel].clone() for name, p in module.named_parameters(recurse=False)}
        prune(model, site, torch.tensor([channel]), keep_bias)
        if held_out_accuracy(model, inputs, compute) < least:
            for name, values in before.items():
                getattr(module, name)[channel] = values
            break
        pruned[site.name].append(channel)
    return pruned


def outliers(value_C: Tensor, n_deviations: float) -> Tensor:
    """True for channels more than `n_deviations` standard deviations above the mean of their layer, (C,) bool."""
    return value_C > value_C.mean() + n_deviations * value_C.std()


def spatial_max(y_BCX: Tensor) -> Tensor:
    """Largest value of each channel, (B, C), of an activation (B, C) or (B, C, H, W)."""
    return y_BCX.flatten(2).amax(2) if y_BCX.dim() > 2 else y_BCX
