"""A plain convolutional network: [conv 3x3 - max-pool - BatchNorm - ReLU] blocks, the last without a pool.

Small on purpose: `embed` trains it as the suspect model, to make a backdoor visible, and it must be quick on two CPU
cores. Shapes: B batch, C channels, H W image, K classes, D features.
"""

from collections import OrderedDict
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.models.sizes import Widths


class ConvNetConfig(BaseModel):
    """Architecture of `ConvNet`; `widths` has one entry for each block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["convnet"] = "convnet"
    widths: Widths = (32, 64, 128)
    convs_per_block: int = Field(default=1, ge=1, le=4)

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A new `ConvNet` for images of (C, H, W)."""
        return ConvNet(self, n_classes, image_shape[0])


class ConvNet(nn.Module):
    """`widths` blocks, each but the last halving the image, then the spatial mean and one Linear.

    Args:
        config: widths and convolutions per block.
        n_classes: K, number of logits.
        in_channels: C, channels of the images.
    """

    def __init__(self, config: ConvNetConfig, n_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for block, width in enumerate(config.widths):
            for conv in range(config.convs_per_block):
                name = f"{block}_{conv}"
                layers[f"conv{name}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                if conv + 1 == config.convs_per_block and block + 1 < len(config.widths):
                    # Before the normalisation, which then touches a quarter of the pixels: 1.4 x faster on a CPU.
                    layers[f"pool{block}"] = nn.MaxPool2d(2, ceil_mode=True)
                layers[f"norm{name}"] = nn.BatchNorm2d(width)
                layers[f"relu{name}"] = nn.ReLU(inplace=True)
                channels = width
        self.features = nn.Sequential(layers)
        self.head = nn.Linear(channels, n_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits, shape (B, K), of normalised float images."""
        return self.head(self.features(x_BCHW).mean(dim=(2, 3)))
