"""A linear layer on a frozen encoder, and a bound on its spectral norm: B. Liu (2022), Algorithm 7 and Proposition 2.

The effect of a trigger t with ||t|| <= tau on the loss grows with L_h sigma_max, the Lipschitz constant of the encoder
times the largest singular value of the last layer. Pre-training without labels keeps the first small; this module
bounds the second. Shapes: B batch, K classes, D features.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sanitize.models.checkpoint import Checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.taps import find_taps
from sanitize.models.weights import load_into


class Truncated(nn.Module):
    """Parametrisation: a matrix scaled down so that no singular value is above `norm`.

    The norm is computed exactly: K x D is small, and a power iteration would approach it from below.
    """

    def __init__(self, norm: float) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, weight_KD: Tensor) -> Tensor:
        """(K, D)."""
        return weight_KD * (self.norm / torch.linalg.matrix_norm(weight_KD, 2).clamp(min=self.norm))


class Probe(nn.Module):
    """A network whose last Linear is trained alone, or bounded.

    Args:
        network: the network.
        config: description of the network.
        encoder: source of all weights before the last Linear, which are frozen and stay in eval mode; None trains all.
        lipschitz: bound on the spectral norm of the last Linear; None sets no bound.
    """

    def __init__(
        self, network: nn.Module, config: ModelConfig, encoder: Checkpoint | None, lipschitz: float | None
    ) -> None:
        super().__init__()
        self.network = network
        self._is_frozen, self._is_bounded = encoder is not None, lipschitz is not None
        self._head = find_taps(network, config.example()).penultimate
        head = network.get_submodule(self._head)
        if encoder is not None:
            state = encoder.model().state_dict()
            own = {f"{self._head}.{name}": tensor for name, tensor in head.state_dict().items()}
            load_into(network, state | own, encoder.path)
            network.requires_grad_(False)
            head.requires_grad_(True)
        if lipschitz is not None:
            parametrize.register_parametrization(head, "weight", Truncated(lipschitz))

    def forward(self, x_B: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.network(x_B)

    def train(self, mode: bool = True) -> Self:
        """As for any module; a frozen encoder stays in eval mode, so that its statistics do not change."""
        super().train(mode)
        if self._is_frozen:
            self.network.eval()
        return self

    def finished(self) -> nn.Module:
        """The network without the parametrisation, with the bounded weights."""
        if self._is_bounded:
            parametrize.remove_parametrizations(self.network.get_submodule(self._head), "weight")
        return self.network
