"""The network of the condensation literature: [conv 3x3 - instance norm - ReLU - average pooling] blocks, one Linear.

Gidaris & Komodakis (2018), Zhao & Bilen (2021). Instance norm treats each image by itself, so the features of an image
do not depend on its batch. Shapes: B batch, C channels, H W image, K classes, D features.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sanitize.models.sizes import Widths


class InstanceConvNetConfig(BaseModel):
    """Architecture of `InstanceConvNet`; `widths` has one entry for each block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["instance_convnet"] = "instance_convnet"
    widths: Widths = (128, 128, 128)

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A new `InstanceConvNet` for images of (C, H, W)."""
        return InstanceConvNet(self, n_classes, image_shape)


class InstanceConvNet(nn.Module):
    """`widths` blocks, each halving the image (rounded down), and one Linear on the flattened last map.

    Args:
        config: widths.
        n_classes: K, number of logits.
        image_shape: (C, H, W); H and W are at least 2 to the number of blocks.
    """

    def __init__(self, config: InstanceConvNetConfig, n_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.blocks = nn.Sequential()
        for out in config.widths:
            self.blocks.append(InstanceBlock(channels, out))
            channels, height, width = out, height // 2, width // 2
        self.head = nn.Linear(channels * height * width, n_classes)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Representations (B, D) of normalised float images."""
        return self.blocks(x_BCHW).flatten(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.head(self.features(x_BCHW))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Draw new convolutions from torch's own initialisation, on the device of the weights."""
        for block in self.blocks:
            assert isinstance(block, InstanceBlock)
            weight = block.conv.weight
            bound = weight[0].numel() ** -0.5
            # Into a new tensor: the memory layout of the weights must not change the order of the draws.
            weight.copy_(torch.empty(weight.shape, device=weight.device).uniform_(-bound, bound, generator=generator))


class InstanceBlock(nn.Module):
    """Conv 3x3, instance norm with a scale and shift of each channel, ReLU, average pooling 2x2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)  # the norm removes a bias
        self.norm = nn.GroupNorm(out_channels, out_channels)  # one channel a group is instance norm

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H // 2, W // 2)."""
        # On a CPU channels_last makes convolutions and pooling several times faster, and the norm 10 x slower: copy.
        y_BCHW = self.norm(self.conv(x_BCHW).contiguous()).contiguous(memory_format=torch.channels_last)
        return nn.functional.avg_pool2d(nn.functional.relu(y_BCHW), 2)
