"""Reading a network's inner activations with hooks: the penultimate layer, and the last convolution's feature maps.

Which modules those are is found by running the network once and watching, not by their names, so any architecture
will do whose forward pass ends in a Linear.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sanitize.errors import ConfigError


class Taps(NamedTuple):
    """Names of the tapped modules, as in `model.named_modules()`.

    Attributes:
        penultimate: the last Linear; its input is the embedding.
        feature_maps: the last normalisation of feature maps (BatchNorm2d or GroupNorm), or else the last convolution;
            its output, before the non-linearity, is pooled. None where no map is larger than 1 x 1.
    """

    penultimate: str
    feature_maps: str | None


def find_taps(model: nn.Module, example_BCHW: Tensor, penultimate: str | None = None) -> Taps:
    """Run `model` on an example and see which Linear ran last, and which feature maps came last before it.

    Raises:
        ConfigError: no Linear runs, or `penultimate` names no Linear of the model.
    """
    seen: list[tuple[str, nn.Module, torch.Size]] = []
    handles = [
        module.register_forward_hook(lambda module, _in, out, name=name: seen.append((name, module, out.shape)))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.Conv2d))
    ]
    try:
        with torch.inference_mode():
            model.eval()(example_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    linears = [name for name, module, _ in seen if isinstance(module, nn.Linear)]
    if penultimate is not None and penultimate not in linears:
        raise ConfigError(
            f"penultimate={penultimate!r} is no Linear of the model; it has {', '.join(linears) or 'none'}"
        )
    if not linears:
        raise ConfigError("the model runs no Linear layer, so its penultimate layer cannot be found; name a head")
    maps = [(name, module) for name, module, shape in seen if len(shape) == 4 and shape[2] * shape[3] > 1]
    norms = [name for name, module in maps if not isinstance(module, nn.Conv2d)]
    convs = [name for name, module in maps if isinstance(module, nn.Conv2d) and not _patchifies(module)]
    names = norms or convs
    return Taps(penultimate or linears[-1], names[-1] if names else None)


def _patchifies(conv: nn.Conv2d) -> bool:
    """True for a transformer's patch embedding: it cuts the image up and sees no features."""
    return conv.kernel_size == conv.stride != (1, 1)


class Tapped:
    """Run a network and keep what its taps saw.

    Args:
        model: in eval mode; it is not changed.
        taps: from `find_taps`.
    """

    def __init__(self, model: nn.Module, taps: Taps) -> None:
        self.model = model
        self.taps = taps

    def __call__(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """One forward pass.

        Returns:
            "logits" (B, K); "penultimate" (B, D), the input of the last Linear; and where there are feature maps,
            "pooled" (B, 2 C): spatial maximum, then spatial mean, of the normalised pre-activation.
        """
        kept: dict[str, Tensor] = {}

        def keep_input(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept["penultimate"] = inputs[0].flatten(1).clone()  # `flatten` of (B, D) is the tensor itself

        def keep_pooled(_module: nn.Module, _inputs: Any, output_BCHW: Tensor) -> None:
            # Pooled here, inside the hook: an in-place ReLU that follows would overwrite the maps.
            kept["pooled"] = torch.cat([output_BCHW.amax((2, 3)), output_BCHW.mean((2, 3))], 1)

        modules = dict(self.model.named_modules())
        handles = [modules[self.taps.penultimate].register_forward_pre_hook(keep_input)]
        if self.taps.feature_maps is not None:
            handles.append(modules[self.taps.feature_maps].register_forward_hook(keep_pooled))
        try:
            kept["logits"] = self.model(x_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        return kept
