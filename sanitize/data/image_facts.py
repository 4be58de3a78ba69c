"""Facts about decoded images, taken while the index decodes them: a hash, a thumbnail, brightness, sharpness, …

`check_hygiene` reads them, so that no image is decoded a second time. Each image is reduced to 32 x 32 pixels, and many
are described at once, in whole numbers. The facts do not depend on which images are described together.

A pixel of the reduced image is the mean of 3 x 3 pixels, spread evenly over its part of the image; a slight blur
(1, 6, 1) makes up for the pixels between them. Averages of all pixels take longer and find no more copies.

Perceptual hash: signs of the 64 coefficients of lowest frequency of the cosine transform of the luminance, at 16 x 16
pixels, without the mean (Zauner, 2010: pHash). Smoothness: squared differences of neighbouring pixels, over those of
pixels two apart; 1/4 for a ramp, 1/2 for sharp edges, 1 for noise. Contrast and brightness do not change it.

Shapes: N images, H x W pixels, C channels; S = 32, T = 16 pixels.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sanitize.artifacts import Part

FACTS_VERSION = 2  # raised when images get other facts; part of the recipe of an index with facts
SIDE, THUMB, PATCH = 32, 16, 8  # sides of the reduced image, of the thumbnail, of a patch
MAX_SIDE = 256  # sharpness is judged at this many pixels a side; a finer blur matters to no model
ALIKE = 4  # levels within which the pixels of a row are of one colour, after JPEG
_EIGHTHS = (4, 8, 2, 6, 1, 3, 5, 7)  # of a row, in the order in which they are looked at
_TAPS = 3  # rows and columns of the image for one of the reduced image
_LARGE = 16 * MAX_SIDE  # pixels a side, above which most rows and columns are left out at once
_WAITING_BYTES = 1 << 20  # of images that wait: the same few calls one after another stay in the caches
_KEPT_BYTES = 5 << 20  # of small and reduced images that wait to be described, for the same reason
_BATCH = 96  # images described by one call; larger arrays go back to the system and come again page by page
_LUMINANCE = (77, 150, 29)  # of 256 (ITU-R 601)
_BINS = 64
_COUNTS = np.arange(SIDE * SIDE // 2 + 1)
_COUNT_BITS = _COUNTS * np.log2(np.maximum(_COUNTS, 1))
_POWERS = np.arange(_BINS)[:, None] ** np.array([1.0, 2.0])  # of the level, (64, 2)
_PICTURE = {
    "hash": pa.uint64(),
    "thumbnail": pa.binary(THUMB * THUMB),
    "red": pa.uint8(),
    "green": pa.uint8(),
    "blue": pa.uint8(),
    "low": pa.uint8(),
    "high": pa.uint8(),
    "contrast": pa.float32(),
    "entropy": pa.float32(),
    "smoothness": pa.float32(),
    "colour": pa.uint8(),
    "flat_top": pa.float32(),
    "flat_bottom": pa.float32(),
    "fill": pa.uint32(),
}
SCHEMA = pa.schema({"position": pa.int64(), **_PICTURE, "stated": pa.string()})


def facts_name(shard: str) -> str:
    """Name of the file with the facts of `shard` in a data set."""
    return f"facts/{shard}.parquet"


class ReducedImage(NamedTuple):
    """What the facts need of an image that is not 32 x 32: a few kilobytes of an image of any size.

    Attributes:
        sums_SX: sums of 3 x 3 pixels for each pixel of the reduced image, uint16 (32, C * 32).
        details_SX: 16 patches of 8 x 8 pixels from all over the image, uint8 (32, C * 32). Above `MAX_SIDE` the pixels
            of a patch are not neighbours.
        flat: rows of one colour at top and bottom, as shares, and the colour; None without.
    """

    sums_SX: np.ndarray
    details_SX: np.ndarray
    flat: tuple[float, float, int] | None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.sums_SX.nbytes + self.details_SX.nbytes


class ImageFacts:
    """Facts about the images of one shard: one row for each image that was added; see `SCHEMA`.

    position: place of the sample in the shard.
    hash: perceptual hash; thumbnail: luminance, 16 x 16 bytes; red, green, blue: means.
    low, high: luminance that 5 % of the pixels do not exceed, and 99 %. contrast: standard deviation of the luminance.
    entropy: entropy of the histogram of the luminance, in bits. smoothness: see above; 1 for an image of one colour.
    colour: largest difference between two channels of a pixel.
    flat_top, flat_bottom: share of rows at that end that are of one colour, all of them of the same. fill: the colour
    of the larger end, 0xRRGGBB; 0 without.
    stated: hash that is stated where the image has another one, or the reason why a table states none; "" where the
    image has the stated one; null where the metadata state none, and where `IndexConfig.verify` is off.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, np.ndarray | ReducedImage]] = []  # position, image
        self._small: list[tuple[int, np.ndarray]] = []  # images of 32 x 32 pixels
        self._reduced: list[tuple[int, ReducedImage]] = []  # images of other sizes
        self._waiting_bytes = self._kept_bytes = 0
        self._columns: list[dict[str, np.ndarray]] = []
        self._stated: dict[int, str | None] = {}

    def add(self, position: int, image: np.ndarray | ReducedImage) -> None:
        """Add a decoded image, uint8 (H, W, C) of one or three channels, or what `reduced` keeps of it."""
        self._waiting.append((position, image))
        self._waiting_bytes += image.nbytes
        if self._waiting_bytes > _WAITING_BYTES:
            self._reduce()
            if self._kept_bytes > _KEPT_BYTES:
                self._describe()

    def _reduce(self) -> None:
        """Reduce the images that wait."""
        for position, image in self._waiting:
            kept = image if isinstance(image, ReducedImage) else reduced(image)
            if isinstance(kept, ReducedImage):
                self._reduced.append((position, kept))
            else:
                self._small.append((position, kept))
            self._kept_bytes += kept.nbytes
        self._waiting.clear()
        self._waiting_bytes = 0

    def _describe(self) -> None:
        """Describe the small and the reduced images."""
        for start in range(0, len(self._small), _BATCH):
            self._describe_small(self._small[start : start + _BATCH])
        for start in range(0, len(self._reduced), _BATCH):
            self._describe_reduced(self._reduced[start : start + _BATCH])
        self._small.clear()
        self._reduced.clear()
        self._kept_bytes = 0

    @property
    def n_stated(self) -> int:
        """Number of samples for which a hash is stated, or a reason why a table states none."""
        return sum(stated is not None for stated in self._stated.values())

    def add_stated(self, position: int, stated: str | None) -> None:
        """Add what `StatedHashes.differing` returns for the sample."""
        self._stated[position] = stated

    def table(self) -> pa.Table:
        """One row an image, in the order of positions."""
        self._reduce()
        self._describe()
        columns = {name: np.concatenate([c[name] for c in self._columns] or [np.empty(0)]) for name in _names()}
        described_N = columns.pop("position").astype(np.int64)
        positions_N = np.union1d(described_N, np.array(sorted(self._stated), np.int64))
        at_N = np.searchsorted(positions_N, described_N)
        is_missing_N = np.ones(len(positions_N), bool)
        is_missing_N[at_N] = False
        arrays = [pa.array(positions_N)]
        for name, kind in _PICTURE.items():
            arrays.append(_column(columns[name], kind, at_N, is_missing_N))
        stated = [self._stated.get(i) for i in positions_N.tolist()] if self._stated else None
        arrays.append(pa.nulls(len(positions_N), pa.string()) if stated is None else pa.array(stated, pa.string()))
        return pa.table(arrays, schema=SCHEMA)

    def _describe_small(self, batch: Sequence[tuple[int, np.ndarray]]) -> None:
        positions, images = zip(*batch, strict=True)
        canvas_NSSC = np.concatenate(images).reshape(len(images), SIDE, SIDE, -1)
        facts, grey_NSS = describe([canvas_NSSC[..., c].astype(np.uint16) for c in range(canvas_NSSC.shape[3])])
        may_be_flat_N = (np.ptp(grey_NSS[:, [0, -1]], axis=2) <= ALIKE + 1).any(1)  # 1: rounding
        flat = {i: _flat(images[i]) for i in np.flatnonzero(may_be_flat_N).tolist()}
        self._keep(positions, facts, [flat.get(i) for i in range(len(images))])

    def _describe_reduced(self, batch: Sequence[tuple[int, ReducedImage]]) -> None:
        positions, images = zip(*batch, strict=True)
        sums, details, flat = zip(*images, strict=True)
        sums_NSX, details_NSX = (np.concatenate(parts).reshape(len(images), SIDE, -1) for parts in (sums, details))
        self._keep(positions, describe(_means(sums_NSX), _channels(details_NSX))[0], flat)

    def _keep(
        self, positions: Sequence[int], facts: dict[str, np.ndarray], flat: Sequence[tuple[float, float, int] | None]
    ) -> None:
        ends_N3 = np.array([ends or (0, 0, 0) for ends in flat])
        top_N, bottom_N, fill_N = ends_N3.T
        facts |= {"flat_top": top_N, "flat_bottom": bottom_N, "fill": fill_N, "position": np.array(positions)}
        self._columns.append(facts)


