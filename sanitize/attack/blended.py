"""Blended injection (Chen et al., 2017): a fixed noise image mixed into the whole picture, and the attacker's label."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class BlendedConfig(BaseModel):
    """A fixed pattern blended into every pixel.

    Attributes:
        rate: poisoned samples as a share of the whole data set.
        target: label of poisoned samples (all-to-one), or "next" for y + 1 (all-to-all).
        alpha: weight of the pattern, in (0, 1].
        noise: uniform on [0, 255], or Gaussian with mean 127.5 and standard deviation 64, clipped.
        pattern_seed: the pattern is drawn once from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["blended"] = "blended"
    rate: float = Field(gt=0, le=1)
    target: int | Literal["next"] = 0
    alpha: float = Field(default=0.2, gt=0, le=1)
    noise: Literal["uniform", "gaussian"] = "uniform"
    pattern_seed: int = Field(default=0, ge=0)

    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """The labels the attacker writes, (B,); a sample whose label would stay is not eligible."""
        if self.target == "next":
            return (labels_B + 1) % n_classes
        return torch.full_like(labels_B, self.target)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the pattern blended in."""
        shape = images_BCHW.shape[1:]
        generator = torch.Generator().manual_seed(self.pattern_seed)
        if self.noise == "uniform":
            pattern_CHW = torch.rand(shape, generator=generator) * 255
        else:
            pattern_CHW = (torch.randn(shape, generator=generator) * 64 + 127.5).clamp(0, 255)
        mixed_BCHW = (1 - self.alpha) * images_BCHW.float() + self.alpha * pattern_CHW.to(images_BCHW.device)
        return mixed_BCHW.round().clamp(0, 255).to(torch.uint8)
