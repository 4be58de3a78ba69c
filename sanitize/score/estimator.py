"""What RCA and RobustRealNVP share: a stack of small networks, trained in equal mini-batches of scaled rows.

Shapes: N rows, B of a batch; D columns; ... leading dimensions of the stack.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor

from sanitize.errors import ConfigError, NumericsError
from sanitize.score.scaling import Scaling

Layers = list[tuple[Tensor, Tensor]]  # weight (..., in, out) and bias (..., 1, out) of each
Affine = Callable[[Tensor, Tensor, Tensor], Tensor]  # bias, rows, weight -> rows @ weight + bias


@dataclass(frozen=True)
class Fitted:
    """Result of a fit: the scaling of the rows, the trained layers, and tensors drawn once, by name."""

    scaling: Scaling
    layers: Layers
    drawn: dict[str, Tensor]


class Estimator(ABC):
    """`fit(x_ND).score(x_ND)`; a higher score is more suspicious."""

    def __init__(self) -> None:
        self._fitted: Fitted | None = None

    @abstractmethod
    def fit(self, x_ND: Tensor | np.ndarray, seed: int = 0) -> Self:
        """Train on rows (N, D) of real numbers; NaN is a missing value."""

    @abstractmethod
    def score(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Scores (N,), float32, finite."""

    @property
    @abstractmethod
    def drawn_names(self) -> list[str]:
        """Names of the tensors in `Fitted.drawn`."""

    @property
    def missing_fraction(self) -> float:
        """Share of missing values in the training rows; column means replaced them."""
        return self._state().scaling.missing_fraction

    def _state(self) -> Fitted:
        if self._fitted is None:
            raise ConfigError("the model is not fitted yet: call fit() or load_state() first")
        return self._fitted

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that scoring needs, lossless."""
        state = self._state()
        tensors = state.scaling.state_dict() | state.drawn
        for i, (weight, bias) in enumerate(state.layers):
            tensors |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        n_layers = sum(name.endswith(".weight") for name in state)
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in range(n_layers)]
        self._fitted = Fitted(Scaling.from_state(state), layers, {name: state[name] for name in self.drawn_names})
        return self


def uniform_layers(stack: tuple[int, ...], sizes: Iterable[tuple[int, int]], generator: Generator) -> Layers:
    """Layers of these (inputs, outputs), uniform in +-1 / sqrt(inputs) like torch.nn.Linear.

    Args:
        stack: leading dimensions of all weights and biases.
        sizes: inputs and outputs of each layer.
        generator: source of the weights.
    """

    def uniform(bound: float, *shape: int) -> Tensor:
        return torch.empty(*stack, *shape).uniform_(-bound, bound, generator=generator)

    return [(uniform(n**-0.5, n, m), uniform(n**-0.5, 1, m)) for n, m in sizes]


def n_batches(n_rows: int, batch_size: int) -> int:
    """Mini-batches of one epoch."""
    return max(1, round(n_rows / batch_size))


def epoch(x_ND: Tensor, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """Equal mini-batches (B, D), B about `batch_size`; the few rows left over change from epoch to epoch."""
    n = n_batches(len(x_ND), batch_size)
    size = len(x_ND) // n
    order_N = torch.randperm(len(x_ND), generator=generator)
    for start in range(0, n * size, size):
        yield x_ND[order_N[start : start + size]]


def refuse_diverged(layers: Layers, name: str) -> None:
    """Raises NumericsError where a weight or bias is not finite."""
    if not all(tensor.isfinite().all() for layer in layers for tensor in layer):
        raise NumericsError(f"{name}: training diverged; lower learning_rate")
