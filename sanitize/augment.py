"""Random changes of normalised images, on the device they are on. Shapes: B batch, C H W image."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class AugmentConfig(BaseModel):
    """Random changes of images; all are off by default.

    Attributes:
        brightness, contrast: largest shift and scale of an image, as a share of its range.
        flip: True mirrors half of the images left to right.
        shift: largest shift in pixels, vertical and horizontal; the border is filled with black.
        saturation: largest change of the distance of the colours from grey, as a share.
        grey: share of the images that are turned grey.
        crop: smallest share of the area of a random crop, which is enlarged to the size of the image, with an aspect
            ratio of 3:4 to 4:3 (Szegedy et al., 2015); 1 is off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)
    flip: bool = False
    shift: int = Field(default=0, ge=0)
    saturation: float = Field(default=0.0, ge=0, le=1)
    grey: float = Field(default=0.0, ge=0, le=1)
    crop: float = Field(default=1.0, gt=0, le=1)

    def __call__(self, x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Augment normalised float images with draws from a CPU generator."""
        draws_3B = torch.rand(3, len(x_BCHW), generator=generator).to(x_BCHW.device)[..., None, None, None]
        gain_B111 = 1 + self.contrast * (2 * draws_3B[0] - 1)
        shift_B111 = self.brightness * (2 * draws_3B[1] - 1)
        x_BCHW = x_BCHW * gain_B111 + shift_B111
        if self.flip:
            x_BCHW = torch.where(draws_3B[2] < 0.5, x_BCHW.flip(3), x_BCHW)
        if self.shift:
            x_BCHW = self._shifted(x_BCHW, generator)
        if self.saturation or self.grey:
            x_BCHW = self._faded(x_BCHW, generator)
        return self._cropped(x_BCHW, generator) if self.crop < 1 else x_BCHW

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

    def _faded(self, x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        draws_2B = torch.rand(2, len(x_BCHW), generator=generator).to(x_BCHW.device)[..., None, None, None]
        colour_B111 = (1 + self.saturation * (2 * draws_2B[0] - 1)) * (draws_2B[1] >= self.grey)
        grey_B1HW = x_BCHW.mean(1, keepdim=True)
        return grey_B1HW + colour_B111 * (x_BCHW - grey_B1HW)

    def _cropped(self, x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        draws_B4 = torch.rand(len(x_BCHW), 4, generator=generator)
        area_B = self.crop + (1 - self.crop) * draws_B4[:, 0]
        aspect_B = (4 / 3) ** (2 * draws_B4[:, 1] - 1)
        sides_B2 = torch.stack([(area_B * aspect_B).sqrt(), (area_B / aspect_B).sqrt()], 1).clamp(max=1)
        centre_B2 = (1 - sides_B2) * (2 * draws_B4[:, 2:] - 1)  # in coordinates from -1 to 1
        maps_B23 = torch.cat([torch.diag_embed(sides_B2), centre_B2[..., None]], 2).to(x_BCHW.device)
        grid_BHW2 = nn.functional.affine_grid(maps_B23, list(x_BCHW.shape), align_corners=False)
        return nn.functional.grid_sample(x_BCHW, grid_BHW2, padding_mode="border", align_corners=False)
