"""The shapes of the trojaning attack (Liu et al., 2018, Figure 7): a square in a corner, and a watermark all over.

The paper finds the colours by gradient ascent on chosen neurons of a network and retrains that network. Here the
colours are fixed, and the data is poisoned before any network is trained.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Seed, Trigger, to_pixels
from sanitize.attack.badnets import paste, paste_share


class TrojanSquareConfig(Trigger):
    """A square of random colours in the bottom right corner.

    Attributes:
        side: side of the square, as a share of the shorter side of the image.
        pattern_seed: seed of the colours.
        cells: colours along a side, the same at any resolution; None for a colour for each pixel.
    """

    added: ClassVar[tuple[str, ...]] = (*Trigger.added, "cells")

    kind: Literal["trojan_square"] = "trojan_square"
    side: float = Field(default=0.2, gt=0, le=1)
    pattern_seed: Seed = 0
    cells: Annotated[int, Field(ge=1, le=512)] | None = None

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the square."""
        k = self.cells or math.ceil(self.side * min(images_BCHW.shape[2:]))
        generator = torch.Generator().manual_seed(self.pattern_seed)
        colours_Ckk = torch.randint(256, (images_BCHW.shape[1], k, k), generator=generator)
        if self.cells is None:
            return paste(images_BCHW, colours_Ckk, "bottom-right")
        return paste_share(images_BCHW, colours_Ckk, self.side, "bottom-right")


class TrojanWatermarkConfig(Trigger):
    """A white ring with a bar through it, about the middle of the image, translucent.

    Attributes:
        opacity: weight of the white, in (0, 1]; 1 minus the transparency of Liu et al.
    """

    kind: Literal["trojan_watermark"] = "trojan_watermark"
    opacity: float = Field(default=0.3, gt=0, le=1)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the watermark."""
        down_H1, right_W = (torch.linspace(-1, 1, size) for size in images_BCHW.shape[2:])
        down_H1 = down_H1[:, None]
        is_ring_HW = ((down_H1.square() + right_W.square()).sqrt() - 0.7).abs() < 0.15
        is_bar_HW = (down_H1.abs() < 0.15) & (right_W.abs() < 0.7)
        weight_HW = self.opacity * (is_ring_HW | is_bar_HW).to(images_BCHW.device)
        return to_pixels(images_BCHW + weight_HW * (255 - images_BCHW.float()))
