"""Images as a shard stores them, and as a model reads them.

A trigger is put on the stored image: at its own size, with its own channels, uint8. `poison_shards` writes the result
as PNG, without loss; a model reads the image after scaling. Poisoning and measuring therefore take the same steps:

    payload -> stored_image -> trigger -> as_read -> the model's normalisation

Shapes: B batch, C H W image.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sanitize.data.dataset import Dataset
from sanitize.data.decode import BadImage, ImageConfig, decode, fit, image_header
from sanitize.data.samples import Sample, find_image

_GREY = ("1", "L", "LA", "La", "I", "F")  # Pillow's modes of one colour; those of other depths begin with "I;"
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow has it


def stored_image(sample: Sample, dataset: Dataset, shard: str) -> Tensor:
    """The stored image of a sample: uint8 (C, H, W) at its own size, with C = 1 for grey images and 3 for others.

    Args:
        sample: sample with status `ok`.
        dataset: data set of the sample; its limit on pixels holds.
        shard: name of the shard, for the message.

    Raises:
        DataError: the image cannot be decoded; an index with check=decode finds such images.
    """
    config = ImageConfig.model_validate(dataset.info["image"])
    data = find_image(sample, config.member)[1]
    try:
        mode = image_header(data, config).mode
        channels = 1 if mode in _GREY or mode.startswith("I;") else 3
        return decode(data, config.model_copy(update={"channels": channels}))
    except BadImage as error:
        raise dataset.bad_image(shard, sample.key, error) from error


def as_read(image_CHW: Tensor, image_shape: tuple[int, int, int], crop: bool = True) -> Tensor:
    """The image as `decode` reads it from a lossless file, bit for bit.

    Args:
        image_CHW: uint8 with 1 or 3 channels.
        image_shape: (C, H, W) of the result.
        crop: as in `ImageConfig`.
    """
    channels, height, width = image_shape
    if len(image_CHW) != channels:
        pixels = image_CHW.permute(1, 2, 0).contiguous().numpy()
        picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        converted = np.array(picture.convert("RGB" if channels == 3 else "L")).reshape(*pixels.shape[:2], channels)
        image_CHW = torch.from_numpy(converted).permute(2, 0, 1).contiguous()
    return fit(image_CHW, (height, width), crop)


class OnStored(nn.Module):
    """A classifier of stored images: the differentiable part of `as_read` before a network.

    Args:
        network: logits (B, K) of float images (B, C, H, W) on [0, 1].
        image_shape: (C, H, W) of the images that `network` takes.
        crop: as in `ImageConfig`.
    """

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int], crop: bool = True) -> None:
        super().__init__()
        self.network, self.image_shape, self.crop = network, image_shape, crop

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits of float images on [0, 1], of one size and with 1 or 3 channels."""
        channels, height, width = self.image_shape
        if x_BCHW.shape[1] < channels:
            x_BCHW = x_BCHW.expand(-1, channels, -1, -1)
        elif x_BCHW.shape[1] > channels:
            x_BCHW = (x_BCHW * x_BCHW.new_tensor(_LUMINANCE)[:, None, None]).sum(1, keepdim=True)
        return self.network(torch.stack([fit(x_CHW, (height, width), self.crop) for x_CHW in x_BCHW]))
