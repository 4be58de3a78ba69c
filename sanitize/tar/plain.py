"""Reader for plain archives, thousands of headers at a time: it follows the size fields, then numpy checks all headers.

In a plain archive each file has one ustar or GNU header, perhaps behind a PAX header with nothing but the time of
modification (Python's tarfile, webdataset), and an end-of-archive marker follows. Most writers make such archives of
files with short names. All others are left to TarReader, which reads plain archives to the same result.
"""

import os
from collections.abc import Iterator
from itertools import accumulate
from typing import BinaryIO, NamedTuple

import numpy as np

from sanitize.tar.read import TarLimits, has_only_mtime
from sanitize.tar.write import BLOCK, GNU, POSIX, header

SMALL = 2048  # bytes; payloads up to this size are returned
_BATCH = 256  # headers checked together
_NEAR, _FAR = 1 << 12, 1 << 20  # bytes read at once between large payloads, and between small ones
_SPARSE = 1 << 14  # bytes from header to header; above, seeking over payloads is faster than reading them
_DIGITS = np.r_[124:135, 148:154]  # columns of a header: size and checksum, in octal
_PLACES = np.zeros((17, 2))  # float64 holds 8**11 exactly
_PLACES[:11, 0], _PLACES[11:, 1] = 8.0 ** np.arange(10, -1, -1), 8.0 ** np.arange(5, -1, -1)
_PADDING = np.triu(np.full((BLOCK, BLOCK), 0xFF, np.uint8))  # row n: all but the first n bytes
_ZERO = np.uint8(ord("0"))
_OCTAL = np.arange(15, -1, -3)  # lowest bit of each of six octal digits
_MAGICS = np.array([int.from_bytes(magic[:7], "little") for magic in (POSIX, GNU)], np.uint64)


class _Pattern:
    """Required bytes in some columns of a block, compared eight at once."""

    def __init__(self, block: bytes, columns: np.ndarray) -> None:
        mask = np.zeros(BLOCK, np.uint8)
        mask[columns] = 0xFF
        self._words = np.flatnonzero(mask.view("<u8"))
        self._mask = mask.view("<u8")[self._words]
        self._value = np.frombuffer(block, "<u8")[self._words] & self._mask

    def matches(self, block_MX: np.ndarray) -> np.ndarray:
        """Mask (M,) of the blocks (M, 512), uint8, that have the required bytes."""
        word_MX = block_MX.view("<u8")[:, self._words]
        return ((word_MX & self._mask) == self._value).all(1)


_OURS = header(b"", 0)
_FIELD_ENDS = np.r_[135, 154:156]  # NULs and a blank behind the numbers
_FILE = _Pattern(_OURS, np.r_[_FIELD_ENDS, 156, 257:265, 345])  # type, magic, no prefix
_GNU_FILE = _Pattern(_OURS.replace(POSIX, GNU), np.r_[_FIELD_ENDS, 156, 257:265])
_PAX = _Pattern(_OURS[:156] + b"x" + _OURS[157:], np.r_[_FIELD_ENDS, 156, 257:265, 345])


class NotPlain(Exception):
    """The archive is not plain; read it with TarReader."""


class PlainMembers(NamedTuple):
    """N members, all files, in the order of the archive; offsets count like those of `Member`.

    Attributes:
        names_N: ASCII names, dtype S.
        sizes_N, starts_N, ends_N: size, start and end of each member in bytes, int64.
        window: bytes of the archive; payloads of more than SMALL bytes may be incomplete.
        payloads_N: first byte of each payload in `window`, int64.
    """

    names_N: np.ndarray
    sizes_N: np.ndarray
    starts_N: np.ndarray
    ends_N: np.ndarray
    window: bytes
    payloads_N: np.ndarray


class _Window(NamedTuple):
    """Bytes of the archive from offset `base` on, the end of a payload, with the headers in them, not checked yet.

    Attributes:
        indices: first byte of each header in `data`.
        sizes: values of their size fields.
        blocks: the headers, concatenated.
    """

    data: bytes
    base: int
    indices: list[int]
    sizes: list[int]
    blocks: bytes


