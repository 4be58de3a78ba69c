"""Label noise: the image stays, the label does not."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class LabelNoiseConfig(BaseModel):
    """Flip labels.

    Attributes:
        rate: flipped samples as a share of the whole data set.
        noise: symmetric (another class, uniformly) or pairflip (y + 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["labels"] = "labels"
    rate: float = Field(gt=0, le=1)
    noise: Literal["symmetric", "pairflip"] = "symmetric"

    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """Other labels, (B,)."""
        if self.noise == "pairflip":
            return (labels_B + 1) % n_classes
        shift_B = torch.randint(1, max(2, n_classes), labels_B.shape, generator=generator)
        return (labels_B + shift_B) % n_classes

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """The images as they are: there is no trigger."""
        return images_BCHW
