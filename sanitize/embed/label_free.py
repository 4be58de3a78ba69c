"""Embeddings without labels or a model: each row is a function of one image.

Shapes: B images of C channels; G cells a side, O orientations.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from sanitize.data.tables import N_ORIENTATIONS

_FLAT = 1e-3  # regularisation of the gradient energy; images are in [0, 1]


def reduced_pixels(images_BCHW: Tensor, side: int) -> Tensor:
    """uint8 images as rows of float32 in [0, 1], averaged down to at most `side` pixels in height and width."""
    height, width = images_BCHW.shape[2:]
    small_BChw = adaptive_avg_pool2d(images_BCHW.float(), (min(side, height), min(side, width)))
    return small_BChw.flatten(1) / 255


def oriented_gradients(images_BCHW: Tensor, cells: int) -> Tensor:
    """Histograms of oriented gradients (Dalal & Triggs, 2005) of uint8 images, as rows (B, O G G), float32.

    In each cell of a G x G grid the magnitudes of the gradients are summed by unsigned orientation and divided by the
    energy of the cell. Unlike in the paper, neighbouring cells do not count: a patch affects only the cells it covers.
    Row-major: orientation, then the cell's row, then its column.
    """
    grey_B1HW = pad(images_BCHW.float().mean(1, keepdim=True) / 255, (1, 1, 1, 1), mode="replicate")
    dx_B1HW = grey_B1HW[..., 1:-1, 2:] - grey_B1HW[..., 1:-1, :-2]
    dy_B1HW = grey_B1HW[..., 2:, 1:-1] - grey_B1HW[..., :-2, 1:-1]
    magnitude_B1HW = (dx_B1HW.square() + dy_B1HW.square()).sqrt()
    orientation_B1HW = torch.atan2(dy_B1HW, dx_B1HW).remainder(math.pi) * (N_ORIENTATIONS / math.pi)
    below_B1HW = orientation_B1HW.floor()
    share_B1HW = orientation_B1HW - below_B1HW  # share of the next orientation
    below_B1HW = below_B1HW.long().remainder(N_ORIENTATIONS)
    votes_BOHW = magnitude_B1HW.new_zeros(len(images_BCHW), N_ORIENTATIONS, *magnitude_B1HW.shape[2:])
    votes_BOHW.scatter_(1, below_B1HW, magnitude_B1HW * (1 - share_B1HW))
    votes_BOHW.scatter_(1, (below_B1HW + 1) % N_ORIENTATIONS, magnitude_B1HW * share_B1HW)
    cells_BOGG = adaptive_avg_pool2d(votes_BOHW, cells)
    return (cells_BOGG / (cells_BOGG.square().sum(1, keepdim=True) + _FLAT).sqrt()).flatten(1)
