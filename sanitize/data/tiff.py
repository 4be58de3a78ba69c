"""TIFF files for Pillow, with nothing in them but what the pixels of the first image need.

Pillow reads all tags, follows the chain of directories (pages, thumbnails, Exif), and makes a Python object for each
strip; libtiff reads as many bytes for a strip as a tag says. So all of it is judged here first, and Pillow is given a
copy with another directory: the tags below of the first image, and no next one.
"""

import struct
from typing import NamedTuple

import numpy as np

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_STRIPS, _ROWS, _STRIP_BYTES, _PLANAR = 273, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
# Also photometric interpretation, fill order, orientation, planar configuration, predictor, colour map, extra samples,
# sample format, JPEG tables; coefficients, subsampling, and black and white of YCbCr.
_KEPT = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, 262, 266, _STRIPS, 274, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR, 317, 320}
_KEPT |= {_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, 338, 339, 347, 529, 530, 531, 532}
_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    16: 8,
    17: 8,
}  # of a type, in bytes
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
_RAW, _JPEG = 1, 7
# Also the three of CCITT, LZW, both of deflate, PackBits. libtiff does not limit the memory of the others, or their
# streams may contain more pixels than the tags say.
_READ = {_RAW, 2, 3, 4, 5, _JPEG, 8, 32773, 32946}


class BadTiff(ValueError):
    """The file is not read; the message is the reason."""


class _Layout(NamedTuple):
    """Byte order (of struct), and formats of offsets, numbers of entries, and entries, in classic or in big TIFF."""

    order: str
    offset: str
    number: str
    entry: str


def only_pixels(data: bytes, max_parts: int, max_pixels: int, max_scan_pixels: int) -> bytes:
    """The same file with a directory of the tags that pixels need.

    Args:
        data: TIFF file.
        max_parts: largest number of tags, and of strips or tiles.
        max_pixels: number of pixels, tiles at the border counted whole.
        max_scan_pixels: number of pixels in all scans of strips or tiles that are JPEGs.

    Raises:
        BadTiff: a limit does not hold, the compression is not read, or the directory is damaged.
    """
    try:
        return _only_pixels(data, max_parts, max_pixels, max_scan_pixels)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise error if isinstance(error, BadTiff) else BadTiff("tiff image with a damaged directory") from error


def _only_pixels(data: bytes, max_parts: int, max_pixels: int, max_scan_pixels: int) -> bytes:
    order = "<" if data.startswith(b"II") else ">"
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    layout = _Layout(order, "Q", "Q", "HHQ") if is_big else _Layout(order, "I", "H", "HHI")
    place = 8 if is_big else 4  # of the offset of the first directory
    value = struct.calcsize(f"{order}{layout.offset}")  # bytes of a value, or of its offset, in an entry
    (at,) = struct.unpack_from(order + layout.offset, data, place)
    (n,) = struct.unpack_from(order + layout.number, data, at)
    if n > max_parts:
        raise BadTiff(f"tiff image of more tags than max_chunks {max_parts}")
    at += struct.calcsize(order + layout.number)
    size = struct.calcsize(order + layout.entry) + value
    kept: dict[int, bytes] = {}
    values: dict[int, bytes] = {}
    types: dict[int, int] = {}
    for start in range(at, at + n * size, size):
        tag, kind, count = struct.unpack_from(order + layout.entry, data, start)
        if tag not in _KEPT or tag in kept:
            continue
        n_bytes = count * _SIZES[kind]
        begin = start + size - value
        if n_bytes > value:
            (begin,) = struct.unpack_from(order + layout.offset, data, begin)
        if begin + n_bytes > len(data):
            raise BadTiff("tiff image with a tag that lies behind the end of the file")
        kept[tag], types[tag] = data[start : start + size], kind
        values[tag] = data[begin : begin + n_bytes]
        if sum(map(len, values.values())) > len(data):
            raise BadTiff("tiff image with more bytes of tags than the file has")
    numbers = {
        tag: np.frombuffer(values[tag], order + _INTEGERS[kind]) for tag, kind in types.items() if kind in _INTEGERS
    }
    _judge(numbers, data, max_parts, max_pixels, max_scan_pixels)
    padding = bytes(len(data) % 2)
    directory = struct.pack(order + layout.number, len(kept)) + b"".join(kept[tag] for tag in sorted(kept))
    where = struct.pack(order + layout.offset, len(data) + len(padding))
    return data[:place] + where + data[place + value :] + padding + directory + bytes(value)


def _judge(numbers: dict[int, np.ndarray], data: bytes, max_parts: int, max_pixels: int, max_scan_pixels: int) -> None:
    """Raise BadTiff where a limit does not hold; values of tags are in `numbers`."""

    def one(tag: int, otherwise: int) -> int:
        return int(numbers[tag][0]) if tag in numbers else otherwise

    width, height = one(_WIDTH, 0), one(_HEIGHT, 0)
    compression = one(_COMPRESSION, _RAW)
    if compression not in _READ:
        raise BadTiff(f"tiff image of compression {compression}, which is not read")
    if width * height > max_pixels:
        raise BadTiff(f"image claims {width} x {height} pixels, more than max_pixels {max_pixels}")
    tiled = _TILES in numbers and _STRIPS not in numbers
    places = (_TILES, _TILE_BYTES) if tiled else (_STRIPS, _STRIP_BYTES)
    offsets, sizes = (numbers.get(tag, np.zeros(0)) for tag in places)
    if len(offsets) > max_parts:
        raise BadTiff(f"tiff image of more strips or tiles than max_chunks {max_parts}")
    part_width = one(_TILE_WIDTH, 0) if tiled else width
    part_height = one(_TILE_HEIGHT, 0) if tiled else min(one(_ROWS, height), height)
    if not (width and height and part_width and part_height and len(offsets)):
        raise BadTiff("tiff image without a size, strips or tiles")
    padded = (width + -width % part_width) * (height + -height % part_height)
    if padded > max(max_pixels, 1 << 20):  # of a small image, a tile may be most
        raise BadTiff(f"the tiles of a tiff image claim {padded} pixels, more than max_pixels {max_pixels}")
    if compression == _RAW:
        bits = numbers.get(_BITS, np.ones(1))
        n_bits = int(bits[0]) if one(_PLANAR, 1) == 2 else int(bits.sum()) * (one(_SAMPLES, 1) if len(bits) == 1 else 1)
        rows = np.arange(len(offsets)) % -(-height // part_height) * part_height  # first row of a strip
        n_rows = part_height if tiled else np.minimum(height - rows, part_height)
        sizes = n_rows * -(-part_width * n_bits // 8) + np.zeros(len(offsets), int)
    if len(sizes) < len(offsets):
        raise BadTiff("tiff image without the sizes of its strips or tiles")
    ends = offsets.astype(float) + sizes[: len(offsets)]
    if ends.max() > len(data) or sizes.astype(float).sum() > 2 * len(data):
        raise BadTiff("tiff image whose strips or tiles claim more bytes than the file has")
    if compression == _JPEG and data.count(b"\xff\xda") * 4 * part_width * part_height > max_scan_pixels:
        raise BadTiff(f"the scans of a tiff image go over more pixels than max_scan_pixels {max_scan_pixels}")
