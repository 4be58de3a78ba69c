"""Many networks of one architecture as one: their weights stacked, one batched product where each had its own.

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
    """Networks side by side. None sees another's inputs, so each is trained as if it were alone.

    Args:
        template: one of the networks; without BatchNorm, whose statistics no batched product keeps apart, and without
            dropout, whose draws would be shared.
        weights: of all networks, each parameter with a first axis M.

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
        """The networks, which are alike in architecture, with the weights they have."""
        weights, _buffers = stack_module_state(list(networks))
        return cls(networks[0], weights)

    @classmethod
    def empty(cls, template: nn.Module, n_networks: int) -> Self:
        """So many networks like `template`, with weights that are still to be loaded."""
        weights = {name: weight.new_empty(n_networks, *weight.shape) for name, weight in template.named_parameters()}
        return cls(template, weights)

    def forward(self, x_B: Tensor, shared: bool = False) -> Tensor:
        """Outputs (B, M, K).

        Args:
            x_B: (B, M, ...), each network's own inputs; (B, ...) where all see the same.
            shared: which of the two.
        """
        (template,) = self._template
        template.train(self.training)
        weights: dict[str, Tensor] = {own: self.get_parameter(name) for name, own in self._names.items()}

        def one(of_one: dict[str, Tensor], inputs_B: Tensor) -> Tensor:
            outputs_BK: Tensor = functional_call(template, of_one, (inputs_B,))
            return outputs_BK

        in_dims = (0, None if shared else 1)
        return torch.vmap(one, in_dims, out_dims=1)(weights, x_B)


class Plurality(nn.Module):
    """The vote of stacked networks."""

    def __init__(self, networks: Stacked) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x_B: Tensor) -> Tensor:
        """Votes for each class (B, K), float32, of inputs that all networks see. A network that is torn between two
        classes votes for the smaller."""
        outputs_BMK = self.networks(x_B, shared=True)
        return nn.functional.one_hot(outputs_BMK.argmax(2), outputs_BMK.shape[2]).sum(1).float()
