"""The counts cover all the work of Pillow, and are exact for the files of ordinary encoders."""

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sanitize.data.decode import BadImage, ImageConfig, decode
from sanitize.data.image_costs import COSTLY, jpeg_header, jpeg_scan_samples, png_parts

MANY = 10**9
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))


def encoded(format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    NOISE.convert(mode).save(file, format, **options)
    return file.getvalue()


def scan_samples(data: bytes, limit: int = MANY) -> int:
    return jpeg_scan_samples(data, jpeg_header(data, MANY), limit, MANY)


# 83 x 61 pixels are 11 x 8 blocks; with colour at half the resolution 12 x 8, and 6 x 4 of each colour.
# libjpeg's ordinary script: twice all components, then 4 scans of the luminance and 2 of each colour; 6 for grey.
SCANS = {
    "baseline": (encoded("JPEG", subsampling=0), 3 * 88),
    "baseline, half the colour": (encoded("JPEG", subsampling=2), 96 + 2 * 24),
    "grey": (encoded("JPEG", "L"), 88),
    "progressive": (encoded("JPEG", progressive=True, subsampling=0), (2 * 3 + 4 + 2 * 2) * 88),
    "progressive, half the colour": (encoded("JPEG", progressive=True, subsampling=2), 2 * 144 + 4 * 96 + 2 * 2 * 24),
    "progressive, grey": (encoded("JPEG", "L", progressive=True), 6 * 88),
    "several pictures": (encoded("MPO", save_all=True, append_images=[NOISE], subsampling=0), 3 * 88),
}


@pytest.mark.parametrize("name", SCANS)
def test_the_scans_of_an_ordinary_jpeg_are_counted_exactly(name: str) -> None:
    data, blocks = SCANS[name]
    assert scan_samples(data) == 64 * blocks


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("behind", [b"", b"\0"])  # libjpeg-turbo reads it; Pillow does
def test_max_scan_pixels_is_the_most_that_is_decoded(name: str, behind: bytes) -> None:
    data, blocks = SCANS[name]
    at_limit, below = (ImageConfig(max_scan_pixels=64 * blocks - less) for less in (0, 1))
    assert decode(data + behind, at_limit).shape == (3, 61, 83)
    with pytest.raises(BadImage, match=f"go over more pixels than max_scan_pixels {64 * blocks - 1}"):
        decode(data + behind, below)


def test_a_thumbnail_or_a_video_that_contains_markers_does_not_count() -> None:
    thumbnail = b"Thumb" + b"\xff\xda" * 5000
    data = encoded("JPEG", exif=b"Exif\0\0" + thumbnail)
    assert scan_samples(data + b"\xff\xda" * 5000) == scan_samples(encoded("JPEG"))
    assert decode(data, ImageConfig(max_scan_pixels=50_000)).shape == (3, 61, 83)


@pytest.mark.parametrize("n", [0, 5])
def test_max_chunks_is_the_most_that_are_read(n: int) -> None:
    chunks = b"".join(struct.pack(">I", 0) + b"abAb" + struct.pack(">I", zlib.crc32(b"abAb")) for _ in range(n))
    png = encoded("PNG")
    png = png[:33] + chunks + png[33:]
    jpeg = encoded("JPEG")
    jpeg = jpeg[:2] + b"\xff\xe5\0\2" * n + jpeg[2:]
    for data, parts in ((png, png_parts(png, MANY)), (jpeg, jpeg_header(jpeg, MANY).parts)):
        assert parts >= n
        decode(data, ImageConfig(max_chunks=parts))
        with pytest.raises(BadImage, match=f"max_chunks {parts - 1}"):
            decode(data, ImageConfig(max_chunks=parts - 1))


class Counted(io.BytesIO):
    """Number of reads by Pillow: its parsers read at least once for each part."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        return super().read(size)


def reads_of(data: bytes, format: str) -> int:
    file = Counted(data)
    with suppress(Exception):
        Image.open(file, formats=[format]).load()
    return file.reads


BASES = {
    "JPEG": [encoded("JPEG", progressive=p, quality=5) for p in (False, True)],
    "PNG": [encoded("PNG"), encoded("PNG", "P")],
}
PIECES = [
    b"\xff\xd0",
    b"\xff\xe1\0\x0aExif\0\0xx",
    b"\xff\xfe\0\2",
    b"\xff\xc4\0\2",
    b"\xff",
    b"\0",
    b"\xff\0",
    b"\xff\xd9",
    b"\xff\xda\0\2",
    struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")),
    struct.pack(">I", 0) + b"abAb" + struct.pack(">I", zlib.crc32(b"abAb")),
    struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")),
]


@pytest.mark.hostile
@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([(format, base) for format, bases in BASES.items() for base in bases]),
    st.lists(st.tuples(st.integers(0, 700), st.sampled_from(PIECES), st.integers(1, 300)), max_size=4),
)
def test_pillow_never_does_more_than_was_counted(
    image: tuple[str, bytes], inserted: list[tuple[int, bytes, int]]
) -> None:
    format, data = image
    for place, piece, n in inserted:
        at = 2 if place < 100 else 33 if place < 200 else place
        data = data[:at] + piece * n + data[at:]
    pixels = len(data) // 1000  # blocks of pixels are read beside the parts
    if format == "PNG":
        assert reads_of(data, format) <= 4 * png_parts(data, MANY) + 30 + pixels
    else:
        assert reads_of(data, format) <= 4 * jpeg_header(data, MANY).parts + 30 + pixels


@pytest.mark.hostile
@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"\xff\xd8", b"\xff\xd8\xff\xc0", b"\x89PNG\r\n\x1a\n", b""]))
def test_any_bytes_can_be_counted(data: bytes, start: bytes) -> None:
    header = jpeg_header(start + data, MANY)
    assert 0 <= header.parts <= len(start + data) * (1 + COSTLY)
    assert scan_samples(start + data) >= 0
    assert png_parts(start + data, MANY) >= 0


@pytest.mark.hostile
def test_the_count_takes_linear_time() -> None:
    """Each of these once took n * n steps in some version of the expressions that look for markers."""
    n = 10**6
    for data in (b"\xff" * n, b"\xff" * n + b"\0", b"\xff\0" * n, bytes(n), b"\xff\xd0" * n):
        header = jpeg_header(b"\xff\xd8" + data, MANY)
        assert header.parts >= n / 2
        assert jpeg_scan_samples(b"\xff\xd8" + data, header._replace(first_scan=2), MANY, MANY) == 0
