"""Tar headers, and a writer whose archives depend on names and payloads alone.

ustar, with a PAX path only where ustar cannot hold the name; mtime, uid and gid 0, mode 0644, no owner names.
"""

from typing import BinaryIO
from zlib import adler32

from sanitize.errors import DataError

BLOCK = 512
ZEROS = bytes(BLOCK)
POSIX, GNU = b"ustar\x0000", b"ustar  \0"
MAX_NAME_BYTES = 4096
# The fields of a header: name; mode, uid, gid; size; mtime; checksum; type; link name, magic, owners, devices; prefix
# and 12 unused bytes. These fields are constant:
_IDS, _EPOCH = b"0000644\0" + b"0000000\0" * 2, b"00000000000\0"
_TAIL = bytes(100) + POSIX + bytes(64) + b"0000000\0" * 2
_FIXED_SUM = sum(_IDS + _EPOCH + _TAIL) + 8 * ord(" ")


def header(name: bytes, size: int) -> bytes:
    """Header of a regular file; with a PAX header before it where ustar cannot hold the name."""
    if len(name) <= 100:
        return _block(name, size)
    slash = name.rfind(b"/", 1, 156)
    if slash > 0 and 1 < len(name) - slash <= 101:
        return _block(name[slash + 1 :], size, name[:slash])
    records = _pax_record(b"path", name)
    try:
        name.decode()
    except UnicodeDecodeError:
        records = _pax_record(b"hdrcharset", b"BINARY") + records
    pax = _block(b"PaxHeader", len(records), kind=b"x") + records + bytes(-len(records) % BLOCK)
    return pax + _block(name[:100].rstrip(b"/"), size)


def byte_sum(data: bytes) -> int:
    """Sum of at most 256 bytes, 512 if ASCII: Adler-32's low half is 1 + the sum mod 65521, 30 x faster than sum()."""
    return (adler32(data) & 0xFFFF) - 1


def _block(name: bytes, size: int, prefix: bytes = b"", kind: bytes = b"0") -> bytes:
    digits = b"%011o" % size
    total = _FIXED_SUM + byte_sum(name) + byte_sum(digits) + byte_sum(prefix) + kind[0]
    fields = (name.ljust(100, b"\0"), _IDS, digits, b"\0", _EPOCH, b"%06o\0 " % total, kind, _TAIL)
    return b"".join(fields) + prefix.ljust(167, b"\0")


def _pax_record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))  # the length includes its own digits, which may carry
    return b"%d %b=%b\n" % (length, key, value)


class TarWriter:
    """Write regular files with normalised headers: the same names and bytes always give the same archive.

    The stream is left open.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Append a file; `data` is contiguous.

        Raises:
            DataError: the name is empty, longer than TarReader accepts, contains a NUL or ends in "/"; or `data` has
                8 GiB or more.
        """
        raw = name.encode("utf-8", "surrogateescape")
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        if not raw or raw.endswith(b"/") or b"\0" in raw or len(raw) > MAX_NAME_BYTES:
            raise DataError(f"{name[:200]!r} cannot name an archived file: empty, too long, a NUL, or '/' at its end")
        if size >= 8**11:
            raise DataError(f"{name[:200]!r} has {size} bytes, a ustar member has less than 8 GiB")
        padding = ZEROS[: -size % BLOCK]
        if size <= 1 << 16:  # one write is faster than three, but copies
            self._write(b"".join((header(raw, size), data, padding)))
        else:
            for piece in (header(raw, size), data, padding):
                self._write(piece)

    def add_normal(self, members: bytes) -> None:
        """Append members as `add` writes them: whole, with headers and padding."""
        self._write(members)

    def close(self) -> None:
        """Write the end-of-archive marker."""
        self._write(ZEROS * 2)

    def _write(self, data: bytes | memoryview) -> None:
        written = self._stream.write(data)
        while written < (
            data.nbytes if isinstance(data, memoryview) else len(data)
        ):  # a raw stream may write only a part
            data = memoryview(data).cast("B")[written:]
            written = self._stream.write(data)
