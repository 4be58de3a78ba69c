"""Rows of real numbers, brought to one scale for RCA and RobustRealNVP.

Columns are divided by their standard deviation, or by their range. Divided by the range, a column that is constant but
for a few rows counts for less. One enormous value squeezes the other rows of its column together in either case.

Shapes: N rows, B of a block; D columns.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from sanitize.errors import DataError
from sanitize.plural import counted

logger = logging.getLogger(__name__)

_SCALED = 4096  # rows of a block
_FAR = 1e6  # scaled values end here, so that every score is finite


@dataclass(frozen=True)
class Scaling:
    """Columns with mean 0, missing values at the mean, and average variance 1. Constant columns are 0.

    Attributes:
        unit_D: largest absolute value of each column; unit of the next two, so that no square overflows.
        mean_D: mean of the values present.
        scale_D: divisor of each column. All float64.
        missing_fraction: share of missing values.
    """

    unit_D: Tensor
    mean_D: Tensor
    scale_D: Tensor
    missing_fraction: float

    @classmethod
    def of(cls, x_ND: Tensor, equal: Literal["variance", "range"] = "variance") -> Self:
        """Estimate from the rows, a block at a time; all columns that vary get the same variance or range.

        Raises DataError where a column has no value."""
        n_rows, n_columns = x_ND.shape
        if n_rows == 0 or n_columns == 0:
            raise DataError(f"nothing to fit: {counted(n_rows, 'row')} of {counted(n_columns, 'column')}")
        blocks = x_ND.split(_SCALED)
        count_D = torch.stack([(~block.isnan()).sum(0) for block in blocks]).sum(0)
        if empty := (count_D == 0).nonzero().flatten().tolist():
            named = f"{counted(len(empty), 'column')} ({', '.join(map(str, empty[:10]))}{', …' if empty[10:] else ''})"
            raise DataError(f"nothing but missing values in {named}; leave them out")
        unit_D = torch.stack([_finite64(block).abs().amax(0) for block in blocks]).amax(0)
        unit_D[unit_D == 0] = 1
        mean_D = torch.stack([(_finite64(block) / unit_D).sum(0) for block in blocks]).sum(0) / count_D
        centred = ((_finite64(block) / unit_D - mean_D).where(~block.isnan(), 0) for block in blocks)
        scatter, lowest, highest = zip(*((b.square().sum(0), b.amin(0), b.amax(0)) for b in centred), strict=True)
        scale_D = (torch.stack(scatter).sum(0) / n_rows).sqrt()
        if equal == "range":
            range_D = torch.stack(highest).amax(0) - torch.stack(lowest).amin(0)
            varies_D = scale_D > 0
            scale_D = range_D * (scale_D / range_D)[varies_D].square().mean().sqrt()
            scale_D[~varies_D] = 0
        scale_D = scale_D.where(scale_D > 0, 1)
        return cls(unit_D, mean_D, scale_D, 1 - float(count_D.sum()) / x_ND.numel())

    def apply(self, x_ND: Tensor) -> Tensor:
        """Scaled rows (N, D), float32, finite; one block of rows at a time is float64."""
        scaled_ND = torch.empty(x_ND.shape)
        for block, out in zip(x_ND.split(_SCALED), scaled_ND.split(_SCALED), strict=True):
            z_BD = (_finite64(block) / self.unit_D - self.mean_D) / self.scale_D
            out.copy_(z_BD.where(~block.isnan(), 0).clamp(-_FAR, _FAR))
        return scaled_ND

    def rows(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """`as_rows`; raises DataError where the number of columns is not that of the estimate."""
        x_ND = as_rows(x_ND)
        if x_ND.shape[1] != len(self.mean_D):
            raise DataError(f"{counted(x_ND.shape[1], 'column')}, but the model was fitted on {len(self.mean_D)}")
        return x_ND

    def state_dict(self) -> dict[str, Tensor]:
        """The scaling as tensors, lossless."""
        missing_fraction = torch.tensor(self.missing_fraction, dtype=torch.float64)
        return {"unit": self.unit_D, "mean": self.mean_D, "scale": self.scale_D, "missing_fraction": missing_fraction}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`; further tensors are ignored."""
        return cls(state["unit"], state["mean"], state["scale"], float(state["missing_fraction"]))


def scaled(x_ND: Tensor | np.ndarray, equal: Literal["variance", "range"] = "variance") -> tuple[Scaling, Tensor]:
    """The scaling of a table, and its scaled rows. Raises DataError as `as_rows` and `Scaling.of` do."""
    x_ND = as_rows(x_ND)
    scaling = Scaling.of(x_ND, equal)
    if scaling.missing_fraction:
        logger.info("%.2f %% of the values are missing: column means instead", 100 * scaling.missing_fraction)
    return scaling, scaling.apply(x_ND)


def as_rows(x_ND: Tensor | np.ndarray) -> Tensor:
    """A tensor (N, D) of real numbers on the CPU, copied only where necessary.

    Raises:
        DataError: another number of dimensions, complex or no numbers, or an infinite value.
    """
    if isinstance(x_ND, np.ndarray):
        if x_ND.dtype.kind not in "fiub":
            raise DataError(f"rows must be real numbers, not {x_ND.dtype}")
        x_ND = torch.from_numpy(np.require(x_ND, requirements=["C", "W"]))
    x_ND = x_ND.detach().cpu()
    if x_ND.ndim != 2 or x_ND.is_complex():
        raise DataError(f"rows must be (N, D) real numbers, not {tuple(x_ND.shape)} of {x_ND.dtype}")
    if any(block.isinf().any() for block in x_ND.split(_SCALED)):
        raise DataError("infinite values; replace them, or set them to NaN to have them imputed")
    return x_ND


def _finite64(x_BD: Tensor) -> Tensor:
    return x_BD.double().nan_to_num(0.0)
