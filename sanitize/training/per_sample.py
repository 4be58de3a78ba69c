"""Gradient norms of single samples with respect to all weights, without storing those gradients.

The gradient of a layer for one sample is a product of its input and the gradient of its output, which determine its
norm (Goodfellow 2015 for linear layers; Bu, Mao & Xu 2022 for convolutions and for choosing the cheaper of two
formulas). One forward pass and one backward pass that stops at the layers' outputs give both. B batch.

    with recorded(network) as recording:
        losses_B = sample_losses(network(x_B), y_B, "cross_entropy")
    norms_B = recording.norms(losses_B)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm

from sanitize.errors import ConfigError

_SUPPORTED = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


class _Layer(NamedTuple):
    module: nn.Module
    input_B: Tensor
    output: GradientEdge  # recorded at once, so that a later in-place ReLU does not matter


class Recording:
    """Inputs and outputs of the layers in one forward pass."""

    def __init__(self) -> None:
        self._layers: list[_Layer] = []

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if any(layer.module is module for layer in self._layers):
            raise ConfigError(
                f"{type(module).__name__} runs twice in one forward pass: gradient norms do not support that"
            )
        self._layers.append(_Layer(module, inputs[0].detach(), get_gradient_edge(output)))

    def norms(self, losses_B: Tensor) -> Tensor:
        """||d loss_i / d weights||_2 of each sample, (B,) float32; the graph is kept for the backward pass."""
        edges = [layer.output for layer in self._layers]
        gradients = torch.autograd.grad(losses_B.sum(), edges, retain_graph=True)
        squares = [
            _squared_norms(layer.module, layer.input_B.float(), gradient.float())
            for layer, gradient in zip(self._layers, gradients, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt()


@contextmanager
def recorded(network: nn.Module) -> Iterator[Recording]:
    """Record one forward pass of `network`. Raises ConfigError for a layer without a formula."""
    layers = [module for module in network.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    for layer in layers:
        _refuse(layer)
    recording = Recording()
    handles = [layer.register_forward_hook(recording._record) for layer in layers]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _refuse(layer: nn.Module) -> None:
    if isinstance(layer, _BatchNorm):
        raise ConfigError(
            "BatchNorm mixes the samples of a batch, so that samples have no gradients of their own: convert the "
            "network with sanitize.models.group_norm.without_batch_norm, or choose prl_l"
        )
    if not isinstance(layer, _SUPPORTED):
        names = ", ".join(kind.__name__ for kind in _SUPPORTED)
        raise ConfigError(f"per-sample gradients of {type(layer).__name__} are not supported, only of {names}")
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or isinstance(layer.padding, str)):
        raise ConfigError("per-sample gradients of Conv2d are known for groups=1 and padding in numbers only")


def _squared_norms(module: nn.Module, input_B: Tensor, gradient_B: Tensor) -> Tensor:
    """Squared norm of the gradient of a layer's weight and bias, (B,)."""
    if isinstance(module, nn.Conv2d):
        patches_BIP = nn.functional.unfold(  # I inputs of one output pixel, P positions, O outputs
            input_B, module.kernel_size, module.dilation, cast(tuple[int, ...], module.padding), module.stride
        )
        return _of_product(patches_BIP, gradient_B.flatten(2), module.bias is not None)
    if isinstance(module, nn.Linear):
        if input_B.dim() == 2:
            input_B, gradient_B = input_B[:, None], gradient_B[:, None]
        patches_BIP, gradient_BOP = (tensor.flatten(1, -2).transpose(1, 2) for tensor in (input_B, gradient_B))
        return _of_product(patches_BIP, gradient_BOP, module.bias is not None)
    if isinstance(module, nn.GroupNorm):
        normal_B = nn.functional.group_norm(input_B, module.num_groups, eps=module.eps)
        weight_BC = (normal_B * gradient_B).flatten(2).sum(2)
        bias_BC = gradient_B.flatten(2).sum(2)
    else:
        assert isinstance(module, nn.LayerNorm)
        shape = module.normalized_shape
        normal_B = nn.functional.layer_norm(input_B, shape, eps=module.eps)
        weight_BC, bias_BC = (t.reshape(len(t), -1, *shape).sum(1) for t in (normal_B * gradient_B, gradient_B))
    squares_B = weight_BC.square().flatten(1).sum(1)
    return squares_B + bias_BC.square().flatten(1).sum(1) if module.bias is not None else squares_B


def _of_product(input_BIP: Tensor, gradient_BOP: Tensor, bias: bool) -> Tensor:
    """||gradient input^T||^2 of each sample, by the product or by two P x P Gram matrices, whichever is cheaper."""
    n_in, n_positions = input_BIP.shape[1:]
    n_out = gradient_BOP.shape[1]
    if n_positions * (n_in + n_out) < n_in * n_out:
        gram_BPP = input_BIP.transpose(1, 2) @ input_BIP
        squares_B = (gram_BPP * (gradient_BOP.transpose(1, 2) @ gradient_BOP)).sum((1, 2))
    else:
        squares_B = (gradient_BOP @ input_BIP.transpose(1, 2)).square().sum((1, 2))
    return squares_B + gradient_BOP.sum(2).square().sum(1) if bias else squares_B
