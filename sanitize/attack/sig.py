"""SIG (Barni, Kallas & Tondi, 2019, "A new backdoor attack in CNNs by training set corruption without label
poisoning"): a horizontal sinusoid on images of the target class, which keep their label.

    v(i, j) = delta sin(2 pi j f / m)        column j of m
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import Trigger, to_pixels


class SIGConfig(Trigger):
    """A sinusoid along the columns, added to the image.

    Attributes:
        target: the class; only its images are eligible, so `rate` cannot exceed its share of the data.
        delta: amplitude, of 255.
        frequency: f, periods in the width of the image; the sinusoid is zero in each column where m divides 2 f.
    """

    keeps_label: ClassVar[bool] = True
    added: ClassVar[tuple[str, ...]] = ()

    kind: Literal["sig"] = "sig"
    target: int = 0
    delta: float = Field(default=40, gt=0, le=255)
    frequency: float = Field(default=6, gt=0, le=1000)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the sinusoid; no pixel moves by more than delta, rounded."""
        width = images_BCHW.shape[3]
        columns_W = torch.arange(width, dtype=torch.float64)
        wave_W = self.delta * torch.sin(2 * torch.pi * columns_W * self.frequency / width)
        return to_pixels(images_BCHW + wave_W.to(images_BCHW.device))
