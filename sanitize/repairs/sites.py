"""Places of a network where features can be projected at no cost: the projection folds into the weights.

A site is the output of a convolution or Linear with the BatchNorm that directly follows it, before the non-linearity,
or the input of the last Linear. With columns V and R, R^T V = I, and the mean m of the features, y becomes

    y - V R^T (y - m) = P y + V R^T m,     P = I - V R^T,

orthogonal for R = V. Behind a BatchNorm y = a (W x + b) + c, with a = gamma / sqrt(var + eps) and c = beta - a mu, so W
becomes P diag(a) W. What the BatchNorm then sees has the mean P (m - c - a b) and the variance diag(P Cov(y) P^T).
These become its running statistics, beta becomes m and gamma sqrt(var + eps): the network computes the same in training
mode, and fine-tuning begins where the repair ended.

Shapes: B batch, D channels or features, k directions, H W positions.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sanitize.models.trace import BatchNorm, Linear, last_linear, removing, trace


class Site(NamedTuple):
    """A place where features are read and projected.

    Attributes:
        name: name of the module whose output (or input) is read, as in `model.named_modules()`.
        linear: name of the convolution or Linear.
        norm: name of the BatchNorm behind it; None where there is none.
        side: output: output of the norm, or else of the layer; input: input of the last Linear.
        n_features: D.
    """

    name: str
    linear: str
    norm: str | None
    side: Literal["output", "input"]
    n_features: int


class Projection(NamedTuple):
    """y - V R^T (y - m), float64: directions are removed, the mean is kept.

    Attributes:
        removed_Dk: V.
        read_Dk: R, with R^T V = I; V itself, orthonormal, where the projection is orthogonal.
        mean_D: m, over samples and positions.
        covariance_DD: covariance of the features before the projection.
    """

    removed_Dk: Tensor
    read_Dk: Tensor
    mean_D: Tensor
    covariance_DD: Tensor

    def __call__(self, y_B: Tensor) -> Tensor:
        """Project an activation (B, D, ...) explicitly; `fold` does the same in the weights."""
        y_BxD = channels_last(y_B)
        removed_Dk, read_Dk, mean_D = (tensor.to(y_B) for tensor in self[:3])
        return (y_BxD - (y_BxD - mean_D) @ read_Dk @ removed_Dk.T).movedim(-1, 1)


def find_sites(model: nn.Module, example_BCHW: Tensor) -> list[Site]:
    """All sites, in the order in which they run on an example.

    A layer is no site where folding a projection would change more than its features:
    - a grouped convolution, or a layer that runs twice;
    - a layer whose weight is shared with another one, or computed (`torch.nn.utils.parametrize`);
    - a Linear on tokens (B, T, D) or on maps with channels last: features are dimension 1;
    - a layer without a bias, which could not hold the mean, unless a BatchNorm follows it directly (`follows`).
    """
    calls = [call for call in trace(model, example_BCHW) if isinstance(call.module, Linear | BatchNorm)]
    n_calls = Counter(call.name for call in calls)
    head = last_linear(calls)
    sites = []
    for name, module, x, y in calls:
        if not isinstance(module, Linear) or n_calls[name] > 1 or not _can_be_written(model, module):
            continue
        if x.dim() != (2 if isinstance(module, nn.Linear) else 4):
            continue
        if name == head:
            if module.bias is not None:
                sites.append(Site(name, name, None, "input", module.weight.shape[1]))
            continue
        candidates = [
            call.name for call in calls if call.x is y and n_calls[call.name] == 1 and _is_fixed_norm(call.module)
        ]
        norm = next((other for other in candidates if follows(model, example_BCHW, name, other)), None)
        if norm is not None or module.bias is not None:
            sites.append(Site(norm or name, name, norm, "output", module.weight.shape[0]))
    return sites


def _is_fixed_norm(module: nn.Module) -> bool:
    """True for a BatchNorm with weights and running statistics, which `fold` can write."""
    return isinstance(module, BatchNorm) and module.affine and module.track_running_stats


def _can_be_written(model: nn.Module, layer: nn.Linear | nn.Conv2d) -> bool:
    """True if `fold` can change the weight of the layer without changing another layer."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    own = dict(layer.named_parameters(recurse=False))
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return groups == 1 and "weight" in own and all(owners[id(p)] == 1 for p in own.values())


