"""The simplified VGG of I-BAU (Zeng et al. 2022, table 9): blocks of two 3x3 convolutions, each with BatchNorm and ELU,
then max-pooling and dropout; the last map is flattened into one Linear, not averaged."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from sanitize.models.sizes import Widths


class VGGConfig(BaseModel):
    """Architecture of `VGG`; the paper's widths are (32, 64, 128).

    Attributes:
        widths: widths of the blocks; each block halves the image.
        dropout: dropout probability after each block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vgg"] = "vgg"
    widths: Widths = (32, 64, 128)
    dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.3, 0.4, 0.4)

    @model_validator(mode="after")
    def _each_block_has_both(self) -> Self:
        if len(self.widths) != len(self.dropout):
            raise ValueError(f"{len(self.widths)} widths and {len(self.dropout)} dropouts: give one of each per block")
        return self

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A new `VGG` for images of (C, H, W)."""
        return VGG(self, n_classes, image_shape[0], image_shape[1:])


class VGG(nn.Module):
    """Simplified VGG.

    Args:
        config: widths and dropout.
        n_classes: K, number of logits.
        in_channels: C, channels of the images.
        image_size: (H, W) of the images, which sets the width of the head.
    """

    def __init__(self, config: VGGConfig, n_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, (height, width) = in_channels, image_size
        for n_out, dropout in zip(config.widths, config.dropout, strict=True):
            for _ in range(2):
                layers += [nn.Conv2d(channels, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ELU()]
                channels = n_out
            layers += [nn.MaxPool2d(2, ceil_mode=True), nn.Dropout(dropout)]
            height, width = -(-height // 2), -(-width // 2)
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * height * width, n_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of normalised float images."""
        return self.head(self.features(x_BCHW))
