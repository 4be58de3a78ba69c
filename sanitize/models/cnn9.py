"""The nine-layer network of the literature on noisy labels (Han et al. 2018, Table 3; B. Liu 2022, chapter 4).

Three blocks of three convolutions, each with BatchNorm and a leaky ReLU; max-pooling and dropout after the first two;
the last block narrows and has no padding; then the spatial mean and one Linear. For images of 28 pixels or more.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class CNN9Config(BaseModel):
    """Architecture of `CNN9`; `width` is the width of the first block, 128 in the paper (4.4 million weights)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cnn9"] = "cnn9"
    width: int = Field(default=128, ge=1, le=16_384)
    dropout: float = Field(default=0.25, ge=0, lt=1)

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A new `CNN9` for images of (C, H, W)."""
        return CNN9(self, n_classes, image_shape[0])


class CNN9(nn.Module):
    """Nine convolutions.

    Args:
        config: width and dropout.
        n_classes: K, number of logits.
        in_channels: C, channels of the images.
    """

    def __init__(self, config: CNN9Config, n_classes: int, in_channels: int) -> None:
        super().__init__()
        w = config.width
        layers: list[nn.Module] = []
        channels = in_channels
        for widths, padding in (((w, w, w), 1), ((2 * w, 2 * w, 2 * w), 1), ((4 * w, 2 * w, w), 0)):
            for width in widths:
                conv = nn.Conv2d(channels, width, 3, padding=padding, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.LeakyReLU(0.01, inplace=True)]
                channels = width
            if padding:
                layers += [nn.MaxPool2d(2), nn.Dropout2d(config.dropout)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(w, n_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of normalised float images."""
        return self.head(self.features(x_BCHW).mean(dim=(2, 3)))
