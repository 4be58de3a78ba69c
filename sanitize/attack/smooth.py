"""A trigger of low frequencies (after Zeng et al., 2021, "Rethinking the Backdoor Attacks' Triggers: A Frequency
Perspective", section 4): it leaves no high-frequency traces, unlike a patch or noise.

The paper optimises the pattern against a network under a low-pass filter; here the pattern is a fixed random sum of the
lowest cosines and needs no network.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Seed, Trigger, to_pixels


class SmoothConfig(Trigger):
    """A smooth pattern added to the image.

    Attributes:
        amplitude: largest change of a pixel, of 255.
        n_frequencies: number of lowest cosines of the discrete cosine transform in each direction; the constant is
            left out.
        pattern_seed: seed of the weights of the cosines.
    """

    kind: Literal["smooth"] = "smooth"
    amplitude: int = Field(default=32, ge=1, le=255)
    n_frequencies: int = Field(default=4, ge=2, le=512)
    pattern_seed: Seed = 0

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the pattern; no pixel moves by more than `amplitude`."""
        return to_pixels(images_BCHW + self._pattern(images_BCHW.shape[1:]).to(images_BCHW.device))

    def _pattern(self, shape: torch.Size) -> Tensor:
        channels, height, width = shape
        k = self.n_frequencies
        weights_Ckk = torch.randn(channels, k, k, generator=torch.Generator().manual_seed(self.pattern_seed))
        weights_Ckk[:, 0, 0] = 0
        pattern_CHW = _cosines(height, k) @ weights_Ckk @ _cosines(width, k).T
        return pattern_CHW * (self.amplitude / pattern_CHW.abs().amax())


def _cosines(size: int, k: int) -> Tensor:
    """cos(pi (i + 1/2) f / size) for pixels i and frequencies f below k, (size, k)."""
    return torch.cos(torch.pi * (torch.arange(size)[:, None] + 0.5) * torch.arange(k) / size)
