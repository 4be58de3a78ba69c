"""Gradient leaking: the share of the loss gradient in directions in which the data hardly vary (Li, Cheng, Su & Zhu,
Eq. 2 and 3).

    alpha_d(g) = sum over i <= d of (g . v_i)^2 / ||g||^2,        averaged over the data

with v_i the principal components of the data: 1 means that no gradient leaves their span. Shapes: B images of a batch,
C H W image, D pixels, R components.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sanitize.compute import Compute


class Leaking(NamedTuple):
    """Mean gradients of N images.

    Attributes:
        alpha_R: mean alpha_d for d = 1, 2, ... R, float64, rising, at most 1.
        gradient_norm: mean l2 norm of the gradients, for pixels on [0, 1].
        n: number of images; those with a gradient of exactly zero are left out of alpha.
    """

    alpha_R: Tensor
    gradient_norm: float
    n: int


def shares(g_BD: Tensor, vectors_DR: Tensor) -> Tensor:
    """alpha_d of each row for d = 1, 2, ... R: (B, R), float64."""
    g_BD = g_BD.double()
    inside_BR = (g_BD @ vectors_DR.to(g_BD)).square().cumsum(1)
    return inside_BR / g_BD.square().sum(1, keepdim=True)


def gradient_leaking(
    model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, vectors_DR: Tensor, compute: Compute, batch_size: int = 256
) -> Leaking:
    """The curve of alpha_d over gradients of the cross-entropy with respect to the image.

    Args:
        model: logits (B, K) of float images on [0, 1] (`sanitize.models.pixels.OnPixels`); moved to the device, set to
            eval mode.
        images_NCHW: uint8, or float on [0, 1].
        labels_N: true labels, int64.
        vectors_DR: principal components, orthonormal columns (`sanitize.denoising.Components.vectors_DR`).
        compute: device; gradients are float32.
        batch_size: images at once.
    """
    compute.activate()
    device = compute.torch_device
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    vectors_DR = vectors_DR.to(device, torch.float64)
    alpha_R, norms = torch.zeros(vectors_DR.shape[1], dtype=torch.float64, device=device), 0.0
    n_pointing = 0
    for x_BCHW, y_B in zip(images_NCHW.split(batch_size), labels_N.split(batch_size), strict=True):
        x_BCHW = x_BCHW.to(device)
        x_BCHW = (x_BCHW / 255 if x_BCHW.dtype == torch.uint8 else x_BCHW.float()).requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(x_BCHW), y_B.to(device), reduction="sum")
            (g_BCHW,) = torch.autograd.grad(loss, x_BCHW)
        norms_B = g_BCHW.flatten(1).double().norm(dim=1)
        points_B = norms_B > 0
        alpha_R += shares(g_BCHW.flatten(1)[points_B], vectors_DR).sum(0)
        norms += float(norms_B.sum())
        n_pointing += int(points_B.sum())
    return Leaking((alpha_R / max(1, n_pointing)).cpu(), norms / max(1, len(labels_N)), len(labels_N))
