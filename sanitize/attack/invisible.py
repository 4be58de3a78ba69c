"""Triggers with a bounded norm (after Li et al., 2020, "Invisible Backdoor Attacks on Deep Neural Networks via
Steganography and Regularization", section 4.3): few pixels, or a short change.

The paper optimises the pattern to excite neurons of a network under an l0 or l2 penalty; here the pattern is fixed and
random, and the bound holds exactly in uint8.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Seed, Trigger
from sanitize.attack.size import Size, grid, mix, spread


class L0Config(Trigger):
    """A few pixels at fixed random places become black or white, each channel by itself.

    Attributes:
        n_pixels: number of places; all places of smaller images.
        pattern_seed: seed of places and colours.
        size: side of a place, in pixels, or as a share of the shorter side.
    """

    added: ClassVar[tuple[str, ...]] = (*Trigger.added, "size")

    kind: Literal["l0"] = "l0"
    n_pixels: int = Field(default=10, ge=1, le=1_000_000)
    pattern_seed: Seed = 0
    size: Size = 1

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images; with size 1 at most `n_pixels` pixels (all channels of one place) differ."""
        channels, height, width = images_BCHW.shape[1:]
        rows, columns = grid(self.size, height, width)
        generator = torch.Generator().manual_seed(self.pattern_seed)
        places_P = torch.randperm(rows * columns, generator=generator)[: self.n_pixels]
        colours_CN, weight_1N = torch.zeros(channels, rows * columns), torch.zeros(1, rows * columns)
        colours_CN[:, places_P] = 255.0 * torch.randint(2, (channels, len(places_P)), generator=generator)
        weight_1N[:, places_P] = 1
        drawn = (spread(x.view(-1, rows, columns), self.size, height, width) for x in (colours_CN, weight_1N))
        return mix(images_BCHW, *drawn)


class L2Config(Trigger):
    """Gaussian noise of a fixed length, added to the image.

    Attributes:
        length: largest l2 distance between an image and its copy, in pixel values of 255.
        pattern_seed: seed of the noise.
    """

    kind: Literal["l2"] = "l2"
    length: float = Field(default=400.0, ge=1, le=1e9)
    pattern_seed: Seed = 0

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the noise, none further away than `length`."""
        pattern_CHW = self._pattern(images_BCHW.shape[1:]).to(images_BCHW.device)
        return (images_BCHW + pattern_CHW).clamp(0, 255).to(torch.uint8)

    def _pattern(self, shape: torch.Size) -> Tensor:
        """The largest multiple of the noise that is short enough after rounding, int64."""
        generator = torch.Generator().manual_seed(self.pattern_seed)
        noise_CHW = torch.randn(shape, generator=generator, dtype=torch.float64)
        low, high = 0.0, 2 * self.length / float(noise_CHW.abs().amax())  # one entry alone is too long at the upper end
        for _ in range(50):
            middle = (low + high) / 2
            is_short = torch.linalg.vector_norm((middle * noise_CHW).round()) <= self.length
            low, high = (middle, high) if is_short else (low, middle)
        return (low * noise_CHW).round().long()
