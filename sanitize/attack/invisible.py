"""Triggers with a bounded norm (after Li et al., 2020, "Invisible Backdoor Attacks on Deep Neural Networks via
Steganography and Regularization", section 4.3): few pixels, or a short change.

The paper optimises the pattern to excite neurons of a network under an l0 or l2 penalty; here the pattern is fixed and
random, and the bound holds exactly in uint8.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Trigger


class L0Config(Trigger):
    """A few pixels at fixed random places become black or white, each channel by itself.

    Attributes:
        n_pixels: number of places; all places of smaller images.
        pattern_seed: seed of places and colours.
    """

    kind: Literal["l0"] = "l0"
    n_pixels: int = Field(default=10, ge=1)
    pattern_seed: int = Field(default=0, ge=0)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images; at most `n_pixels` pixels (all channels of one place) differ."""
        n_batch, channels, height, width = images_BCHW.shape
        generator = torch.Generator().manual_seed(self.pattern_seed)
        places_P = torch.randperm(height * width, generator=generator)[: self.n_pixels]
        colours_CP = 255 * torch.randint(2, (channels, len(places_P)), generator=generator)
        out_BCN = images_BCHW.flatten(2).clone()
        out_BCN[:, :, places_P] = colours_CP.to(out_BCN)
        return out_BCN.view(n_batch, channels, height, width)


class L2Config(Trigger):
    """Gaussian noise of a fixed length, added to the image.

    Attributes:
        length: largest l2 distance between an image and its copy, in pixel values of 255.
        pattern_seed: seed of the noise.
    """

    kind: Literal["l2"] = "l2"
    length: float = Field(default=400.0, ge=1)
    pattern_seed: int = Field(default=0, ge=0)

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