def write_facts(part: Part, shard: str, facts: ImageFacts) -> None:
    """Write the facts of one shard beside its index rows."""
    sink = io.BytesIO()
    pq.write_table(facts.table(), sink, compression="zstd", use_dictionary=False)
    part.write(facts_name(shard), sink.getvalue())


def _names() -> list[str]:
    return ["position", *_PICTURE]


def _column(values: np.ndarray, kind: pa.DataType, at: np.ndarray, is_missing: np.ndarray) -> pa.Array:
    """Column of all rows with the values of some of them; the others are null."""
    order = np.argsort(at, kind="stable")
    if pa.types.is_fixed_size_binary(kind):
        whole = np.zeros((len(is_missing), kind.byte_width), np.uint8)
        whole[at[order]] = values.reshape(-1, kind.byte_width)[order]
        mask = pa.py_buffer(np.packbits(~is_missing, bitorder="little").tobytes())
        return pa.Array.from_buffers(kind, len(whole), [mask, pa.py_buffer(whole.tobytes())], int(is_missing.sum()))
    whole = np.zeros(len(is_missing), kind.to_pandas_dtype())
    whole[at[order]] = values[order]
    return pa.array(whole, kind, mask=is_missing)


def reduced(pixels_HWC: np.ndarray) -> np.ndarray | ReducedImage:
    """The part of a decoded image, uint8, that `ImageFacts` reads: an image of 32 x 32 pixels as it is."""
    if pixels_HWC.shape[:2] == (SIDE, SIDE):
        return pixels_HWC
    flat = _flat(pixels_HWC)
    if max(pixels_HWC.shape) > _LARGE:  # three rows of a picture of 1 x 1,000,000 pixels would be a bomb
        step = -(-max(pixels_HWC.shape) // MAX_SIDE)
        pixels_HWC = pixels_HWC[::step, ::step]
    height, width, channels = pixels_HWC.shape
    rows, (left, middle, right), patch_columns = _places(height, width, channels)
    picked = pixels_HWC.reshape(height, width * channels).take(rows, 0)
    wide_SX = np.add.reduce(picked[: SIDE * _TAPS].reshape(_TAPS, SIDE, -1), axis=0, dtype=np.uint16)
    sums_SX = wide_SX.take(left, 1)
    sums_SX += wide_SX.take(middle, 1)
    sums_SX += wide_SX.take(right, 1)
    return ReducedImage(sums_SX, picked[SIDE * _TAPS :].take(patch_columns, 1), flat)


def _flat(pixels_HWC: np.ndarray) -> tuple[float, float, int] | None:
    """Rows of one colour at top and bottom, and the colour at the longer end, 0xRRGGBB; None without."""
    top = flat_rows(pixels_HWC)
    bottom = flat_rows(pixels_HWC[::-1])
    if not (top or bottom):
        return None
    colour_C = pixels_HWC[0 if top > bottom else -1].mean(0).round().astype(int).tolist()
    red, green, blue = colour_C if len(colour_C) == 3 else 3 * colour_C
    return top, bottom, red << 16 | green << 8 | blue


@lru_cache(1024)
def _places(height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that `reduced` takes: the first of three for each of the reduced image, all second ones, all third ones,
    those of the patches; columns in the same order, with channels between, (3 * C * 32,); columns of the patches."""
    step = -(-max(height, width) // MAX_SIDE)
    rows = np.concatenate([_taps(height), _patches(height, step)])
    columns_TCS = channels * _taps(width).reshape(_TAPS, 1, SIDE) + np.arange(channels)[:, None]
    patch_columns_CS = channels * _patches(width, step) + np.arange(channels)[:, None]
    return rows, columns_TCS.reshape(_TAPS, -1), patch_columns_CS.ravel()


def _taps(side: int) -> np.ndarray:
    """Indices of three rows for each of 32, evenly spread; first those that are the first of three."""
    n = SIDE * _TAPS
    spread = (2 * np.arange(n) + 1) * side // (2 * n)
    return spread.reshape(SIDE, _TAPS).T.ravel()


def _patches(side: int, step: int) -> np.ndarray:
    """Indices of four runs of 8 pixels, `step` apart."""
    starts = np.linspace(0, max(0, side // step - PATCH), SIDE // PATCH).astype(np.int64)
    return np.minimum(step * (starts[:, None] + np.arange(PATCH)).ravel(), side - 1)


def _means(sums_NSX: np.ndarray) -> list[np.ndarray]:
    """Channels of reduced images, uint16 (N, 32, 32) each, from the sums of `reduced`."""
    sums_NSX += _TAPS**2 // 2
    sums_NSX //= _TAPS**2
    return _channels(sums_NSX)


def _channels(x_NSX: np.ndarray) -> list[np.ndarray]:
    """Channels that lie side by side in each row, uint16 (N, 32, 32) each."""
    x_NSCS = x_NSX.reshape(len(x_NSX), SIDE, -1, SIDE)
    return [x_NSCS[:, :, c].astype(np.uint16) for c in range(x_NSCS.shape[2])]


def flat_rows(pixels_HWC: np.ndarray) -> float:
    """Share of rows at the top that are of one colour, all of them of the same; in [0, 1]."""
    first, last = pixels_HWC.item(0, 0, 0), pixels_HWC.shape[1] - 1
    for i in _EIGHTHS:  # most rows are told by one or two pixels, and single ones are fetched faster than a row
        if abs(pixels_HWC.item(0, last * i // 8, 0) - first) > ALIKE:
            return 0.0
    n_flat, most = 0, _near_rows(pixels_HWC)
    size = most
    high_C = low_C = pixels_HWC[0, 0]
    while n_flat < most:  # most often once; else half of the rows in question at a time
        edge_XC = pixels_HWC[n_flat : n_flat + size]
        block_high_C = np.maximum(high_C, edge_XC.max(0).max(0))
        block_low_C = np.minimum(low_C, edge_XC.min(0).min(0))
        if (block_high_C - block_low_C).max() <= ALIKE:
            n_flat, high_C, low_C = n_flat + size, block_high_C, block_low_C
        else:
            most = n_flat + size - 1
        size = -(-(most - n_flat) // 2)
    return n_flat / len(pixels_HWC)


def _near_rows(pixels_HWC: np.ndarray) -> int:
    """Number of rows at the top whose pixels are near the first one; at least that of the rows of one colour."""
    n, start, step = len(pixels_HWC), 0, 8
    part_HWC = pixels_HWC[:, :1024]  # for the memory; the number may be too large
    rows_HX = part_HWC.reshape(n, -1)
    lowest_X = np.frombuffer((part_HWC[0, 0] - np.uint8(ALIKE)).tobytes() * part_HWC.shape[1], np.uint8)
    while start < n:
        above_RX = rows_HX[start : start + step] - lowest_X  # wraps: one comparison for both limits
        is_far_R = (above_RX > 2 * ALIKE).any(1)
        if is_far_R.any():
            return start + int(is_far_R.argmax())
        start, step = start + step, min(2 * step, 1024)
    return n


def describe(
    channels: Sequence[np.ndarray], details: Sequence[np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Facts about N images, without the flat rows at both ends; and their luminance, uint8 (N, 32, 32).

    Args:
        channels: images of 32 x 32 pixels, uint16 (N, 32, 32) for each channel; overwritten.
        details: patches of the images before they were reduced, in the same form; None where they were not reduced.

    Returns:
        Name of a column -> values of N images; and the luminance.
    """
    n = len(channels[0])
    red_N, green_N, blue_N = channels if len(channels) == 3 else 3 * [channels[0]]
    facts = dict(zip(("red", "green", "blue"), map(_mean, (red_N, green_N, blue_N)), strict=True))
    facts["colour"] = _colour(channels, averaged=details is not None)
    grey_NSS = _luminance(channels)
    thumbs_NTT = _halved(grey_NSS if details is None else _blurred(grey_NSS))
    facts |= {"hash": hashes(thumbs_NTT), "thumbnail": thumbs_NTT.reshape(n, -1)}
    facts["smoothness"] = _smoothness(grey_NSS if details is None else _luminance(details))
    return facts | _histograms(grey_NSS), grey_NSS


def _mean(x_NSS: np.ndarray) -> np.ndarray:
    """Mean of one channel, uint8 (N,)."""
    n = len(x_NSS)
    # Four sums of 256 pixels by one addition: 256 * 255 fits 16 bits.
    four_N4 = np.add.reduce(x_NSS.reshape(n, -1).view(np.uint64), axis=1).view(np.uint16).reshape(n, 4)
    return (np.add.reduce(four_N4, axis=1, dtype=np.uint32) // (SIDE * SIDE)).astype(np.uint8)


def _colour(channels: Sequence[np.ndarray], averaged: bool) -> np.ndarray:
    """Largest difference between two channels of a pixel, of every fourth pixel, uint8 (N,).

    Args:
        channels: images, uint16 (N, 32, 32) for each channel.
        averaged: True takes means of 2 x 2 pixels instead, where pixels are noisier than those of the image.
    """
    n = len(channels[0])
    if len(channels) == 1:
        return np.zeros(n, np.uint8)
    if averaged:
        wide = [(x_NSS[:, ::2] + x_NSS[:, 1::2]) >> 1 for x_NSS in channels]
        channels = [(x_NTS[..., ::2] + x_NTS[..., 1::2]) >> 1 for x_NTS in wide]
    red, green, blue = channels
    spread = np.maximum(red, green)
    np.maximum(spread, blue, out=spread)
    least = np.minimum(red, green)
    np.minimum(least, blue, out=least)
    spread -= least
    if not averaged:
        spread = spread[:, ::2, ::2]
    return spread.reshape(n, -1).max(1).astype(np.uint8)


def _luminance(channels: Sequence[np.ndarray]) -> np.ndarray:
    """Luminance, uint8 (N, 32, 32); the channels are overwritten."""
    if len(channels) == 1:
        return channels[0].astype(np.uint8)
    for x_NSS, weight in zip(channels, _LUMINANCE, strict=True):
        x_NSS *= weight
    whole_NSS = channels[0]
    whole_NSS += channels[1]
    whole_NSS += channels[2]
    whole_NSS >>= 8
    return whole_NSS.astype(np.uint8)


def _blurred(grey_NSS: np.ndarray) -> np.ndarray:
    """The images after a blur of (1, 6, 1) in both directions, uint8."""
    x_NSS = grey_NSS.astype(np.uint16)
    for axis, step in ((1, SIDE), (2, 1)):
        blurred_NSS = 6 * x_NSS
        blurred_X, x_X = blurred_NSS.reshape(-1), x_NSS.reshape(-1)
        blurred_X[step:] += x_X[:-step]  # all images in one piece; at their edges wrong, until the next lines
        blurred_X[:-step] += x_X[step:]
        to_SNS, from_SNS = np.moveaxis(blurred_NSS, axis, 0), np.moveaxis(x_NSS, axis, 0)
        for edge, inner in ((0, 1), (-1, -2)):
            to_SNS[edge] = 7 * from_SNS[edge] + from_SNS[inner]
        x_NSS = blurred_NSS
    x_NSS += 32
    x_NSS >>= 6
    return x_NSS.astype(np.uint8)


def _halved(grey_NSS: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, uint8 (N, 16, 16)."""
    wide_NTS = grey_NSS[:, ::2].astype(np.uint16) + grey_NSS[:, 1::2]
    return ((wide_NTS[..., ::2] + wide_NTS[..., 1::2]) >> 2).astype(np.uint8)


def _histograms(grey_NSS: np.ndarray) -> dict[str, np.ndarray]:
    """Facts from the histogram of the luminance, of every second pixel in 64 bins."""
    n = len(grey_NSS)
    pixels = SIDE * SIDE // 2
    pairs_NP = grey_NSS.reshape(n, -1).view("<u2")
    bins_NP = ((pairs_NP & 255) >> 2) + _BINS * np.arange(n, dtype=np.uint16)[:, None]
    counts_NV = np.bincount(bins_NP.reshape(-1), minlength=_BINS * n).reshape(n, _BINS)
    below_NV = np.cumsum(counts_NV, 1)
    mean_N, squares_N = (counts_NV.astype(np.float64) @ _POWERS).T / pixels  # whole numbers: exact in any order
    entropy_N = np.log2(pixels) - _COUNT_BITS.take(counts_NV).sum(1) / pixels
    return {
        "low": 4 * _count(below_NV <= pixels // 20),
        "high": 4 * _count(below_NV <= pixels * 99 // 100) + np.uint8(3),
        "contrast": (4 * np.sqrt(np.maximum(0, squares_N - mean_N**2))).astype(np.float32),
        "entropy": entropy_N.round(3).astype(np.float32),
    }


def _count(is_true_NV: np.ndarray) -> np.ndarray:
    """How many are true, uint8 (N,)."""
    return np.add.reduce(is_true_NV.view(np.uint8), axis=1, dtype=np.uint8)


def _cosines() -> np.ndarray:
    """Cosine transform of 16 numbers, 9 lowest frequencies, in whole numbers, (9, 16)."""
    k, x = np.arange(9)[:, None], np.arange(THUMB)
    return np.round(4096 * np.cos(np.pi * k * (2 * x + 1) / (2 * THUMB)))


def hashes(thumbs_NTT: np.ndarray) -> np.ndarray:
    """Perceptual hash of each thumbnail, uint64 (N,); 0 for one of one colour."""
    n = len(thumbs_NTT)
    rows_NTK = (thumbs_NTT.reshape(-1, THUMB).astype(np.float64) @ _COSINES.T).reshape(n, THUMB, -1)
    coefficients_NKK = _COSINES @ rows_NTK  # whole numbers: exact in any order
    bits_NB = coefficients_NKK.reshape(n, -1).take(_LOWEST, 1) > 0.5
    return np.ascontiguousarray(np.packbits(bits_NB, axis=1)).view(">u8")[:, 0].astype(np.uint64)


_COSINES = _cosines()
# The 64 lowest frequencies without the mean, in an order in which neighbouring bits have little in common.
_ORDER = sorted(range(1, 81), key=lambda i: ((i // 9) ** 2 + (i % 9) ** 2, i))[:64]
_LOWEST = np.array(_ORDER)[np.arange(64) * 37 % 64]


def _smoothness(detail_NSS: np.ndarray) -> np.ndarray:
    """Squared differences one pixel apart over those two apart, float32 (N,), within patches of 8 x 8 pixels.

    With d the differences of neighbours, those two apart are sums of two d: (d + d')^2 = d^2 + 2 d d' + d'^2. All sums
    are whole numbers below 2^24, exact in float32 in any order.
    """
    n = len(detail_NSS)
    sums_NX = np.zeros((n, 2))
    products_N = np.zeros(n)
    for x_NSS in (detail_NSS[:, ::4], detail_NSS[:, :, ::4].transpose(0, 2, 1)):  # more lines say no more
        x_NP = x_NSS.astype(np.float32).reshape(n, -1)
        step_NP = x_NP[:, 1:] - x_NP[:, :-1]
        step_NP[:, PATCH - 1 :: PATCH] = 0  # from one patch to the next
        products_N += np.einsum("np,np->n", step_NP[:, 1:], step_NP[:, :-1])
        step_NP *= step_NP
        sums_NX += step_NP @ _ALL_AND_ONCE
    squares_N, once_N = sums_NX.T
    near_N, far_N = squares_N - once_N / 2, 2 * squares_N - once_N + 2 * products_N
    return np.where(far_N > 0, near_N / np.maximum(far_N, 1), 1).astype(np.float32)


# Weights of squared differences: in the sum of all; in that of the first and last ones of each patch.
_ALL_AND_ONCE = np.ones((SIDE * PATCH - 1, 2), np.float32)
_ALL_AND_ONCE[:, 1] = np.isin(np.arange(SIDE * PATCH - 1) % PATCH, (0, PATCH - 2))
