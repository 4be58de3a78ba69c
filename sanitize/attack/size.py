"""Sizes in pixels, or as a share of the image. A trigger with a share looks the same at any resolution: it is drawn on
a grid of cells, and a pixel has the mean colour of the cells below it. C channels, H W image, r c cells.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sanitize.attack.attack import to_pixels

Pixels = Annotated[int, Field(strict=True, ge=1, le=10_000)]
Share = Annotated[float, Field(ge=0.002, lt=1)]  # of the shorter side of the image
Size = Pixels | Share


def grid(size: Size, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of cells of a size that cover an image; a share gives at most one cell a pixel."""
    if isinstance(size, int):
        return math.ceil(height / size), math.ceil(width / size)
    cell = size * min(height, width)
    return min(height, max(1, round(height / cell))), min(width, max(1, round(width / cell)))


def spread(cells_Crc: Tensor, size: Size, height: int, width: int) -> Tensor:
    """Cells of `grid` as an image, (C, H, W); float64 for a share."""
    if size == 1:
        return cells_Crc
    if isinstance(size, int):
        columns_CHc = cells_Crc.repeat_interleave(min(size, height), 1)[:, :height]
        return columns_CHc.repeat_interleave(min(size, width), 2)[:, :, :width]
    n_rows, n_columns = cells_Crc.shape[1:]
    return _overlap(height, 0, height, n_rows) @ cells_Crc.double() @ _overlap(width, 0, width, n_columns).T


def draw(images_BCHW: Tensor, cells_rc: Tensor, top: float, left: float, side: float) -> Tensor:
    """Copies of uint8 images with a square of cells, (r, c) or (C, r, c); place and side in pixels, not rounded."""
    height, width = images_BCHW.shape[2:]
    down_Hr = _overlap(height, top, side, cells_rc.shape[-2])
    right_Wc = _overlap(width, left, side, cells_rc.shape[-1])
    colours_HW = down_Hr @ cells_rc.double() @ right_Wc.T
    return mix(images_BCHW, colours_HW, down_Hr.sum(1)[:, None] * right_Wc.sum(1))


def mix(images_BCHW: Tensor, colours_HW: Tensor, weight_HW: Tensor) -> Tensor:
    """uint8 images times 1 - weight, plus colours that have their weight already: (H, W) or (C, H, W)."""
    device = images_BCHW.device
    return to_pixels(images_BCHW * (1 - weight_HW.to(device)) + colours_HW.to(device))


def _overlap(n_pixels: int, start: float, length: float, n_cells: int) -> Tensor:
    """Share of each pixel that each cell covers, (n_pixels, n_cells) float64; cells divide [start, start + length]."""
    edges = start + length * torch.arange(n_cells + 1, dtype=torch.float64) / n_cells
    first = torch.arange(n_pixels, dtype=torch.float64)[:, None]
    return (torch.minimum(first + 1, edges[1:]) - torch.maximum(first, edges[:-1])).clamp(min=0)
