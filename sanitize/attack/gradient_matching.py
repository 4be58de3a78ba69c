"""Gradient matching, "Witches' Brew" (Geiping et al., 2021), as in Zheng & Li, RDM-DC, Algorithm 1.

P images with label y are changed so that their gradient points as the gradient of the target x_t with label y does:
    1 - cos( grad l(x_t, y), sum_p grad l(A (x_p + d_p), y) )        (Eq. 4)
Gradients are taken in the weights of networks trained on clean data, and the objective is the mean over the networks; A
is a random change of each image. Shapes: P images, C H W image, W weights of a network.
"""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sanitize.attack.targeted import PerturbConfig, perturb
from sanitize.compute import Compute
from sanitize.models.config import ModelConfig
from sanitize.siamese import SiameseConfig


class GradientMatchingConfig(BaseModel):
    """Settings of the attack.

    Attributes:
        perturb: the ball and the search.
        augment: random changes of the poison, one for each image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perturb: PerturbConfig = PerturbConfig()
    augment: SiameseConfig = SiameseConfig()


def match_gradients(
    networks: Sequence[nn.Module],
    images_PCHW: Tensor,
    target_CHW: Tensor,
    label: int,
    config: GradientMatchingConfig,
    model_config: ModelConfig,
    compute: Compute,
) -> Tensor:
    """Poison (P, C, H, W), uint8 on the CPU, within eps of the images.

    Args:
        networks: networks trained on clean data; they are moved to the device and set to eval mode. The paper has 16,
            trained for different numbers of epochs.
        images_PCHW: images of class `label`, uint8.
        target_CHW: uint8.
        label: class that the model is to predict for the target.
        config: settings of the attack.
        model_config: normalisation of the images that the networks take.
        compute: device, precision, seed.

    Raises:
        NumericsError: the objective is not finite.
    """
    device, size = compute.torch_device, (target_CHW.shape[1], target_CHW.shape[2])
    labels_P = torch.full((len(images_PCHW),), label, device=device)

    def gradient(network: nn.Module, x_BCHW: Tensor, differentiable: bool) -> Tensor:
        """Gradient of the summed loss, (W,)."""
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        with torch.enable_grad():
            with compute.autocast():
                logits_BK = network(x_BCHW)
            loss = nn.functional.cross_entropy(logits_BK.float(), labels_P[: len(x_BCHW)], reduction="sum")
            gradients = torch.autograd.grad(loss, weights, create_graph=differentiable)
        return torch.cat([gradient_w.flatten() for gradient_w in gradients])

    target_1CHW = model_config.normalise(target_CHW[None].to(device))
    for network in networks:
        network.to(device).eval()
    wanted = [gradient(network, target_1CHW, differentiable=False) for network in networks]

    def misalignment(x_PCHW: Tensor, stream: tuple[str | int, ...]) -> Tensor:
        draws = compute.generator("attack", "change", *stream)
        change = config.augment.draw(len(x_PCHW), size, draws).to(device)
        x_PCHW = change(model_config.standardise(x_PCHW / 255)[:, None])[:, 0]
        cosines = [
            nn.functional.cosine_similarity(wanted_W, gradient(network, x_PCHW, x_PCHW.requires_grad), dim=0)
            for network, wanted_W in zip(networks, wanted, strict=True)
        ]
        return 1 - torch.stack(cosines).mean()

    return perturb(images_PCHW, misalignment, config.perturb, compute)