def read_plain(stream: BinaryIO, limits: TarLimits) -> Iterator[PlainMembers]:
    """Members of a plain archive in batches; large payloads are stepped over.

    Args:
        stream: seekable stream, positioned at the first header; it is left open.
        limits: as for TarReader.

    Raises:
        NotPlain: the archive is not plain; raised before or between batches.
    """
    if not stream.seekable():
        raise NotPlain
    origin = stream.tell()
    present = stream.seek(0, os.SEEK_END) - origin
    if present > limits.max_archive_bytes:
        raise NotPlain
    windows: list[_Window] = []
    n = 0
    for window in _walk(stream, origin, present, limits):
        windows.append(window)
        n += len(window.indices)
        if n >= _BATCH and window.blocks[156 - BLOCK] != ord("x"):  # a PAX header belongs to the one behind it
            yield _checked(windows, present, limits)
            windows, n = [], 0
    if windows:
        yield _checked(windows, present, limits)


def parse_plain(data: bytes, limits: TarLimits) -> PlainMembers:
    """Members of a piece of a plain archive, from a header to the end of a member.

    Raises:
        NotPlain: the piece is not plain, or does not begin and end there.
    """
    window = _look(data, 0, 0)
    if not window.indices:
        raise NotPlain
    found = _checked([window], len(data), limits)
    if found.ends_N[-1] != len(data):
        raise NotPlain
    return found


def normalised(members: PlainMembers, keep_N: np.ndarray) -> bytes:
    """The members of a piece (parse_plain) with `keep_N` (bool) True, as TarWriter writes them.

    An archive consists of whole blocks, so this selects the blocks of kept members, without PAX headers; then headers
    are overwritten in place, and padding is cleared.
    """
    block_LX = np.frombuffer(members.window, np.uint8).reshape(-1, BLOCK)
    size_M = members.sizes_N[keep_N]
    header_M, end_M = members.payloads_N[keep_N] // BLOCK - 1, members.ends_N[keep_N] // BLOCK
    edges = np.zeros(len(block_LX) + 1, np.int8)
    edges[header_M] += 1
    edges[end_M] -= 1
    stays_L = edges[:-1].cumsum(dtype=np.int8).view(bool)
    out_LX = block_LX[stays_L]
    lengths_M = end_M - header_M
    end_M = lengths_M.cumsum()
    out_LX[end_M - lengths_M] = _normal_headers(block_LX[header_M])
    partly_M = size_M % BLOCK > 0
    out_LX[end_M[partly_M] - 1] &= ~_PADDING[size_M[partly_M] % BLOCK]
    return out_LX.tobytes()


def _normal_headers(block_MX: np.ndarray) -> np.ndarray:
    """Headers with the same names and sizes; all other fields as in `header`."""
    normal_MX = np.tile(np.frombuffer(_OURS, np.uint8), (len(block_MX), 1))
    for field in (slice(0, 100), slice(124, 135)):
        normal_MX[:, field] = block_MX[:, field]
    normal_MX[:, 148:156] = ord(" ")
    total_M = normal_MX.sum(1, dtype=np.int64)
    normal_MX[:, 148:154] = (total_M[:, None] >> _OCTAL & 7) + _ZERO
    normal_MX[:, 154] = 0
    return normal_MX


def _walk(stream: BinaryIO, origin: int, present: int, limits: TarLimits) -> Iterator[_Window]:
    """Follow the size fields from window to window up to the end-of-archive marker."""
    end = at = 0  # end of the payload before; offset of the next header
    dense = False
    while True:
        stream.seek(origin + end)
        window = (_look if dense else _step)(stream.read(_FAR if dense else _NEAR), end, at)
        if not window.indices:
            break
        yield window
        before, end = at, end + window.indices[-1] + BLOCK + window.sizes[-1]
        at = end + -end % BLOCK
        dense = at - before < len(window.indices) * _SPARSE
    # The marker is two blocks of zeros, with nothing but zeros before (padding) and behind.
    stream.seek(origin + end)
    left = present - end
    few = min(BLOCK + limits.max_trailing_bytes, _FAR)
    if not 2 * BLOCK <= present - at <= few or stream.read(left) != bytes(left):
        raise NotPlain


def _step(data: bytes, base: int, at: int) -> _Window:
    """Headers from offset `at` on, found by the size fields; small payloads are complete."""
    indices, sizes, index = [], [], at - base
    while index + BLOCK <= len(data):
        digits = data[index + 124 : index + 135]
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            break
        size = int(digits, 8)
        if size <= SMALL and index + BLOCK + size > len(data):
            break
        indices.append(index)
        sizes.append(size)
        index += BLOCK + size + -size % BLOCK
    return _Window(data, base, indices, sizes, b"".join([data[i : i + BLOCK] for i in indices]))


