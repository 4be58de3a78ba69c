"""BadNets (Gu, Dolan-Gavitt & Garg, 2017): a small patch in a corner, and the attacker's label."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Trigger

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]


class BadNetsConfig(Trigger):
    """A k x k patch.

    Attributes:
        size: k, in pixels.
        pattern: black-and-white checkerboard, or plain white.
        corner: corner of the patch; images larger than 16 pixels keep a margin of one pixel.
    """

    kind: Literal["badnets"] = "badnets"
    size: int = Field(default=3, ge=1)
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    corner: Corner = "bottom-right"

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the patch."""
        patch_kk = checkerboard(self.size) if self.pattern == "checkerboard" else torch.full([self.size] * 2, 255)
        return paste(images_BCHW, patch_kk, self.corner)


def checkerboard(size: int) -> Tensor:
    """255 where row and column are both even or both odd, else 0, (size, size)."""
    return torch.where((torch.arange(size)[:, None] + torch.arange(size)) % 2 == 0, 255, 0)


def paste(images_BCHW: Tensor, patch_hw: Tensor, corner: Corner) -> Tensor:
    """Copies of images with a patch, (h, w) or (C, h, w), in a corner, cut to the image.

    Images larger than 16 pixels keep a margin of one pixel.
    """
    out_BCHW = images_BCHW.clone()
    height, width = out_BCHW.shape[2:]
    k = min(patch_hw.shape[-1], height, width)
    margin = 1 if min(height, width) > 16 else 0
    top = margin if corner.startswith("top") else height - k - margin
    left = margin if corner.endswith("left") else width - k - margin
    out_BCHW[:, :, top : top + k, left : left + k] = patch_hw[..., :k, :k].to(out_BCHW)
    return out_BCHW