def follows(model: nn.Module, example_BCHW: Tensor, layer: str, norm: str, directly: bool = True) -> bool:
    """True if `norm` is computed from the output of `layer` alone, and nothing else reads that output.

    The identity of tensors does not show this: an in-place ReLU between the two changes the values and not the object.
    So noise takes the place of the output of `layer`, and the output of `norm` is held: then the input of `norm` must
    be that noise, and the outputs of the network must stay. In a pre-activation network they do not, because the output
    of `layer` is added to a later one, past the norm.

    Layers get copies of all tensors here, because the network may write into them: torchvision's residual networks
    compute `out += identity` in the output of their norm.

    Args:
        model: the network, in eval mode.
        example_BCHW: normalised images.
        layer: name of a convolution or Linear.
        norm: name of a BatchNorm.
        directly: False allows operations between the two, such as pooling: the input of `norm` must then be the same
            for two different batches of images.
    """
    example_BCHW = example_BCHW.to(next(model.parameters(), example_BCHW).device)
    held: list[Tensor] = []
    noise: list[Tensor] = []
    inputs: list[Tensor] = []

    def hold(_module: nn.Module, _inputs: Any, y_B: Tensor) -> Tensor:
        if not held:
            held.append(y_B.clone())
        return held[0].clone()

    def replace(_module: nn.Module, _inputs: Any, y_B: Tensor) -> Tensor:
        noise.append(_noise_like(y_B))
        return noise[0].clone()

    def keep(_module: nn.Module, x: tuple[Tensor, ...]) -> None:
        inputs.append(x[0].clone())

    first, second = model.get_submodule(layer), model.get_submodule(norm)
    with torch.inference_mode(), removing([second.register_forward_hook(hold)]):
        before_BK = model(example_BCHW)
        with removing([first.register_forward_hook(replace), second.register_forward_pre_hook(keep)]):
            if not torch.equal(before_BK, model(example_BCHW)) or len(inputs) != 1:
                return False
            if directly:
                return torch.equal(inputs[0], noise[0])
            model(_noise_like(example_BCHW))
            return torch.equal(inputs[0], inputs[1])


def _noise_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device).to(x)


def channels_last(x_B: Tensor) -> Tensor:
    """Features (B, ..., D) of an activation (B, D), (B, D, H, W)."""
    return x_B.movedim(1, -1)


@contextmanager
def watching(model: nn.Module, sites: list[Site], see: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block, `see` is called with the activation of every site; a tensor it returns replaces it."""

    def on_output(site: Site) -> Callable[..., Tensor | None]:
        return lambda _module, _inputs, y_B: see(site, y_B)

    def on_input(site: Site) -> Callable[..., Tensor | None]:
        return lambda _module, inputs: see(site, inputs[0])

    modules: dict[str, Any] = dict(model.named_modules())
    handles = [
        modules[site.name].register_forward_hook(on_output(site))
        if site.side == "output"
        else modules[site.name].register_forward_pre_hook(on_input(site))
        for site in sites
    ]
    with removing(handles):
        yield


@torch.no_grad()
def fold(model: nn.Module, site: Site, projection: Projection) -> None:
    """Fold a projection at a site of `find_sites` into the network, in place."""
    linear: Any = model.get_submodule(site.linear)
    removed_Dk, read_Dk, mean_D, covariance_DD = (tensor.to(linear.weight.device) for tensor in projection)
    removed_DD = removed_Dk @ read_Dk.T
    weight_ox = linear.weight.double().flatten(1)
    bias_o = torch.zeros(len(weight_ox)).to(weight_ox) if linear.bias is None else linear.bias.double()
    if site.side == "input":
        linear.bias.copy_(bias_o + weight_ox @ (removed_DD @ mean_D))
        linear.weight.copy_(weight_ox - weight_ox @ removed_DD)
        return
    if site.norm is not None:
        norm: Any = model.get_submodule(site.norm)
        scale_o = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias_o = scale_o * (bias_o - norm.running_mean.double()) + norm.bias.double()
        weight_ox = scale_o[:, None] * weight_ox
    linear.weight.copy_((weight_ox - removed_DD @ weight_ox).view_as(linear.weight))
    bias_o = bias_o + removed_DD @ (mean_D - bias_o)
    if site.norm is None:
        linear.bias.copy_(bias_o)
        return
    kept_DD = torch.eye(len(removed_DD)).to(removed_DD) - removed_DD
    norm.running_mean.copy_(mean_D - bias_o)
    norm.running_var.copy_((kept_DD @ covariance_DD @ kept_DD.T).diag().clamp(min=0))
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(mean_D)
    if linear.bias is not None:
        linear.bias.zero_()
