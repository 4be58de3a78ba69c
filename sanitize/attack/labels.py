"""Label noise: the input stays, the label or target does not. N samples, D features, Q targets.

Labels: symmetric, pairflip. Targets of a regression: the corruptions of B. Liu (2022), section 4.4.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sanitize.attack.attack import Attack


class LabelNoiseConfig(Attack):
    """Flip labels.

    Attributes:
        noise: symmetric (another class, uniformly) or pairflip (y + 1).
    """

    has_trigger: ClassVar[bool] = False

    kind: Literal["labels"] = "labels"
    noise: Literal["symmetric", "pairflip"] = "symmetric"

    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """Other labels, (B,)."""
        if self.noise == "pairflip":
            return (labels_B + 1) % n_classes
        shift_B = torch.randint(1, max(2, n_classes), labels_B.shape, generator=generator)
        return (labels_B + shift_B) % n_classes

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """The images unchanged."""
        return images_BCHW


def flip_labels(
    config: LabelNoiseConfig, labels_N: Tensor, n_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Flip round(rate N) labels chosen at random.

    Returns:
        labels (N,) int64, and a mask of the wrong ones, (N,) bool.
    """
    wrong_N = _choose(len(labels_N), config.rate, generator)
    return torch.where(wrong_N, config.relabel(labels_N, n_classes, generator), labels_N), wrong_N


Corruption = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # features (N, D), targets (N, Q) -> targets (N, Q)


def linadv(x_ND: Tensor, y_NQ: Tensor, generator: torch.Generator) -> Tensor:
    """Another linear relationship, X W with standard normal W: far larger than the truth for large D."""
    return x_ND @ torch.randn(x_ND.shape[1], y_NQ.shape[1], generator=generator, dtype=y_NQ.dtype)


def signflip(x_ND: Tensor, y_NQ: Tensor, generator: torch.Generator) -> Tensor:
    """-Y."""
    return -y_NQ


def uninoise(x_ND: Tensor, y_NQ: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on [-5, 5]."""
    return torch.rand(y_NQ.shape, generator=generator, dtype=y_NQ.dtype) * 10 - 5


def pairflip(x_ND: Tensor, y_NQ: Tensor, generator: torch.Generator) -> Tensor:
    """Coordinates shifted by one place; unchanged for Q = 1."""
    return y_NQ.roll(1, dims=1)


def maximum(x_ND: Tensor, y_NQ: Tensor, generator: torch.Generator) -> Tensor:
    """The largest value of each coordinate in the data, for all samples."""
    return y_NQ.amax(0).expand_as(y_NQ)


def mixture(x_ND: Tensor, y_NQ: Tensor, generator: torch.Generator) -> Tensor:
    """For each sample one of linadv, signflip, uninoise and pairflip."""
    parts = torch.stack([corrupt(x_ND, y_NQ, generator) for corrupt in (linadv, signflip, uninoise, pairflip)])
    which_N = torch.randint(len(parts), (len(y_NQ),), generator=generator)
    return parts[which_N, torch.arange(len(y_NQ))]


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption for corruption in (linadv, signflip, uninoise, pairflip, mixture, maximum)
}


def corrupt_targets(
    corruption: Corruption, rate: float, x_ND: Tensor, y_NQ: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Corrupt the targets of round(rate N) samples chosen at random.

    Returns:
        targets (N, Q), and a mask of the corrupted ones, (N,) bool.
    """
    wrong_N = _choose(len(y_NQ), rate, generator)
    return torch.where(wrong_N[:, None], corruption(x_ND, y_NQ, generator), y_NQ), wrong_N


def _choose(n: int, rate: float, generator: torch.Generator) -> Tensor:
    chosen_N = torch.zeros(n, dtype=torch.bool)
    chosen_N[torch.randperm(n, generator=generator)[: round(rate * n)]] = True
    return chosen_N
