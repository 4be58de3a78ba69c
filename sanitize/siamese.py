"""Differentiable Siamese augmentation (Zhao & Bilen, 2021): one random change, shared by real and condensed images.

Real and condensed images are compared after the same change, and gradients flow back through it, so that condensed
images are optimised for all changes. Shapes: K classes, B images of a class, C H W image.
"""

import math
from typing import NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

_BRIGHTNESS, _SATURATION, _CONTRAST = 1.0, 2.0, 0.5  # as in the paper
_OFF = {"colour": False, "crop": 0, "cutout": 0, "flip": False, "scale": 1, "rotate": 0}


class Change(NamedTuple):
    """One change for each class.

    Attributes:
        brightness_K, saturation_K, contrast_K: an offset and two factors; 0, 1 and 1 change nothing.
        maps_K23: affine maps from target to source coordinates, from -1 to 1.
        mask_KHW: 0 in the cut-out square, 1 elsewhere.
    """

    brightness_K: Tensor
    saturation_K: Tensor
    contrast_K: Tensor
    maps_K23: Tensor
    mask_KHW: Tensor

    def of(self, classes: slice) -> Self:
        """The changes of a slice of the classes."""
        return type(self)(*(tensor[classes] for tensor in self))

    def to(self, device: torch.device) -> Self:
        """The changes on another device."""
        return type(self)(*(tensor.to(device) for tensor in self))

    def __call__(self, x_KBCHW: Tensor) -> Tensor:
        """Change normalised float images, all images of a class alike."""
        shape = x_KBCHW.shape
        brightness, saturation, contrast = (
            value_K.view(-1, 1, 1, 1, 1) for value_K in (self.brightness_K, self.saturation_K, self.contrast_K)
        )
        x_KBCHW = x_KBCHW + brightness
        grey_KB1HW = x_KBCHW.mean(2, keepdim=True)
        x_KBCHW = grey_KB1HW + saturation * (x_KBCHW - grey_KB1HW)
        level_KB111 = x_KBCHW.mean((2, 3, 4), keepdim=True)
        x_KBCHW = level_KB111 + contrast * (x_KBCHW - level_KB111)
        # All images of a class are channels of one image, so that the grid is computed once.
        grid_KHW2 = nn.functional.affine_grid(self.maps_K23, [shape[0], 1, *shape[3:]], align_corners=False)
        x_KXHW = nn.functional.grid_sample(x_KBCHW.flatten(1, 2), grid_KHW2, align_corners=False)
        return (x_KXHW * self.mask_KHW[:, None]).view(shape)


class SiameseConfig(BaseModel):
    """Kinds of changes; each class gets one of the enabled kinds at a time. Pixels from outside the image are 0, grey.

    Attributes:
        colour: True changes brightness, saturation and contrast.
        crop: largest shift, as a share of the sides; 0 is off.
        cutout: side of a blanked square, as a share of the sides; 0 is off.
        flip: True mirrors half of the images; set False for digits and letters.
        scale: largest factor by which a side is stretched or shrunk; 1 is off.
        rotate: largest rotation in degrees; 0 is off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    colour: bool = True
    crop: float = Field(default=0.125, ge=0, lt=1)
    cutout: float = Field(default=0.5, ge=0, lt=1)
    flip: bool = True
    scale: float = Field(default=1.2, ge=1)
    rotate: float = Field(default=15.0, ge=0, le=180)

    def draw(self, n_classes: int, size: tuple[int, int], generator: torch.Generator) -> Change:
        """Draw a change for each class, for images of `size` (H, W), with a CPU generator."""
        kind_K, a_K, b_K, c_K = torch.rand(4, n_classes, generator=generator)
        enabled = [kind for kind, off in _OFF.items() if getattr(self, kind) != off]
        number_K = (kind_K * len(enabled)).long()

        def is_drawn(kind: str, changed_K: Tensor, unchanged: float) -> Tensor:
            """`changed_K` for the classes with this kind, `unchanged` for the others."""
            if kind not in enabled:
                return torch.full_like(changed_K, unchanged)
            return torch.where(number_K == enabled.index(kind), changed_K, unchanged)

        brightness_K = is_drawn("colour", _BRIGHTNESS * (a_K - 0.5), 0)
        saturation_K = is_drawn("colour", _SATURATION * b_K, 1)
        contrast_K = is_drawn("colour", _CONTRAST + c_K, 1)
        mirror_K = is_drawn("flip", torch.where(a_K < 0.5, -1.0, 1.0), 1)
        angle_K = is_drawn("rotate", math.radians(self.rotate) * (2 * a_K - 1), 0)
        stretch = [is_drawn("scale", 1 / self.scale + (self.scale - 1 / self.scale) * u_K, 1) for u_K in (a_K, b_K)]
        height, width = size
        shift = [
            is_drawn("crop", (self.crop * n * (2 * u_K - 1)).round() * 2 / n, 0)  # whole pixels, 2 / n wide each
            for n, u_K in ((width, a_K), (height, b_K))
        ]
        rows = (
            (stretch[0] * mirror_K * angle_K.cos(), -angle_K.sin() * height / width, shift[0]),
            (angle_K.sin() * width / height, stretch[1] * angle_K.cos(), shift[1]),
        )
        maps_K23 = torch.stack([torch.stack(row, 1) for row in rows], 1)
        outside_KH, outside_KW = (
            (torch.arange(n) - (u_K[:, None] * n).floor() + 0.5).abs() > self.cutout * n / 2
            for n, u_K in ((height, a_K), (width, b_K))
        )
        blank_KHW = is_drawn("cutout", torch.ones(n_classes), 0).bool()[:, None, None]
        mask_KHW = (outside_KH[:, :, None] | outside_KW[:, None] | ~blank_KHW).float()
        return Change(brightness_K, saturation_K, contrast_K, maps_K23, mask_KHW)
