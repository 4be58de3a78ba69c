"""A classifier of images on [0, 1], the scale in which radii are measured, instead of normalised images."""

import torch
from torch import Tensor, nn

from sanitize.models.config import ModelConfig


class OnPixels(nn.Module):
    """A network with its normalisation: logits (B, K), or votes, of images (B, C, H, W), uint8 or float on [0, 1].

    Args:
        network: network on normalised images.
        config: description with mean and std of each channel.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean_C11", config.mean), ("std_C11", config.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits of images; float images may leave [0, 1], as noisy images do."""
        x_BCHW = x_BCHW / 255 if x_BCHW.dtype == torch.uint8 else x_BCHW
        return self.network((x_BCHW - self.mean_C11) / self.std_C11)
