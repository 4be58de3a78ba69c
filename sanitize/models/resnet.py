"""A small residual network for images of 28 to 64 pixels (He et al., 2016, section 4.2: the CIFAR variant)."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from sanitize.models.sizes import MAX_BLOCKS, Widths


class ResNetConfig(BaseModel):
    """Architecture of `ResNet`: one stage for each width; each stage after the first halves the resolution."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["resnet"] = "resnet"
    widths: Widths = (16, 32, 64)
    blocks_per_stage: int = Field(default=1, ge=1, le=16)

    @model_validator(mode="after")
    def _is_not_too_deep(self) -> Self:
        if (n_blocks := len(self.widths) * self.blocks_per_stage) > MAX_BLOCKS:
            raise ValueError(f"{n_blocks} blocks: at most {MAX_BLOCKS}")
        return self

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A new `ResNet` for images of (C, H, W)."""
        return ResNet(self, n_classes, image_shape[0])


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        same = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.norm1(self.conv1(x_BCHW)).relu()
        return (self.norm2(self.conv2(y_BCHW)) + self.shortcut(x_BCHW)).relu()


class ResNet(nn.Module):
    """Stem, residual stages, spatial mean, one Linear."""

    def __init__(self, config: ResNetConfig, n_classes: int, in_channels: int) -> None:
        super().__init__()
        width = config.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks = []
        for stage, n_out in enumerate(config.widths):
            for block in range(config.blocks_per_stage):
                blocks.append(_Block(width, n_out, stride=2 if stage and not block else 1))
                width = n_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits, shape (B, K), of normalised float images."""
        return self.head(self.blocks(self.stem(x_BCHW)).mean(dim=(2, 3)))
