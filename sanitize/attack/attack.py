"""What an attack is. B batch, C H W image.

An attack is one file: a frozen config with `kind`, the declarations of `Attack`, and its maths. `OneAttack`
(`several.py`) is the union of all attacks.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError

Poison = Callable[[Tensor, Tensor], Tensor]  # uint8 images (B, C, H, W), their true labels (B,) -> uint8 images


class Attack(BaseModel):
    """One attack on a data set.

    Attributes:
        keeps_label: True for clean-label attacks: samples that have the attacker's label already are poisoned.
        has_trigger: True where the attack success rate can be measured with `apply`.
        needs_surrogate: True where `build` needs a network trained on such images.
        rate: poisoned samples as a share of the whole data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    keeps_label: ClassVar[bool] = False
    has_trigger: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = False

    kind: str
    rate: float = Field(gt=0, le=1)

    @property
    def attacks(self) -> "tuple[Attack, ...]":
        """Attacks it consists of, each on samples of its own, such as payload and cover samples; by default itself."""
        return (self,)

    def check_classes(self, n_classes: int) -> None:
        """Raise ConfigError where the attack names a label that is no class."""

    @abstractmethod
    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """Labels the attacker wants, (B,)."""

    def eligible(self, labels_B: Tensor, wanted_B: Tensor) -> Tensor:
        """True for samples that can be poisoned, (B,): given labels and `relabel` of them."""
        return (wanted_B == labels_B) == self.keeps_label

    @abstractmethod
    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the trigger as at test time; the same for an image in any batch."""

    def build(self, surrogate: nn.Module | None, compute: Compute) -> Poison:
        """Change of training images; by default the trigger.

        Args:
            surrogate: logits of float images on [0, 1]; None unless `needs_surrogate`.
            compute: device, precision, seed.
        """
        return lambda images_BCHW, _labels_B: self.apply(images_BCHW)


class Trigger(Attack):
    """A fixed change of an image, known before the attack and the same at test time.

    Attributes:
        target: label of poisoned samples (all-to-one), or "next" for y + 1 (all-to-all).
    """

    target: int | Literal["next"] = 0

    def check_classes(self, n_classes: int) -> None:
        """Raise ConfigError where the target is no class."""
        if isinstance(self.target, int) and not 0 <= self.target < n_classes:
            raise ConfigError(f"target {self.target} is no class: there are {n_classes}, from 0 to {n_classes - 1}")

    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """The target, or the next class, (B,)."""
        if self.target == "next":
            return (labels_B + 1) % n_classes
        return torch.full_like(labels_B, self.target)


def to_pixels(x_BCHW: Tensor) -> Tensor:
    """Floats on the scale 0 to 255 as uint8: to the nearest, and clipped."""
    return x_BCHW.round().clamp(0, 255).to(torch.uint8)
