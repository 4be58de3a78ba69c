"""Blended injection (Chen et al., 2017): a fixed noise image mixed into the whole picture, and the attacker's label."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Trigger, to_pixels


class BlendedConfig(Trigger):
    """A fixed pattern blended into every pixel.

    Attributes:
        alpha: weight of the pattern, in (0, 1].
        noise: uniform on [0, 255], or Gaussian with mean 127.5 and standard deviation 64, clipped.
        pattern_seed: seed of the pattern.
    """

    kind: Literal["blended"] = "blended"
    alpha: float = Field(default=0.2, gt=0, le=1)
    noise: Literal["uniform", "gaussian"] = "uniform"
    pattern_seed: int = Field(default=0, ge=0)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the pattern blended in."""
        shape = images_BCHW.shape[1:]
        generator = torch.Generator().manual_seed(self.pattern_seed)
        if self.noise == "uniform":
            pattern_CHW = torch.rand(shape, generator=generator) * 255
        else:
            pattern_CHW = (torch.randn(shape, generator=generator) * 64 + 127.5).clamp(0, 255)
        return to_pixels((1 - self.alpha) * images_BCHW.float() + self.alpha * pattern_CHW.to(images_BCHW.device))
