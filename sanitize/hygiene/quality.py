"""Images of low quality, by thresholds on the facts that the index took of them. One function judges all images of a
shard, by columns; the kinds are those of CleanVision and fastdup, and pictures cut in transfer.

Shapes: M images of a shard.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field


class QualityConfig(BaseModel):
    """Thresholds. Brightness is luminance / 255; sides and shares of rows are those of the stored image.

    Attributes:
        dark: brightness that 99 % of the pixels do not exceed.
        bright: brightness that 95 % of the pixels reach.
        blank: standard deviation of the brightness.
        blurred: smoothness (1/4 for a ramp, 1/2 for sharp edges) below which an image is blurred. Images
            with a side below 24 pixels are not judged.
        low_entropy: bits of a histogram of 64 levels.
        odd_aspect: short side over long side.
        odd_size: factor between the size of an image and the median size, as lengths.
        grey: largest difference between channels of a grey image. Grey images are listed where most images have colour.
        torn: share of rows at one end, and not at the other, of the grey (128) that libjpeg puts where a file was cut.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dark: float = Field(default=0.2, ge=0, le=1)
    bright: float = Field(default=0.95, ge=0, le=1)
    blank: float = Field(default=0.02, ge=0, le=1)
    blurred: float = Field(default=0.27, ge=0, le=1)
    low_entropy: float = Field(default=1.0, ge=0, le=6)
    odd_aspect: float = Field(default=0.33, ge=0, le=1)
    odd_size: float = Field(default=4.0, ge=1)
    grey: int = Field(default=8, ge=0, le=255)
    torn: float = Field(default=0.125, gt=0, le=1)


KINDS = ("dark", "bright", "blank", "blurred", "low_entropy", "odd_aspect", "odd_size", "grey", "torn")
_LEAST_SIDE = 24  # pixels, below which every image is smooth
_SIZES = 2**15  # sizes that are told apart


class Usual(NamedTuple):
    """What is usual in the data set.

    Attributes:
        size: median of sqrt(height * width), in pixels; 0 where no image was decoded.
        grey_fraction: share of grey images.
    """

    size: int
    grey_fraction: float


class UsualCounts:
    """Counts that `Usual` comes from; they merge by addition."""

    def __init__(self, grey: int) -> None:
        self._grey = grey
        self._sizes = np.zeros(_SIZES, np.int64)
        self._n_grey = 0

    def add(self, facts: pa.Table, rows: pa.Table) -> None:
        """Add the images of one shard."""
        self._sizes += np.bincount(_size(rows), minlength=_SIZES)
        self._n_grey += int((facts["colour"].to_numpy() <= self._grey).sum())

    def usual(self) -> Usual:
        """Of all images that were added."""
        n = int(self._sizes.sum())
        return Usual(int(np.searchsorted(np.cumsum(self._sizes), (n + 1) // 2)) if n else 0, self._n_grey / max(1, n))


def _size(rows: pa.Table) -> np.ndarray:
    sides = (rows[name].to_numpy().astype(np.float64) for name in ("height", "width"))
    return np.minimum(np.sqrt(math.prod(sides)), _SIZES - 1).astype(np.int64)


def judge_quality(
    facts: pa.Table, rows: pa.Table, config: QualityConfig, usual: Usual
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """What is wrong with the images of a shard.

    Args:
        facts: facts about M decoded images.
        rows: index rows of the same images: height, width.
        config: thresholds.
        usual: usual values of the data set.

    Returns:
        Kind -> mask, bool (M,), and the number that was compared, float64 (M,).
    """
    fact = {name: facts[name].to_numpy() for name in facts.column_names if name not in ("thumbnail", "stated")}
    height_M, width_M = (rows[name].to_numpy().astype(np.float64) for name in ("height", "width"))
    short_M, long_M = np.minimum(height_M, width_M), np.maximum(height_M, width_M)
    low_M, high_M, contrast_M = fact["low"] / 255, fact["high"] / 255, fact["contrast"] / 255
    aspect_M, ratio_M = short_M / long_M, _size(rows) / max(1, usual.size)
    factor_M = np.maximum(ratio_M, 1 / np.maximum(ratio_M, 1e-9))
    is_blank_M = contrast_M < config.blank
    top_M, bottom_M = fact["flat_top"].astype(np.float64), fact["flat_bottom"].astype(np.float64)
    flat_M = np.maximum(top_M, bottom_M)
    is_torn_M = _is_filler(fact["fill"]) & (flat_M >= config.torn) & (np.minimum(top_M, bottom_M) < config.torn / 2)
    is_torn_M &= ~is_blank_M
    smooth_M = fact["smoothness"].astype(np.float64)
    return {
        "dark": ((high_M <= config.dark) & ~is_blank_M, high_M),
        "bright": ((low_M >= config.bright) & ~is_blank_M, low_M),
        "blank": (is_blank_M, contrast_M),
        "blurred": ((smooth_M < config.blurred) & (short_M >= _LEAST_SIDE) & ~is_blank_M, smooth_M),
        "low_entropy": ((fact["entropy"] < config.low_entropy) & ~is_blank_M, fact["entropy"].astype(np.float64)),
        "odd_aspect": (aspect_M < config.odd_aspect, aspect_M),
        "odd_size": (factor_M > config.odd_size, ratio_M),
        "grey": ((fact["colour"] <= config.grey) & (usual.grey_fraction < 0.5) & ~is_blank_M, fact["colour"] / 1.0),
        "torn": (is_torn_M, flat_M),
    }


def _is_filler(fill_M: np.ndarray) -> np.ndarray:
    """True for the grey of decoders, with the error of another JPEG."""
    channels = [(fill_M >> shift & 255).astype(np.int64) for shift in (16, 8, 0)]
    return np.all([np.abs(x - 128) <= 3 for x in channels], 0)


def in_words(kind: str, value: float) -> str:
    """The reason for a finding, with the number that was compared."""
    return {
        "dark": f"dark: 99 % of the pixels are at most {value:.2f} bright, of 1",
        "bright": f"bright: 95 % of the pixels are at least {value:.2f} bright, of 1",
        "blank": f"blank: the standard deviation of the brightness is {value:.3f}",
        "blurred": f"blurred: smoothness {value:.3f} (sharp edges have .5, a ramp .25)",
        "low_entropy": f"the histogram of the brightness has {value:.2f} bits of entropy, of 6",
        "odd_aspect": f"the short side is {value:.2f} of the long one",
        "odd_size": f"{value:.2g} times the median size",
        "grey": "grey, most images have colour",
        "torn": f"torn: {100 * value:.0f} % of the rows at one end are of one grey, as where a cut JPEG was decoded",
    }[kind]
