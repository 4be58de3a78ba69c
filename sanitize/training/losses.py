"""Losses of samples, and norms of their gradients with respect to the output of the network.

Shapes: B batch, K outputs. Targets are labels (B,) int64, class probabilities (B, K), or real vectors (B, K).
"""

from typing import Literal

import torch
from torch import Tensor, nn

Loss = Literal["cross_entropy", "mmc", "squared", "huber"]


def sample_losses(outputs_BK: Tensor, targets_B: Tensor, loss: Loss, huber_delta: float = 1.0) -> Tensor:
    """Loss of each sample, (B,): cross-entropy; half the squared distance to the centre of the class (`models.mmc`) or
    to the target; the Huber loss summed over outputs."""
    if loss == "cross_entropy":
        return nn.functional.cross_entropy(outputs_BK, targets_B, reduction="none")
    if loss == "mmc":
        return -outputs_BK.gather(1, targets_B[:, None])[:, 0]
    if loss == "squared":
        return 0.5 * (outputs_BK - targets_B).square().sum(1)
    return nn.functional.huber_loss(outputs_BK, targets_B, reduction="none", delta=huber_delta).sum(1)


def loss_gradient_norms(outputs_BK: Tensor, targets_B: Tensor, loss: Loss, huber_delta: float = 1.0) -> Tensor:
    """||d loss_i / d output_i||_2 of each sample, (B,), in closed form (B. Liu 2022, Algorithm 4).

    ||softmax(o) - y|| for cross-entropy, ||o - y|| for the squared distance; for huber, the residuals are clipped. For
    mmc the output is the embedding, and the norm is its distance to the centre.
    """
    if loss == "mmc":
        return (2 * sample_losses(outputs_BK, targets_B, loss)).sqrt()
    if loss == "cross_entropy":
        if targets_B.dim() == 1:
            targets_B = nn.functional.one_hot(targets_B, outputs_BK.shape[1])
        return torch.linalg.vector_norm(outputs_BK.softmax(1) - targets_B, dim=1)
    residual_BK = outputs_BK - targets_B
    if loss == "huber":
        residual_BK = residual_BK.clamp(-huber_delta, huber_delta)
    return torch.linalg.vector_norm(residual_BK, dim=1)
