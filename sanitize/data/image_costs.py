"""Cost of decoding an image beyond its pixels, counted before it is decoded.

Two costs can be large in a small file. Each scan of a JPEG covers all pixels and may take a few bytes: 480 scans of 49
megapixels are 228 KB, and took 43 s. And Pillow handles each part of a header in Python, up to 4 us a part; some parts
cost as much as a thousand others. Both counts stop at their limit and take at most .1 s. They include every part that
Pillow or libjpeg reads, and perhaps more.
"""

import re
from typing import NamedTuple

COSTLY = 1000  # weight of a costly part: 2 ms to decompress a text, or to copy all Exif data once more
_COSTLY_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")  # each may contain 1 MiB of text in 1 KiB
_TEXT_CHUNKS = (*_COSTLY_CHUNKS, b"tEXt")
_EXTENSION = ord("!")
_COMMENT_COST = 16  # Pillow 10 joins the blocks of a comment one by one
_EXIF = b"Exif\0\0"
_MARKER = re.compile(rb"\xff[^\xff\x00]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\xff\x00\xd0-\xd7]")
_NO_SEGMENT = frozenset([*range(0xC0), 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)])  # markers without a length
_FRAMES = frozenset([0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF])
_SCAN, _END = 0xDA, 0xD9


class JpegHeader(NamedTuple):
    """The part of a JPEG before the first scan.

    Attributes:
        parts: number of segments, and of bytes outside of them; a segment of Exif data counts as COSTLY.
        samples: component id -> samples of that component, padded to whole blocks; empty without a frame header.
        first_scan: offset of the marker of the first scan; length of the file if there is none.
    """

    parts: int
    samples: dict[int, int]
    first_scan: int


def jpeg_header(data: bytes, max_parts: int) -> JpegHeader:
    """Segments before the first scan; counting stops above `max_parts` parts."""
    at, parts = 2, 0
    samples: dict[int, int] = {}
    while parts <= max_parts and (found := _MARKER.search(data, at)):
        marker, behind = data[found.end() - 1], found.end()
        if marker == _SCAN:
            return JpegHeader(parts + found.start() - at, samples, found.start())
        parts += 1 + found.start() - at  # each fill or junk byte before a marker is a part
        at = behind
        if marker not in _NO_SEGMENT:
            at += _length(data, behind)
            parts += COSTLY * data.startswith(_EXIF, behind + 2)
            if marker in _FRAMES and not samples:
                samples = _samples(data[behind + 2 : at])
    return JpegHeader(parts + max(0, len(data) - at), samples, len(data))


def jpeg_scan_samples(data: bytes, header: JpegHeader, limit: int, max_parts: int) -> int:
    """Samples in all scans; a number above `limit` if there are more, or more than `max_parts` segments."""
    at, total, whole = header.first_scan, 0, sum(header.samples.values())
    for _ in range(max_parts):
        found = _MARKER_IN_SCAN.search(data, at)
        if found is None or total > limit or data[found.end() - 1] == _END:
            break
        marker, at = data[found.end() - 1], found.end()
        if marker in _NO_SEGMENT:
            continue
        behind = at + _length(data, at)
        if marker == _SCAN:
            ids = data[at + 3 : behind - 3 : 2]
            total += sum(header.samples.get(component, whole) for component in ids)
        at = behind
    else:
        return max(total, limit + 1)
    return total


def png_parts(data: bytes, max_parts: int) -> int:
    """Chunks of a PNG; a chunk with text or a profile counts as COSTLY. Counting stops above `max_parts`."""
    at, parts = 8, 0
    while at + 8 <= len(data) and parts <= max_parts:
        name = data[at + 4 : at + 8]
        if name == b"IEND":
            break
        parts += COSTLY if name in _COSTLY_CHUNKS else 1
        at += 12 + int.from_bytes(data[at : at + 4])
    return parts


def png_without_text(data: bytes) -> bytes:
    """The same PNG without texts and colour profiles, which do not change its pixels, and of which Pillow reads no more
    than 1 MiB: a larger one would cost the image."""
    if not any(name in data for name in _TEXT_CHUNKS):
        return data
    pieces, at = [data[:8]], 8
    while at + 8 <= len(data):
        stop = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if name not in _TEXT_CHUNKS:
            pieces.append(data[at:stop])
        at = stop
        if name == b"IEND":
            break
    return b"".join([*pieces, data[at:]])


def gif_parts(data: bytes, max_parts: int) -> int:
    """Blocks of extensions, and other bytes, before the first image of a GIF; a block of a comment counts as 16.
    Counting stops above `max_parts`."""
    flags = data[10] if len(data) > 10 else 0
    at, parts = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0), 0
    while at < len(data) and data[at] not in b",;" and parts <= max_parts:
        parts += 1
        if data[at] != _EXTENSION:
            at += 1
            continue
        weight = _COMMENT_COST if data[at + 1 : at + 2] == b"\xfe" else 1
        at += 2
        while at < len(data) and parts <= max_parts:
            size, at = data[at], at + 1 + data[at]
            parts += weight
            if not size:
                break
    return parts


def _length(data: bytes, at: int) -> int:
    """Length of the segment whose length field is at `at`; at least 2, as in libjpeg."""
    return max(2, int.from_bytes(data[at : at + 2]))


def _samples(frame: bytes) -> dict[int, int]:
    """Samples of each component, from a frame header (without its length field)."""
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    components = [(frame[i], frame[i + 1] >> 4, frame[i + 1] & 15) for i in range(6, len(frame) - 2, 3)]
    most_h = max([1, *(h for _, h, _ in components)])
    most_v = max([1, *(v for _, _, v in components)])
    units = -(-width // (8 * most_h)) * -(-height // (8 * most_v))
    return {component: 64 * h * v * units for component, h, v in components}
