"""Facts about decoded images, taken while the index decodes them: a hash, a thumbnail, brightness, sharpness, …

`check_hygiene` reads them, so that no image is decoded a second time. Each image is reduced to 32 x 32 pixels, and many
are described at once. The facts do not depend on which images are described together.

Perceptual hash: signs of the 64 coefficients of lowest frequency of the cosine transform of the luminance, at 16 x 16
pixels, without the mean (Zauner, 2010: pHash). Smoothness: squared differences of neighbouring pixels, over those of
pixels two apart; 1/4 for a ramp, 1/2 for sharp edges, 1 for noise. Contrast and brightness do not change it.

Shapes: N images, H x W pixels, C channels; S = 32, T = 16 pixels.
"""

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sanitize.artifacts import Part
from sanitize.data.decode import resized

SIDE, THUMB, PATCH = 32, 16, 8  # sides of the canvas, of the thumbnail, of a patch
MAX_SIDE = 256  # sharpness is judged at this many pixels a side; a finer blur matters to no model
ALIKE = 4  # levels within which the pixels of a row are of one colour, after JPEG
_BATCH = 192  # images described at once
_LUMINANCE = (77, 150, 29)  # of 256 (ITU-R 601)
_LEVELS = np.arange(64.0)
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
    """The pixels that facts are taken of, a few kilobytes for an image of any size.

    Attributes:
        canvas_SSC, details_SSC: see `canvas` and `details`; the same array for an image of that size.
        flat: rows of one colour, as `_flat` returns them; None without, and for an image of that size.
    """

    canvas_SSC: np.ndarray
    details_SSC: np.ndarray
    flat: tuple[float, float, int] | None


def reduced(pixels_HWC: np.ndarray) -> ReducedImage:
    """The part of a decoded image that `ImageFacts` reads."""
    canvas_SSC = canvas(pixels_HWC)
    if canvas_SSC is pixels_HWC:
        return ReducedImage(pixels_HWC, pixels_HWC, None)
    return ReducedImage(canvas_SSC, details(pixels_HWC), _flat(canvas_SSC, pixels_HWC))


def _flat(canvas_SSC: np.ndarray, pixels_HWC: np.ndarray) -> tuple[float, float, int] | None:
    """Rows of one colour at top and bottom, and the colour: looked for on the small image first; None without."""
    top = flat_rows(pixels_HWC) if _is_flat(canvas_SSC[0]) else 0.0
    bottom = flat_rows(pixels_HWC[::-1]) if _is_flat(canvas_SSC[-1]) else 0.0
    if not (top or bottom):
        return None
    colour_C = pixels_HWC[0 if top > bottom else -1].mean(0).round().astype(int).tolist()
    red, green, blue = colour_C if len(colour_C) == 3 else 3 * colour_C
    return top, bottom, red << 16 | green << 8 | blue


