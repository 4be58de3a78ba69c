"""Places of a network where features can be projected at no cost: what a projection does there folds into the weights.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Norm = nn.BatchNorm1d | nn.BatchNorm2d
Linear = nn.Linear | nn.Conv2d


class Site(NamedTuple):
    """Where features are read and projected.

    Attributes:
        name: of the module whose output (or input) is meant, as in `model.named_modules()`.
        linear: name of the convolution or Linear.
        norm: name of the BatchNorm behind it; None where there is none.
        side: output: after the norm; input: what the last Linear takes.
        n_features: D.
    """

    name: str
    linear: str
    norm: str | None
    side: Literal["output", "input"]
    n_features: int


class Projection(NamedTuple):
    """y - V R^T (y - m), float64; a mean that is kept, directions that are removed.

    Attributes:
        removed_Dk: V.
        read_Dk: R, with R^T V = I; V itself, orthonormal, where the projection is orthogonal.
        mean_D: m, over samples and positions.
        covariance_DD: of the features before they are projected.
    """

    removed_Dk: Tensor
    read_Dk: Tensor
    mean_D: Tensor
    covariance_DD: Tensor

    def __call__(self, y_B: Tensor) -> Tensor:
        """The explicit projection of an activation (B, D, ...), that `fold` makes free."""
        y_BxD = channels_last(y_B)
        removed_Dk, read_Dk, mean_D = (of.to(y_B) for of in self[:3])
        return (y_BxD - (y_BxD - mean_D) @ read_Dk @ removed_Dk.T).movedim(-1, 1)


def find_sites(model: nn.Module, example_BCHW: Tensor) -> list[Site]:
    """All sites, in the order in which they run; found by running the network on an example and observing its layers.

    A layer is no site where folding a projection would change something else than its features:
    - a grouped convolution, or a layer that runs twice;
    - a layer whose weight is shared with another one, or computed (`torch.nn.utils.parametrize`);
    - a Linear on tokens (B, T, D) or on maps with channels last: features are dimension 1;
    - a layer without a bias, which could not hold the mean, unless a BatchNorm follows it directly (`_follows`).
    """
    ran: list[tuple[str, nn.Module, Tensor, Tensor]] = []  # the tensors are kept alive: their identities are compared
    handles = [
        module.register_forward_hook(lambda module, x, y, name=name: ran.append((name, module, x[0], y)))
        for name, module in model.named_modules()
        if isinstance(module, Linear | Norm)
    ]
    with torch.inference_mode(), removing(handles):
        model.eval()(example_BCHW)
    names = Counter(name for name, *_ in ran)
    head = next((name for name, module, *_ in reversed(ran) if isinstance(module, nn.Linear)), None)
    sites = []
    for name, module, x, y in ran:
        if not isinstance(module, Linear) or names[name] > 1 or not _can_be_written(model, module):
            continue
        if x.dim() != (2 if isinstance(module, nn.Linear) else 4):
            continue
        if name == head:
            if module.bias is not None:
                sites.append(Site(name, name, None, "input", module.weight.shape[1]))
            continue
        candidates = [
            other
            for other, norm, seen, _ in ran
            if seen is y and names[other] == 1 and isinstance(norm, Norm) and norm.affine and norm.track_running_stats
        ]
        norm = next((other for other in candidates if _follows(model, example_BCHW, name, other)), None)
        if norm is not None or module.bias is not None:
            sites.append(Site(norm or name, name, norm, "output", module.weight.shape[0]))
    return sites


def _can_be_written(model: nn.Module, layer: nn.Linear | nn.Conv2d) -> bool:
    """True if `fold` can change the layer's weight and nothing but the layer changes."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    own = dict(layer.named_parameters(recurse=False))
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return groups == 1 and "weight" in own and all(owners[id(p)] == 1 for p in own.values())


def _follows(model: nn.Module, example_BCHW: Tensor, linear: str, norm: str) -> bool:
    """True if `norm` reads exactly what `linear` gives, and nothing else reads it.

    That two tensors are the same object does not show this: an in-place ReLU between the layers changes the values and
    not the object. So noise takes the place of the output of `linear`, and the output of `norm` is held: then `norm`
    must be given that noise, and the network must give what it gave. In a pre-activation network it does not, because
    the output of `linear` is added to a later one, past the norm.

    Every tensor that the network is handed here is a copy, because the network may write into it: torchvision's
    residual networks compute `out += identity` in the output of their norm.
    """
    held: list[Tensor] = []
    noise: list[Tensor] = []
    is_given = []

    def hold(_module: nn.Module, _inputs: Any, y_B: Tensor) -> Tensor:
        if not held:
            held.append(y_B.clone())
        return held[0].clone()

    def replace(_module: nn.Module, _inputs: Any, y_B: Tensor) -> Tensor:
        generator = torch.Generator(y_B.device).manual_seed(0)
        noise.append(torch.randn(y_B.shape, generator=generator, device=y_B.device).to(y_B))
        return noise[0].clone()

    def compare(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        is_given.append(torch.equal(inputs[0], noise[0]))

    first, second = model.get_submodule(linear), model.get_submodule(norm)
    with torch.inference_mode(), removing([second.register_forward_hook(hold)]):
        before_BK = model(example_BCHW)
        with removing([first.register_forward_hook(replace), second.register_forward_pre_hook(compare)]):
            return torch.equal(before_BK, model(example_BCHW)) and is_given == [True]


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channels_last(x_B: Tensor) -> Tensor:
    """Features (B, ..., D) of an activation (B, D), (B, D, H, W)."""
    return x_B.movedim(1, -1)


@contextmanager
def watching(model: nn.Module, sites: list[Site], see: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
    """Within it, `see` is given every site's activation; what it returns, if anything, takes its place."""

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
    """Fold a projection at one of `find_sites` into the network, in place."""
    linear: Any = model.get_submodule(site.linear)
    removed_Dk, read_Dk, mean_D, covariance_DD = (of.to(linear.weight.device) for of in projection)
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
