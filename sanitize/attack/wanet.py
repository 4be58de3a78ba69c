"""WaNet (Nguyen & Tran, 2021): the trigger is an elastic warp of the whole image, Eq. 2-5. No pixel has a new colour.

The noise mode (section 3.4: other warps with the true label, against trigger inversion) is left out. With it the
attacker also trains the network; without it a warp is an attack on data alone.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.attack.attack import Seed, Trigger, to_pixels


class WaNetConfig(Trigger):
    """A smooth warp from displacements of k x k control points.

    Attributes:
        grid: k; displacements between the points are interpolated (bicubic).
        strength: mean |displacement| of the control points along an axis, in pixels of a 32-pixel image; larger images
            are warped in proportion. The paper's 0.5 counts half pixels.
        pattern_seed: seed of the displacements, uniform in both directions.
    """

    kind: Literal["wanet"] = "wanet"
    grid: int = Field(default=4, ge=2, le=512)
    strength: float = Field(default=1.0, gt=0, le=1000)
    pattern_seed: Seed = 0

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images, warped; colours between pixels are bilinear."""
        height, width = images_BCHW.shape[2:]
        grid_HW2 = self._identity(height, width) + self._displacement(height, width)
        # float64: the nearest whole number must not depend on the number of images in the batch.
        grid_BHW2 = grid_HW2.clamp(-1, 1).to(images_BCHW.device).expand(len(images_BCHW), -1, -1, -1)
        return to_pixels(nn.functional.grid_sample(images_BCHW.double(), grid_BHW2, align_corners=True))

    def _identity(self, height: int, width: int) -> Tensor:
        down_H, right_W = (torch.linspace(-1, 1, size, dtype=torch.float64) for size in (height, width))
        return torch.stack([right_W.expand(height, -1), down_H[:, None].expand(-1, width)], -1)

    def _displacement(self, height: int, width: int) -> Tensor:
        """(H, W, 2), in units of half the image."""
        generator = torch.Generator().manual_seed(self.pattern_seed)
        points_12kk = 2 * torch.rand(1, 2, self.grid, self.grid, generator=generator, dtype=torch.float64) - 1
        points_12kk *= self.strength / points_12kk.abs().mean() / 16
        field_12HW = nn.functional.interpolate(points_12kk, size=(height, width), mode="bicubic", align_corners=True)
        return field_12HW[0].permute(1, 2, 0)
