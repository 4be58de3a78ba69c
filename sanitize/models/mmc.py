"""A last layer without weights: distances of an embedding to fixed centres at the largest distance from each other.

The max-Mahalanobis centre loss (Pang, Xu, Dong, Du, Chen & Zhu, ICLR 2020) draws each embedding to the centre of its
class. Shapes: B batch, D features of the embedding, K classes.
"""

import torch
from torch import Tensor, nn

from sanitize.errors import ConfigError


def centres(n_classes: int, n_features: int, scale: float) -> Tensor:
    """K points (K, D) of length `scale`; any two have the cosine -1 / (K - 1) (Algorithm 1 of the paper).

    Raises:
        ConfigError: D < K - 1, too few dimensions for a simplex, or K < 2.
    """
    if n_features < n_classes - 1:
        raise ConfigError(f"{n_classes} centres need {n_classes - 1} features, the embedding has {n_features}")
    if n_classes < 2:
        raise ConfigError("mmc: distances between centres need two classes or more")
    # Coordinate j of all later points is the same, so the algorithm's double loop over points is one over coordinates.
    own, shared, squares = [], [], 0.0
    for _ in range(n_classes - 1):
        own.append((1 - squares) ** 0.5)
        shared.append(-(1 / (n_classes - 1) + squares) / own[-1])
        squares += shared[-1] ** 2
    mu_KD = torch.zeros(n_classes, n_features, dtype=torch.float64)
    mu_KD[:, : n_classes - 1] = torch.tensor(shared, dtype=torch.float64).expand(n_classes, -1).tril(-1)
    mu_KD[: n_classes - 1, : n_classes - 1] += torch.tensor(own, dtype=torch.float64).diag()
    return (scale * mu_KD).float()


class CentreDistance(nn.Module):
    """Logits (B, K): minus half the squared distance of an embedding (B, D) to each centre."""

    centres_KD: Tensor

    def __init__(self, n_features: int, n_classes: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("centres_KD", centres(n_classes, n_features, scale), persistent=False)

    def forward(self, z_BD: Tensor) -> Tensor:
        """Logits (B, K); the nearest centre has the largest."""
        squares_BK = z_BD.square().sum(1, keepdim=True) + self.centres_KD.square().sum(1)
        return z_BD @ self.centres_KD.T - squares_BK / 2
