"""Number of pixels that the decoder of an AVIF image goes over, from the frames in its items.

The size in the container says little: the AV1 stream has one of its own, and may contain any number of frames that are
decoded and not shown. Here boxes (ISO 14496-12) and the units of a stream (OBUs of the AV1 specification) are counted;
no pixel is decoded.
"""

from collections.abc import Iterator
from typing import NamedTuple

_MAX_EXIF_BYTES = 1 << 16  # as in a JPEG; Pillow parses it in Python
_UNIQUE = frozenset({"ftyp", "meta", "moov", "iinf", "iloc", "idat", "mdia", "minf", "stbl", "stsz", "stco", "co64"})
_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6


class BadAvif(ValueError):
    """The file is not read; the message is the reason."""


class _Item(NamedTuple):
    """Place of an item: whether its extents count from the beginning of `idat`, and (offset, length) of each."""

    is_in_idat: bool
    extents: list[tuple[int, int]]


class _Bytes:
    """Big-endian fields, one behind the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, n: int) -> int:
        """Number of `n` bytes. Raises BadAvif at the end."""
        self._at += n
        if self._at > len(self._data):
            raise BadAvif("avif image with a damaged header")
        return int.from_bytes(self._data[self._at - n : self._at])


class _Bits:
    """Bits of a sequence header, one behind the other."""

    def __init__(self, data: bytes) -> None:
        self._number, self._left = int.from_bytes(data[:128]), 8 * len(data[:128])

    def number(self, n: int) -> int:
        """Number of `n` bits. Raises BadAvif at the end."""
        self._left -= n
        if self._left < 0:
            raise BadAvif("avif image with a damaged header")
        return self._number >> self._left & ((1 << n) - 1)


def decoded_pixels(data: bytes, max_parts: int) -> int:
    """Sum over the frames of all AV1 items, or of the first pictures of all tracks if that is more, of the largest size
    that their sequence headers allow.

    For the first picture of a sequence a decoder takes the items or, by its brand, the first sample of tracks.

    Args:
        data: AVIF file.
        max_parts: largest number of boxes, extents and OBUs.

    Raises:
        BadAvif: there are more parts, or the structure is not understood.
    """
    count = _Count(max_parts)
    top = _once(_boxes(data, count))
    of_items = _pixels_of_items(top.get("meta", b""), data, count)
    tracks = [box for kind, box in _boxes(top.get("moov", b""), count) if kind == "trak"]
    total = max(of_items, sum(_pixels_of_track(track, data, count) for track in tracks))
    if not total:
        raise BadAvif("avif image without a frame")
    return total


def _pixels_of_items(box: bytes, data: bytes, count: "_Count") -> int:
    """The same of the items that a box `meta` describes; 0 without one."""
    if not box:
        return 0
    meta = _once(_boxes(box[4:], count))
    kinds = _kinds(meta.get("iinf", b""), count)
    total = n_bytes = 0
    for item, place in _places(meta.get("iloc", b""), count).items():
        whole = meta.get("idat", b"") if place.is_in_idat else data
        n_bytes += sum(length or len(whole) for _, length in place.extents)
        if n_bytes > 2 * len(data):
            raise BadAvif("avif image whose items claim more bytes than the file has")
        content = b"".join(whole[at : at + length] if length else whole[at:] for at, length in place.extents)
        if kinds.get(item) == b"Exif" and len(content) > _MAX_EXIF_BYTES:
            raise BadAvif("avif image with more than 64 KiB of Exif data")
        if kinds.get(item) == b"av01":
            total += _pixels(content, count)
    return total


def _pixels_of_track(box: bytes, data: bytes, count: "_Count") -> int:
    """The same of the first sample of a track, and of the items beside it."""
    track = _once(_boxes(box, count))
    table = track.get("mdia", b"")
    for name in ("minf", "stbl"):
        table = _once(_boxes(table, count)).get(name, b"")
    parts = _once(_boxes(table, count))
    at, size = _first_of(parts)
    n = _pixels(data[at : at + size], count) if at + size <= len(data) else 0
    if not n:
        raise BadAvif("avif image sequence whose first picture is not found")
    return n + _pixels_of_items(track.get("meta", b""), data, count)


def _first_of(table: dict[str, bytes]) -> tuple[int, int]:
    """Offset and size of the first sample of a track: it begins the first chunk."""
    if ("stco" in table) == ("co64" in table) or "stsz" not in table:
        raise BadAvif("avif image with a damaged header")
    chunks, sizes = _Bytes(table.get("stco") or table.get("co64", b"")), _Bytes(table["stsz"])
    chunks.number(8)  # version, number of chunks
    sizes.number(4)
    size = sizes.number(4)  # of all samples; 0 where each has its own
    sizes.number(4)
    return chunks.number(4 if "stco" in table else 8), size or sizes.number(4)


class _Count:
    """Number of parts so far."""

    def __init__(self, most: int) -> None:
        self._left = self._most = most

    def add(self) -> None:
        """One more. Raises BadAvif where there are too many."""
        self._left -= 1
        if self._left < 0:
            raise BadAvif(f"avif image of more boxes, extents and units than max_chunks {self._most}")


def _boxes(data: bytes, count: _Count) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at + 8 <= len(data):
        count.add()
        size, kind, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8].decode("latin-1"), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        size = size or len(data) - at
        if size < head or at + size > len(data):
            raise BadAvif("avif image with a damaged header")
        yield kind, b"" if kind == "mdat" else data[at + head : at + size]
        at += size


def _once(boxes: Iterator[tuple[str, bytes]]) -> dict[str, bytes]:
    """Boxes by their kind; of several that this module reads, decoders differ in which they take."""
    found: dict[str, bytes] = {}
    for name, box in boxes:
        if name in found and name in _UNIQUE:
            raise BadAvif(f"avif image with several boxes {name}")
        found[name] = box
    return found


def _kinds(iinf: bytes, count: _Count) -> dict[int, bytes]:
    """Kind of each item by its number."""
    kinds = {}
    for name, box in _boxes(iinf[6 if iinf[:1] == b"\0" else 8 :], count):
        if name == "infe" and box[:1] in (b"\2", b"\3"):
            n = 2 if box[0] == 2 else 4  # bytes of a number in version 2, and in 3
            kinds[int.from_bytes(box[4 : 4 + n])] = box[6 + n : 10 + n]
    return kinds


def _places(iloc: bytes, count: _Count) -> dict[int, _Item]:
    fields = _Bytes(iloc)
    version = fields.number(4) >> 24
    sizes = fields.number(2)
    n_offset, n_length, n_base, n_index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    places = {}
    for _ in range(fields.number(4 if version == 2 else 2)):
        count.add()
        item = fields.number(4 if version == 2 else 2)
        method = fields.number(2) & 15 if version else 0
        if method > 1:
            raise BadAvif("avif image with items inside of others, which is not read")
        fields.number(2)
        base = fields.number(n_base)
        extents = []
        for _ in range(fields.number(2)):
            count.add()
            if version:
                fields.number(n_index)
            extents.append((base + fields.number(n_offset), fields.number(n_length)))
        places[item] = _Item(method == 1, extents)
    return places


def _pixels(stream: bytes, count: _Count) -> int:
    at = n_frames = largest = 0
    while at < len(stream):
        count.add()
        head = stream[at]
        kind, at = head >> 3 & 15, at + 1 + (head >> 2 & 1)
        size = len(stream) - at
        if head & 2:
            size, at = _leb128(stream, at)
        if kind == _SEQUENCE_HEADER:
            largest = max(largest, _largest_frame(stream[at : at + size]))
        n_frames += kind in (_FRAME_HEADER, _FRAME)
        at += size
    return n_frames * largest


def _leb128(stream: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the offset behind it."""
    value = 0
    for i, byte in enumerate(stream[at : at + 8]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise BadAvif("avif image with a damaged header")


def _largest_frame(header: bytes) -> int:
    """Pixels of the largest frame of a sequence (AV1 specification, 5.5.1)."""
    bits = _Bits(header)
    bits.number(4)  # profile, still picture
    if bits.number(1):  # the short header of a still picture
        bits.number(5)
    else:
        _skip_operating_points(bits)
    n_width, n_height = bits.number(4) + 1, bits.number(4) + 1
    return (bits.number(n_width) + 1) * (bits.number(n_height) + 1)


def _skip_operating_points(bits: _Bits) -> None:
    n_delay = 0  # bits of a delay in the model of a decoder; 0 without a model
    if bits.number(1):  # timing
        bits.number(64)
        if bits.number(1):  # equal intervals: a number of n zeros, a one, n bits
            zeros = 0
            while not bits.number(1):
                zeros += 1
            bits.number(zeros)
        if bits.number(1):
            n_delay = bits.number(5) + 1
            bits.number(42)
    has_display_delay = bits.number(1)
    for _ in range(bits.number(5) + 1):
        bits.number(12)
        if bits.number(5) > 7:
            bits.number(1)
        if n_delay and bits.number(1):
            bits.number(2 * n_delay + 1)
        if has_display_delay and bits.number(1):
            bits.number(4)