class ImageFacts:
    """Facts about the images of one shard: one row for each image that was added; see `SCHEMA`.

    position: place of the sample in the shard.
    hash: perceptual hash; thumbnail: luminance, 16 x 16 bytes; red, green, blue: means.
    low, high: luminance that 5 % of the pixels do not exceed, and 99 %. contrast: standard deviation of the luminance.
    entropy: entropy of the histogram of the luminance, in bits. smoothness: see above; 1 for an image of one colour.
    colour: largest difference between two channels of a pixel.
    flat_top, flat_bottom: share of rows at that end that are of one colour, all of them of the same. fill: the colour
    of the larger end, 0xRRGGBB; 0 without.
    stated: hash that the metadata state where the image has another one, "" where it has this one; null where they
    state none that can be read, and where `IndexConfig.verify` is off.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, np.ndarray, np.ndarray]] = []  # position, canvas, details
        self._flat: dict[int, tuple[float, float, int]] = {}  # by position: top, bottom, fill
        self._columns: list[dict[str, np.ndarray]] = []
        self._stated: dict[int, str | None] = {}

    def add(self, position: int, image: np.ndarray | ReducedImage) -> None:
        """Add a decoded image, uint8 (H, W, C) with one or three channels, or what `reduced` keeps of it."""
        image = reduced(image) if isinstance(image, np.ndarray) else image
        if image.flat is not None:
            self._flat[position] = image.flat
        self._pending.append((position, image.canvas_SSC, image.details_SSC))
        if len(self._pending) >= _BATCH:
            self._describe()

    def add_stated(self, position: int, stated: str | None) -> None:
        """Add what `differing_hash` returns for the sample."""
        self._stated[position] = stated

    def table(self) -> pa.Table:
        """One row an image, in the order of positions."""
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
        arrays.append(pa.array([self._stated.get(int(i)) for i in positions_N], pa.string()))
        return pa.table(arrays, schema=SCHEMA)

    def _describe(self) -> None:
        if not self._pending:
            return
        positions, canvases, patches = zip(*self._pending, strict=True)
        self._pending.clear()
        canvas_NSSC = np.stack(canvases)
        is_same = all(a is b for a, b in zip(canvases, patches, strict=True))
        details_NSSC = canvas_NSSC if is_same else np.stack(patches)
        facts = describe(canvas_NSSC, details_NSSC)
        last_N2T = facts["thumbnail"].reshape(-1, THUMB, THUMB)[:, [0, -1]]
        for i in np.flatnonzero((np.ptp(last_N2T, axis=2) <= ALIKE).any(1)).tolist():
            if canvases[i] is patches[i] and (flat := _flat(canvases[i], canvases[i])):  # not looked at before
                self._flat[positions[i]] = flat
        tops, bottoms, fills = zip(*(self._flat.get(position, (0.0, 0.0, 0)) for position in positions), strict=True)
        facts |= {"flat_top": np.array(tops, np.float32), "flat_bottom": np.array(bottoms, np.float32)}
        facts |= {"fill": np.array(fills, np.uint32), "position": np.array(positions)}
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


def canvas(pixels_HWC: np.ndarray) -> np.ndarray:
    """The image at 32 x 32 pixels, uint8 (32, 32, C)."""
    if pixels_HWC.shape[:2] == (SIDE, SIDE):
        return pixels_HWC
    return resized(torch.from_numpy(pixels_HWC).permute(2, 0, 1), (SIDE, SIDE)).permute(1, 2, 0).numpy()


def details(pixels_HWC: np.ndarray) -> np.ndarray:
    """16 patches of 8 x 8 pixels from all over the image, uint8 (32, 32, C); pixels are left out above `MAX_SIDE`."""
    height, width = pixels_HWC.shape[:2]
    step = -(-max(height, width) // MAX_SIDE)
    return pixels_HWC.take(_patches(height, step), 0).take(_patches(width, step), 1)


@lru_cache(1024)
def _patches(side: int, step: int) -> np.ndarray:
    """Indices of four runs of 8 pixels, `step` apart."""
    starts = np.linspace(0, max(0, side // step - PATCH), SIDE // PATCH).astype(np.int64)
    return np.minimum(step * (starts[:, None] + np.arange(PATCH)).ravel(), side - 1)


def _is_flat(row_SC: np.ndarray) -> bool:
    """True for one colour; a few pixels are compared faster in Python."""
    values, channels = row_SC.tobytes(), row_SC.shape[1]
    return all(max(values[c::channels]) - min(values[c::channels]) <= ALIKE for c in range(channels))


def flat_rows(pixels_HWC: np.ndarray) -> float:
    """Share of rows at the top that are of one colour, all of them of the same; in [0, 1]."""
    first_C = pixels_HWC[0, 0].astype(np.int16)
    high_C, low_C = first_C, first_C
    for row, row_WC in enumerate(pixels_HWC):
        high_C, low_C = np.maximum(high_C, row_WC.max(0)), np.minimum(low_C, row_WC.min(0))
        if (high_C - low_C > ALIKE).any():
            return row / len(pixels_HWC)
    return 1.0


def describe(canvas_NSSC: np.ndarray, details_NSSC: np.ndarray) -> dict[str, np.ndarray]:
    """Facts about images, uint8: name of a column -> values of N images; without the flat rows at both ends."""
    n = len(canvas_NSSC)
    grey_NSS, (red_N, green_N, blue_N) = _luminance(canvas_NSSC)
    detail_NSS = grey_NSS if details_NSSC is canvas_NSSC else _luminance(details_NSSC)[0]
    thumbs_NTT = _halved(grey_NSS)
    levels_NP = (grey_NSS[:, :, ::2] >> 2).reshape(n, -1) + 64 * np.arange(n, dtype=np.int32)[:, None]
    counts_NV = np.bincount(levels_NP.ravel(), minlength=64 * n).reshape(n, 64).astype(np.float64)
    pixels = levels_NP.shape[1]
    below_NV = np.cumsum(counts_NV, 1)
    mean_N, squares_N = counts_NV @ _LEVELS / pixels, counts_NV @ _LEVELS**2 / pixels
    share_NV = counts_NV / pixels
    entropy_N = -np.einsum("nv,nv->n", share_NV, np.log2(np.where(counts_NV > 0, share_NV, 1)))
    return {
        "hash": hashes(thumbs_NTT),
        "thumbnail": thumbs_NTT.reshape(n, -1),
        "red": red_N,
        "green": green_N,
        "blue": blue_N,
        "low": (4 * (below_NV * 20 < pixels).sum(1)).astype(np.uint8),
        "high": (4 * (below_NV * 100 < pixels * 99).sum(1) + 3).astype(np.uint8),
        "contrast": (4 * np.sqrt(np.maximum(0, squares_N - mean_N**2))).astype(np.float32),
        "entropy": entropy_N.round(3).astype(np.float32),
        "smoothness": _smoothness(detail_NSS),
        "colour": _colour(canvas_NSSC),
    }


def _luminance(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Luminance, uint8 (N, H, W), and the means of red, green and blue, uint8 (N,) each."""
    n, height, width, channels = pixels_NHWC.shape
    wide = [pixels_NHWC[..., c].astype(np.uint16) for c in range(channels)]
    means = [(x_NHW.reshape(n, -1).sum(1, dtype=np.uint32) // (height * width)).astype(np.uint8) for x_NHW in wide]
    if channels == 1:
        return pixels_NHWC[..., 0], means * 3
    for x_NHW, weight in zip(wide, _LUMINANCE, strict=True):
        x_NHW *= weight
    wide[0] += wide[1]
    wide[0] += wide[2]
    return (wide[0] >> 8).astype(np.uint8), means


def _halved(grey_NSS: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, uint8 (N, 16, 16)."""
    wide_NTS = grey_NSS[:, ::2].astype(np.uint16) + grey_NSS[:, 1::2]
    return ((wide_NTS[..., ::2] + wide_NTS[..., 1::2]) >> 2).astype(np.uint8)


def _cosines() -> np.ndarray:
    """Cosine transform of 16 numbers, 9 lowest frequencies, in whole numbers, (9, 16)."""
    k, x = np.arange(9)[:, None], np.arange(THUMB)
    return np.round(4096 * np.cos(np.pi * k * (2 * x + 1) / (2 * THUMB)))


def hashes(thumbs_NTT: np.ndarray) -> np.ndarray:
    """Perceptual hash of each thumbnail, uint64 (N,); 0 for one of one colour."""
    coefficients_NKK = _COSINES @ thumbs_NTT.astype(np.float64) @ _COSINES.T  # whole numbers: exact in any order
    bits_NB = coefficients_NKK.reshape(len(thumbs_NTT), -1)[:, _LOWEST] > 0.5
    return np.ascontiguousarray(np.packbits(bits_NB, axis=1)).view(">u8")[:, 0].astype(np.uint64)


_COSINES = _cosines()
# The 64 lowest frequencies without the mean, in an order in which neighbouring bits have little in common.
_ORDER = sorted(range(1, 81), key=lambda i: ((i // 9) ** 2 + (i % 9) ** 2, i))[:64]
_LOWEST = np.array(_ORDER)[np.arange(64) * 37 % 64]


def _smoothness(detail_NSS: np.ndarray) -> np.ndarray:
    """Squared differences one pixel apart over those two apart, float32 (N,), within patches of 8 x 8 pixels."""
    n = len(detail_NSS)
    near_N, far_N = np.zeros(n, np.float32), np.zeros(n, np.float32)
    wide_NSS = detail_NSS.astype(np.float32)
    for x_NSS in (wide_NSS[:, ::4], wide_NSS[:, :, ::4].transpose(0, 2, 1)):  # more lines say no more
        x_NPL = np.ascontiguousarray(x_NSS).reshape(n, -1, PATCH)
        step_NPL = x_NPL[..., 1:] - x_NPL[..., :-1]
        near_N += (_squares(step_NPL[..., 1:]) + _squares(step_NPL[..., :-1])) / 2
        far_N += _squares(step_NPL[..., 1:] + step_NPL[..., :-1])
    return np.where(far_N > 0, near_N / np.maximum(far_N, 1), np.float32(1))


def _squares(x_NPL: np.ndarray) -> np.ndarray:
    """Sums of squares; not exact above 2^24, but the order of summation is always the same."""
    flat_NP = x_NPL.reshape(len(x_NPL), -1)
    return np.einsum("np,np->n", flat_NP, flat_NP)


def _colour(pixels_NHWC: np.ndarray) -> np.ndarray:
    """Largest difference between two channels of a pixel, of every fourth pixel, uint8 (N,)."""
    n = len(pixels_NHWC)
    if pixels_NHWC.shape[3] == 1:
        return np.zeros(n, np.uint8)
    red, green, blue = (pixels_NHWC[:, ::2, ::2, c].reshape(n, -1) for c in range(3))
    most, least = np.maximum(red, green), np.minimum(red, green)
    return (np.maximum(most, blue) - np.minimum(least, blue)).max(1)
