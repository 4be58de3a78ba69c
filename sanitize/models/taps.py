"""Reading a network's inner activations with hooks: penultimate layer, the last feature maps, and early features.

The modules are found by running the network once, not by their names, so every architecture is supported whose forward
pass ends in a Linear.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sanitize.errors import ConfigError
from sanitize.models.trace import removing, trace

EARLY_CHANNELS = 64  # most channels of the early features; channels of a layer are exchangeable, so the first ones


class Taps(NamedTuple):
    """Names of the tapped modules, as in `model.named_modules()`.

    Attributes:
        penultimate: the last Linear; its input is the embedding.
        feature_maps: the last normalisation of feature maps (BatchNorm2d or GroupNorm), or else the last convolution;
            its output, before the non-linearity, is pooled. None where no map is larger than 1 x 1.
        early: the layer a third of the way through the layers of that kind (in a network without feature maps, of the
            Linear layers before the head). A trigger that the last layers hide can be plain there. None where the head
            is the only layer.
    """

    penultimate: str
    feature_maps: str | None
    early: str | None


def find_taps(model: nn.Module, example_BCHW: Tensor, penultimate: str | None = None) -> Taps:
    """The last Linear that runs on an example, and the last feature maps.

    Args:
        model: the network; it is left in eval mode.
        example_BCHW: normalised images.
        penultimate: name of another Linear, to be taken instead of the last.

    Raises:
        ConfigError: no Linear runs, or `penultimate` names no Linear of the model.
    """
    calls = [call for call in trace(model, example_BCHW) if len(call.y) == len(example_BCHW)]  # one row an image
    linears = [call.name for call in calls if isinstance(call.module, nn.Linear)]
    if penultimate is not None and penultimate not in linears:
        raise ConfigError(
            f"penultimate={penultimate!r} is no Linear of the model; it has {', '.join(linears) or 'none'}"
        )
    if not linears:
        raise ConfigError("the model runs no Linear layer, so its penultimate layer cannot be found; name a head")
    maps = [(call.name, call.module) for call in calls if call.y.dim() == 4 and call.y.shape[2:].numel() > 1]
    norms = [name for name, module in maps if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    convs = [name for name, module in maps if isinstance(module, nn.Conv2d) and not _patchifies(module)]
    names = norms or convs
    sites = names or linears[:-1]
    early = sites[(len(sites) - 1) // 3] if sites else None
    return Taps(penultimate or linears[-1], names[-1] if names else None, early)


def _patchifies(conv: nn.Conv2d) -> bool:
    """True for the patch embedding of a transformer, whose output is no map of features."""
    return conv.kernel_size == conv.stride != (1, 1)


class Tapped:
    """A network that also returns the activations at its taps.

    Args:
        model: the network, in eval mode; it is not changed.
        taps: result of `find_taps`.
    """

    def __init__(self, model: nn.Module, taps: Taps) -> None:
        self.model = model
        self.taps = taps

    def __call__(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """One forward pass.

        Returns:
            "logits" (B, K); "penultimate" (B, D), the input of the last Linear; and for networks with feature maps
            "pooled" (B, 2 C), spatial maximum and spatial mean of the normalised pre-activation; and where there is
            an early layer "early" (B, 2 C), the same of at most `EARLY_CHANNELS` of its channels. Features without
            positions (B, C) are taken as they are.
        """
        kept: dict[str, Tensor] = {}

        def keep_input(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept["penultimate"] = inputs[0].flatten(1).clone()  # `flatten` of (B, D) is the tensor itself

        def keep_pooled(_module: nn.Module, _inputs: Any, output_BCHW: Tensor) -> None:
            # Pooled here, inside the hook: an in-place ReLU that follows would overwrite the maps.
            kept["pooled"] = _pool(output_BCHW)

        def keep_early(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            y_BCX = output.movedim(-1, 1) if isinstance(module, nn.Linear) else output  # tokens: (B, ..., C)
            kept["early"] = _pool(y_BCX[:, :EARLY_CHANNELS])

        modules = dict(self.model.named_modules())
        handles = [modules[self.taps.penultimate].register_forward_pre_hook(keep_input)]
        if self.taps.feature_maps is not None:
            handles.append(modules[self.taps.feature_maps].register_forward_hook(keep_pooled))
        if self.taps.early is not None:
            handles.append(modules[self.taps.early].register_forward_hook(keep_early))
        with removing(handles):
            kept["logits"] = self.model(x_BCHW)
        return kept


def _pool(y_BCX: Tensor) -> Tensor:
    """Maximum and mean over all positions (B, 2 C); a copy of `y_BCX` (B, C) where it has none."""
    if y_BCX.dim() == 2:
        return y_BCX.clone()
    positions = tuple(range(2, y_BCX.dim()))
    return torch.cat([y_BCX.amax(positions), y_BCX.mean(positions)], 1)
