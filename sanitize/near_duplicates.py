"""Near-duplicates: images that are much closer to each other than images of a data set usually are.

Two samples are linked where their distance is below `TIGHT` times the distance from either of them to its `FAR`-th
neighbour, a measure of how dense the data is around them; or below `COPIES` times the median of that distance, because
around a picture with more than `FAR` copies the data are dense with copies alone. Groups are the connected components
of these links: copies of one picture, bursts, the frames of one object that a camera passes. Distances are Euclidean
between rows of unit length, in an embedding made without labels. Links are sought among the `LINKS` nearest neighbours
of each sample.

The search compares all pairs in blocks: N^2 P multiplications, and `BLOCK` N similarities in memory. Shapes: N samples,
P features.
"""

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

TIGHT, FAR, LINKS, COPIES = 0.6, 50, 10, 0.3
BLOCK = 1000  # rows compared with all others at once


def near_duplicates(z_NP: Tensor) -> Tensor:
    """Number of the group of each sample, int64 (N,), from 0; a sample without near-duplicates is a group of its own.

    Args:
        z_NP: rows of an embedding, centred, float32.
    """
    n = len(z_NP)
    if n < 3:
        return torch.arange(n)
    nearest_NL, is_linked_NL = near_links(z_NP)
    here = torch.arange(n)[:, None].expand_as(nearest_NL)[is_linked_NL].numpy()
    there = nearest_NL[is_linked_NL].numpy()
    links = coo_matrix(([True] * len(here), (here, there)), shape=(n, n))
    return torch.from_numpy(connected_components(links, directed=False)[1]).long()


def near_links(z_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest neighbours of each sample, int64 (N, L), and True where they are near-duplicates of it, bool (N, L).

    Args:
        z_NP: rows of an embedding, centred, float32; at least three.
    """
    n, unit_NP = len(z_NP), unit_rows(z_NP)
    far, near, nearest = [], [], []
    for rows in torch.arange(n).split(BLOCK):
        similarity_BN = unit_NP[rows] @ unit_NP.T
        similarity_BN[torch.arange(len(rows)), rows] = -torch.inf
        top = similarity_BN.topk(min(FAR, n - 1), dim=1)
        distance_BF = (2 - 2 * top.values).clamp(min=0).sqrt()
        far.append(distance_BF[:, -1])
        near.append(distance_BF[:, :LINKS])
        nearest.append(top.indices[:, :LINKS])
    far_N, near_NL, nearest_NL = torch.cat(far), torch.cat(near), torch.cat(nearest)
    around_NL = TIGHT * torch.minimum(far_N[:, None], far_N[nearest_NL])
    return nearest_NL, near_NL < around_NL.clamp(min=COPIES * float(far_N.median()))


def unit_rows(z_NP: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of zeros stays."""
    length_N1: Tensor = z_NP.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return z_NP / length_N1
