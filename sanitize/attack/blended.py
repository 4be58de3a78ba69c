"""Blended injection (Chen et al., 2017): a fixed noise image mixed into the whole picture, and the attacker's label."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Seed, Trigger, to_pixels
from sanitize.attack.size import Size, grid, spread


class NoiseTrigger(Trigger):
    """A fixed pattern of noise.

    Attributes:
        noise: uniform on [0, 255], or Gaussian with mean 127.5 and standard deviation 64, clipped.
        pattern_seed: seed of the pattern.
        grain: side of a cell of one colour, in pixels, or as a share of the shorter side.
    """

    added: ClassVar[tuple[str, ...]] = (*Trigger.added, "grain")

    noise: Literal["uniform", "gaussian"] = "uniform"
    pattern_seed: Seed = 0
    grain: Size = 1

    def pattern(self, shape: torch.Size) -> Tensor:
        """Levels on [0, 255], (C, H, W) float32."""
        channels, height, width = shape
        generator = torch.Generator().manual_seed(self.pattern_seed)
        cells = (channels, *grid(self.grain, height, width))
        if self.noise == "uniform":
            cells_Crc = torch.rand(cells, generator=generator) * 255
        else:
            cells_Crc = (torch.randn(cells, generator=generator) * 64 + 127.5).clamp(0, 255)
        return spread(cells_Crc, self.grain, height, width).float()


class BlendedConfig(NoiseTrigger):
    """A fixed pattern blended into every pixel.

    Attributes:
        alpha: weight of the pattern, in (0, 1].
    """

    kind: Literal["blended"] = "blended"
    alpha: float = Field(default=0.2, gt=0, le=1)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the pattern blended in."""
        return blend(images_BCHW, self.pattern(images_BCHW.shape[1:]), self.alpha)


def blend(images_BCHW: Tensor, pattern_CHW: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) image + alpha pattern: copies of uint8 images."""
    return to_pixels((1 - alpha) * images_BCHW.float() + alpha * pattern_CHW.to(images_BCHW.device))
