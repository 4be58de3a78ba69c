"""DM poisoning (Zheng & Li, RDM-DC, Algorithm 2): an attack on data sets condensed by distribution matching.

P images are changed so that their mean representation is that of the target x_t, in any random network r and under any
change A of the images:
    E || r(A x_t) - mean_p r(A (x_p + d_p)) ||^2        (Eq. 5)
Condensed images that match the mean of the class then match a share of the target. Shapes: P images, C H W image, D
features.
"""

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat
from torch import Tensor

from sanitize.attack.targeted import PerturbConfig, perturb
from sanitize.compute import Compute
from sanitize.models.config import ModelConfig
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig
from sanitize.siamese import SiameseConfig

_AT_ONCE = {"cpu": 32, "cuda": 4096}  # images in a forward pass; on a CPU its activations must stay in the cache


class DMPoisoningConfig(BaseModel):
    """Search, and the assumed settings of the condensation.

    Attributes:
        perturb: the ball and the search.
        architecture: architecture of the random feature extractors.
        augment: random changes, the same for target and poison.
        mean, std: normalisation of each channel on the scale [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perturb: PerturbConfig = PerturbConfig()
    architecture: InstanceConvNetConfig = InstanceConvNetConfig()
    augment: SiameseConfig = SiameseConfig()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)


def dm_poison(images_PCHW: Tensor, target_CHW: Tensor, config: DMPoisoningConfig, compute: Compute) -> Tensor:
    """Poison (P, C, H, W), uint8 on the CPU, within eps of the images.

    Args:
        images_PCHW: images of the class that the model is to predict for the target, uint8.
        target_CHW: uint8.
        config: settings of the attack.
        compute: device, precision, seed.

    Raises:
        NumericsError: the objective is not finite.
    """
    device = compute.torch_device
    channels, height, width = target_CHW.shape
    model_config = ModelConfig(n_classes=1, image_shape=(channels, height, width), mean=config.mean, std=config.std)
    extractor = InstanceConvNet(config.architecture, 1, model_config.image_shape).requires_grad_(False)
    extractor.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    target_1CHW = target_CHW[None].to(device, torch.float32)

    def distance(x_PCHW: Tensor, stream: tuple[str | int, ...]) -> Tensor:
        extractor.redraw(compute.generator("attack", "extractor", *stream, device=device))
        change = config.augment.draw(1, (height, width), compute.generator("attack", "change", *stream)).to(device)
        x_BCHW = change(model_config.standardise(torch.cat([target_1CHW, x_PCHW]) / 255)[None])[0]
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        with compute.autocast():
            r_BD = torch.cat([extractor.features(part).float() for part in x_BCHW.split(_AT_ONCE[device.type])])
        return (r_BD[0] - r_BD[1:].mean(0)).square().sum()

    return perturb(images_PCHW, distance, config.perturb, compute)
