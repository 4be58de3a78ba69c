"""Random changes of normalised images, on the device they are on. Shapes: B batch, C H W image."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class AugmentConfig(BaseModel):
    """What is changed at random; all of it is off by default.

    Attributes:
        brightness, contrast: an image is shifted and scaled by at most this share of its range.
        flip: mirror half of the images left to right.
        shift: move an image by up to so many pixels, up or down and left or right; what comes in is black.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)
    flip: bool = False
    shift: int = Field(default=0, ge=0)

    def __call__(self, x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Augment normalised float images with draws from a CPU generator."""
        draws_3B = torch.rand(3, len(x_BCHW), generator=generator).to(x_BCHW.device)[..., None, None, None]
        gain_B111 = 1 + self.contrast * (2 * draws_3B[0] - 1)
        shift_B111 = self.brightness * (2 * draws_3B[1] - 1)
        x_BCHW = x_BCHW * gain_B111 + shift_B111
        if self.flip:
            x_BCHW = torch.where(draws_3B[2] < 0.5, x_BCHW.flip(3), x_BCHW)
        return self._shifted(x_BCHW, generator) if self.shift else x_BCHW

    def _shifted(self, x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        n, channels, height, width = x_BCHW.shape
        black_BC11 = x_BCHW.amin((2, 3), keepdim=True)
        padded_BCHW = nn.functional.pad(x_BCHW - black_BC11, [self.shift] * 4)
        by_2B = torch.randint(0, 2 * self.shift + 1, (2, n), generator=generator).to(x_BCHW.device)
        row_BH, column_BW = (
            by_B[:, None] + torch.arange(size, device=x_BCHW.device)
            for by_B, size in zip(by_2B, (height, width), strict=True)
        )
        row_BCHW = row_BH[:, None, :, None].expand(-1, channels, -1, padded_BCHW.shape[3])
        column_BCHW = column_BW[:, None, None, :].expand(-1, channels, height, -1)
        return padded_BCHW.gather(2, row_BCHW).gather(3, column_BCHW) + black_BC11
