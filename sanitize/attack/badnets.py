"""BadNets (Gu, Dolan-Gavitt & Garg, 2017): a small patch in a corner, and the attacker's label."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sanitize.attack.attack import Trigger
from sanitize.attack.size import Size, draw

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]
_MARGIN = 1 / 32  # of the shorter side, for a patch whose side is a share of it


class PatchTrigger(Trigger):
    """A patch in a corner.

    Attributes:
        size: side of the patch, in pixels (checks of one pixel), or as a share of the shorter side (3 x 3 checks).
        pattern: black-and-white checkerboard, or plain white.
        corner: corner of the patch; see `stamp` for its margin.
    """

    size: Size = 3
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    corner: Corner = "bottom-right"

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the patch."""
        return stamp(images_BCHW, checkerboard if self.pattern == "checkerboard" else _white, self.size, self.corner)


class BadNetsConfig(PatchTrigger):
    """A patch, and the attacker's label."""

    kind: Literal["badnets"] = "badnets"


def stamp(images_BCHW: Tensor, pattern: Callable[[int], Tensor], size: Size, corner: Corner) -> Tensor:
    """Copies of uint8 images with a patch in a corner.

    Args:
        images_BCHW: uint8.
        pattern: square patch, levels from 0 to 255, for a number of cells along a side.
        size: side in pixels, one cell each, cut to the image (see `paste`); or as a share of the shorter side, with 3
            cells along a side and a margin of 1/32 of the shorter side.
        corner: corner of the patch.
    """
    if isinstance(size, int):
        return paste(images_BCHW, pattern(min(size, *images_BCHW.shape[2:])), corner)
    return paste_share(images_BCHW, pattern(3), size, corner)


def paste_share(images_BCHW: Tensor, patch_kk: Tensor, share: float, corner: Corner) -> Tensor:
    """Copies of images with a patch, (k, k) or (C, k, k), whose side is a share of the shorter side, in a corner."""
    height, width = images_BCHW.shape[2:]
    shorter = min(height, width)
    side, margin = share * shorter, min(_MARGIN, 1 - share) * shorter
    top = margin if corner.startswith("top") else height - side - margin
    left = margin if corner.endswith("left") else width - side - margin
    return draw(images_BCHW, patch_kk, top, left, side)


def _white(size: int) -> Tensor:
    return torch.full((size, size), 255)


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
