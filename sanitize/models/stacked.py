"""Many networks of one architecture as one module: their weights are stacked, and each layer is one batched product.

Shapes: B batch, M networks, K classes.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.modules.dropout import _DropoutNd

from sanitize.errors import ConfigError


class Stacked(nn.Module):
    """Networks side by side, each trained on its own inputs, independently of the others.

    Args:
        template: one of the networks; without BatchNorm, whose statistics a batched product cannot keep apart, and
            without dropout, whose random numbers would be shared.
        weights: weights of all networks, each parameter with a first axis M.

    Raises:
        ConfigError: the network keeps statistics of its inputs, or draws random numbers.
    """

    def __init__(self, template: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        if buffers := [name for name, _ in template.named_buffers()]:
            raise ConfigError(f"networks that are trained side by side can keep no statistics: {', '.join(buffers)}")
        if any(isinstance(module, _DropoutNd) for module in template.modules()):
            raise ConfigError("networks that are trained side by side can have no dropout: choose another architecture")
        self.n_networks = len(next(iter(weights.values())))
        # Names of parameters have no dots; a template in a tuple is no submodule, it has no weights of its own.
        self._names = {name.replace(".", "__"): name for name in weights}
        self._template = (copy.deepcopy(template).to("meta"),)
        for name, own in self._names.items():
            self.register_parameter(name, nn.Parameter(weights[own].detach()))

    @classmethod
    def of(cls, networks: Sequence[nn.Module]) -> Self:
        """Stack networks of one architecture, with copies of their weights."""
        weights, _buffers = stack_module_state(list(networks))
        return cls(networks[0], weights)

    @classmethod
    def empty(cls, template: nn.Module, n_networks: int) -> Self:
        """Stack `n_networks` networks like `template`, with uninitialised weights, to be loaded."""
        weights = {name: weight.new_empty(n_networks, *weight.shape) for name, weight in template.named_parameters()}
        return cls(template, weights)

    def forward(self, x_B: Tensor, shared: bool = False) -> Tensor:
        """Outputs (B, M, K).

        Args:
            x_B: inputs of each network (B, M, ...), or shared inputs (B, ...).
            shared: True for shared inputs.
        """
        (template,) = self._template
        template.train(self.training)
        weights: dict[str, Tensor] = {own: self.get_parameter(name) for name, own in self._names.items()}

        def one(own_weights: dict[str, Tensor], inputs_B: Tensor) -> Tensor:
            outputs_BK: Tensor = functional_call(template, own_weights, (inputs_B,))
            return outputs_BK

        in_dims = (0, None if shared else 1)
        return torch.vmap(one, in_dims, out_dims=1)(weights, x_B)


class Plurality(nn.Module):
    """The plurality vote of stacked networks."""

    def __init__(self, networks: Stacked) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x_B: Tensor) -> Tensor:
        """Votes for each class (B, K), float32, of shared inputs; a network with equal logits votes for the smaller
        class."""
        outputs_BMK = self.networks(x_B, shared=True)
        return nn.functional.one_hot(outputs_BMK.argmax(2), outputs_BMK.shape[2]).sum(1).float()
