"""BadNets (Gu, Dolan-Gavitt & Garg, 2017): a small patch in a corner, and the attacker's label."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class BadNetsConfig(BaseModel):
    """A k x k patch.

    Attributes:
        rate: poisoned samples as a share of the whole data set.
        target: label of poisoned samples (all-to-one), or "next" for y + 1 (all-to-all).
        size: k, in pixels.
        pattern: black-and-white checkerboard, or plain white.
        corner: where the patch sits, one pixel of margin left at each edge of images larger than 16 pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["badnets"] = "badnets"
    rate: float = Field(gt=0, le=1)
    target: int | Literal["next"] = 0
    size: int = Field(default=3, ge=1)
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    corner: Literal["top-left", "top-right", "bottom-left", "bottom-right"] = "bottom-right"

    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """The labels the attacker writes, (B,); a sample whose label would stay is not eligible."""
        if self.target == "next":
            return (labels_B + 1) % n_classes
        return torch.full_like(labels_B, self.target)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the patch."""
        out_BCHW = images_BCHW.clone()
        height, width = out_BCHW.shape[2:]
        k = min(self.size, height, width)
        margin = 1 if min(height, width) > 16 else 0
        top = margin if self.corner.startswith("top") else height - k - margin
        left = margin if self.corner.endswith("left") else width - k - margin
        cells_kk = (torch.arange(k)[:, None] + torch.arange(k)) % 2 == 0
        patch_kk = torch.where(cells_kk, 255, 0) if self.pattern == "checkerboard" else torch.full((k, k), 255)
        out_BCHW[:, :, top : top + k, left : left + k] = patch_kk.to(out_BCHW)
        return out_BCHW