def _look(data: bytes, base: int, at: int) -> _Window:
    """The same, all headers at once. Raises NotPlain where a payload contains what looks like a header."""
    first = at - base
    if first > len(data):  # the archive ends in a payload or behind it
        raise NotPlain
    block_NX = np.frombuffer(data, np.uint8, (len(data) - first) // BLOCK * BLOCK, first).reshape(-1, BLOCK)
    magic_N = block_NX[:, 256:264].copy().view("<u8")[:, 0] >> np.uint64(8)
    at_M = np.flatnonzero((magic_N == _MAGICS[0]) | (magic_N == _MAGICS[1]))
    size_M = ((block_NX[:, 124:135][at_M] - _ZERO) @ _PLACES[:11, 0]).astype(np.int64)
    next_M = at_M + 1 + (size_M + 511) // BLOCK
    if (at_M[:1] != 0).any() or (next_M[:-1] != at_M[1:]).any():
        raise NotPlain
    if len(at_M) and size_M[-1] <= SMALL and (at_M[-1] + 1) * BLOCK + size_M[-1] > len(data) - first:
        at_M, size_M = at_M[:-1], size_M[:-1]
    return _Window(data, base, (first + at_M * BLOCK).tolist(), size_M.tolist(), block_NX[at_M].tobytes())


def _checked(windows: list[_Window], present: int, limits: TarLimits) -> PlainMembers:
    """Members of M headers, all fields of which are checked. Raises NotPlain."""
    data = windows[0].data if len(windows) == 1 else b"".join([window.data for window in windows])
    shifts = accumulate([len(window.data) for window in windows], initial=0)
    index_M = np.array([shift + i for shift, window in zip(shifts, windows, strict=False) for i in window.indices])
    start_M = np.array([window.base + i for window in windows for i in window.indices])
    block_MX = np.frombuffer(b"".join([window.blocks for window in windows]), np.uint8).reshape(-1, BLOCK)
    size_M = _sizes(block_MX)
    is_file_M, is_pax_M = _FILE.matches(block_MX) | _GNU_FILE.matches(block_MX), _PAX.matches(block_MX)
    pax_M = np.flatnonzero(is_pax_M)
    if not (
        (is_file_M | is_pax_M).all()
        and is_file_M[-1]
        and is_file_M[pax_M + 1].all()
        and start_M[-1] + BLOCK + size_M[-1] <= present
        and size_M.max() <= limits.max_member_bytes
        and size_M[pax_M].max(initial=0) <= limits.max_extension_bytes
        and all(
            _has_only_mtime(data, i, n) for i, n in zip(index_M[pax_M].tolist(), size_M[pax_M].tolist(), strict=True)
        )
    ):
        raise NotPlain
    return PlainMembers(
        _names(block_MX[is_file_M, :100]),
        size_M[is_file_M],
        start_M[is_pax_M | ~np.append(False, is_pax_M[:-1])],
        (start_M + BLOCK + (size_M + 511 & -512))[is_file_M],
        data,
        index_M[is_file_M] + BLOCK,
    )


def _has_only_mtime(data: bytes, index: int, size: int) -> bool:
    return has_only_mtime(data[index + BLOCK : index + BLOCK + size], size)


def _sizes(block_MX: np.ndarray) -> np.ndarray:
    """Size fields of M headers. Raises NotPlain where one is not ASCII or has a wrong checksum."""
    digit_MX = block_MX[:, _DIGITS] - _ZERO
    size_M, checksum_M = (digit_MX @ _PLACES).astype(np.int64).T
    # ASCII sums to less than 2**16. The checksum field itself counts as blanks.
    sum_M = block_MX.sum(1, dtype=np.uint16) - block_MX[:, 148:156].sum(1, dtype=np.uint16) + 8 * ord(" ")
    if block_MX.max() >= 0x80 or digit_MX.max() >= 8 or (sum_M != checksum_M).any():
        raise NotPlain
    return size_M


def _names(byte_NX: np.ndarray) -> np.ndarray:
    """Names of dtype S, as narrow as possible: the width determines the cost of handling them."""
    width = int(np.flatnonzero(byte_NX.any(0)).max(initial=0)) + 1
    return np.ascontiguousarray(byte_NX[:, :width]).view(f"S{width}")[:, 0]
