"""A multilayer perceptron, for images laid out flat and for tables. B batch, D inputs, K outputs."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.models.sizes import Widths


class MLPConfig(BaseModel):
    """Architecture of `MLP`: widths of the hidden layers, and slope of the leaky ReLU after each (0: a ReLU)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mlp"] = "mlp"
    widths: Widths = (256,)
    negative_slope: float = Field(default=0.0, ge=0, lt=1)

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A new `MLP` for images of (C, H, W)."""
        return MLP(self, n_classes, math.prod(image_shape))


class MLP(nn.Module):
    """Linear layers with a leaky ReLU between them.

    Args:
        config: hidden widths and slope.
        n_outputs: K, classes or regression targets.
        n_inputs: D; images are flattened.
    """

    def __init__(self, config: MLPConfig, n_outputs: int, n_inputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in zip((n_inputs, *config.widths[:-1]), config.widths, strict=True):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(config.negative_slope)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(config.widths[-1], n_outputs)

    def forward(self, x_B: Tensor) -> Tensor:
        """Outputs (B, K) of float inputs (B, D) or (B, C, H, W)."""
        return self.head(self.features(x_B))
