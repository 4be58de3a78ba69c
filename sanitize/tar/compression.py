"""Compression of shards, by first bytes and not by name: gzip, xz, bzip2 and zstd are read; others are named.

Streams are read forward. Their memory is bounded (a dictionary or window of at most 128 MiB), and so is their time, by
the content: a stream of little but headers, padding or empty blocks is not followed.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, Protocol

import pyarrow as pa

from sanitize.errors import ConfigError
from sanitize.tar.names import printable

GZIP = b"\x1f\x8b"
# Compressions that are read and written, by the suffix of a name.
_READ_SUFFIXES = {
    **dict.fromkeys((".tar.gz", ".tgz"), "gzip"),
    **dict.fromkeys((".tar.xz", ".txz"), "xz"),
    **dict.fromkeys((".tar.bz2", ".tbz2", ".tbz"), "bzip2"),
    **dict.fromkeys((".tar.zst", ".tar.zstd", ".tzst"), "zstd"),
}
SHARD_SUFFIXES = (".tar", *_READ_SUFFIXES)
_ZSTD, _SKIPPED = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"  # first bytes of a frame; bytes 1 to 3 of one to be skipped
_READ_MAGIC = {GZIP: "gzip", b"\xfd7zXZ\0": "xz", _ZSTD: "zstd"}
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # of bzip2, behind "BZh" and a digit: its first block, or its end
# Archives that are not read, by suffix; they are reported among the shards, not ignored.
UNREAD_SUFFIXES = {
    **dict.fromkeys((".tar.lzma", ".tlz"), "lzma"),
    ".tar.lz4": "lz4",
    ".tar.lz": "lzip",
    ".tar.br": "brotli",
    ".tar.z": "compress",
    ".zip": "zip",
    ".7z": "7z",
    ".rar": "rar",
}
_UNREAD_MAGIC = {
    b"\x5d\0\0\x80": "lzma",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x1f\x9d": "compress",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
# Files in place of shards, after a failed download or by another name; texts in lower case.
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for: run `git lfs pull`",
    b"<!doctype html": "a web page, not an archive",
    b"<html": "a web page, not an archive",
    b"<?xml": "an XML document, not an archive",
}
_OTHERS = {
    b"PAR1": "a Parquet file, not an archive: `sanitize import` reads those with images",
    b"\x89HDF": "an HDF5 file, not an archive",
    b"SQLite format": "an SQLite database, not an archive",
    b"\x93NUMPY": "a NumPy array, not an archive",
    b"\x89PNG": "a picture, not an archive",
    b"\xff\xd8\xff": "a picture, not an archive",
}
_BLANK = b"\xef\xbb\xbf \t\r\n"  # before the first word of a text, with a byte order mark
_SHOWN_BYTES = 24  # of a file that is not known
HEAD_BYTES = 32  # bytes that `compression_in` needs
_INPUT_BYTES = 1 << 14  # compressed bytes read at once
_AT_ONCE = 1 << 16  # decompressed bytes returned at once: no more of the file is read than is needed
_UNIT = 1 << 12  # decompressed bytes made at once where those of a call that fails are lost
_MAX_WINDOW = 1 << 27  # bytes; `xz -9` has a dictionary of 64 MiB, `zstd --ultra -22` a window of 128 MiB
_BLOCK_HEADER, _MAX_BLOCK, _RLE = 3, 1 << 17, 1  # of zstd: bytes, bytes, type
_XZ_MEMORY = _MAX_WINDOW + (1 << 21)  # the decoder itself takes less than 2 MiB
# Allowance for everything in a compressed stream but content: names, comments, padding, empty blocks, tiny members.
_FREE_BYTES = 1 << 20  # and twice the content
_FREE_MEMBERS = 10_000  # and one for each KiB of content; a member takes 15 us (with a large dictionary 60 us)


class Readable(Protocol):
    """A stream to read bytes from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; b"" at the end."""
        ...


def unread_suffix(name: str) -> str:
    """Name of an unsupported compression, by the suffix of a file name; else ""."""
    lower = name.lower()
    return next((what for suffix, what in UNREAD_SUFFIXES.items() if lower.endswith(suffix)), "")


def not_read(compression: str) -> str:
    """Message for an archive of an unsupported compression."""
    return f"{compression} compressed: not read; repack it as .tar or .tar.gz"


def compression_of(name: str) -> str:
    """Compression that the name of a shard says, in any case: "gzip", "xz", "bzip2", "zstd"; else "" for none.

    Shards are written in the compression that their name says; they are read in the one that their first bytes say.
    """
    lower = name.lower()
    return next((what for suffix, what in _READ_SUFFIXES.items() if lower.endswith(suffix)), "")


def compression_in(head: bytes) -> str:
    """Compression of a stream that is read, from its first bytes (HEAD_BYTES); "" for an uncompressed one."""
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    return next((what for magic, what in _READ_MAGIC.items() if head.startswith(magic)), _skippable(head))


def _skippable(head: bytes) -> str:
    """ "zstd" for a stream that begins with a frame to be skipped, as those of pzstd do."""
    return "zstd" if len(head) >= 8 and head[1:4] == _SKIPPED and head[0] >> 4 == 5 else ""


def plain_suffix(compression: str) -> str:
    """The usual suffix of a shard of this compression, such as ".tar.xz"."""
    return next((suffix for suffix, what in _READ_SUFFIXES.items() if what == compression), ".tar")


def explain(head: bytes, damage: str, compression: str = "") -> str:
    """Description of a file without a single sample, from the first bytes of what should be an archive.

    Args:
        head: first bytes of the archive, if they are no header; else b"".
        damage: what the reader of archives says.
        compression: compression of the file that was undone, or "".
    """
    if not head:
        return damage
    if inner := compression_in(head):
        return f"compressed twice ({inner} in {compression}): unpack it once"
    for magic, what in _UNREAD_MAGIC.items():
        if head.startswith(magic):
            return not_read(what)
    text = head.lstrip(_BLANK).lower()
    known = [what for start, what in _TEXTS.items() if text.startswith(start)]
    known += [what for start, what in _OTHERS.items() if head.startswith(start)]
    if known:
        return f"{compression} compressed: {known[0]}" if compression else known[0]
    shown = printable(head[:_SHOWN_BYTES].split(b"\0")[0].decode("utf-8", "surrogateescape"))
    return f"{damage}; it begins with '{shown}'" if shown else damage


class CorruptStream(zlib.error):
    """The compressed stream is damaged."""


class RefusedStream(zlib.error):
    """A stream that is not followed, because it costs too much or needs what is not in it; the message can be a
    `TarDamage.reason`."""


class _Cost:
    """Compressed bytes and members of a stream so far, which its content has to justify."""

    content = taken = members = 0

    def check(self) -> None:
        """Raise RefusedStream where they are too many."""
        if self.taken > 2 * self.content + _FREE_BYTES:
            raise RefusedStream("compressed stream of little but headers, padding or empty blocks")
        if self.members > self.content // 1024 + _FREE_MEMBERS:
            raise RefusedStream("compressed stream of too many small members")


class CompressedStream:
    """A stream of one or more compressed members, decompressed forward; its content bounds the time.

    Errors are kept, and raised again, as copies without a traceback. The frames in a traceback refer to the stream: it
    would belong to a ring, which pyarrow hides in part from the garbage collector, and its memory would never be freed.

    Attributes:
        verified: number of decompressed bytes in complete members, whose checksum was right where they have one.
    """

    def __init__(self, file: Readable) -> None:
        self.verified = 0
        self._file = file
        self._input = b""
        self._cost = _Cost()
        self._error: Exception | None = None

    def seekable(self) -> bool:
        """No."""
        return False

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end of the last member.

        Raises:
            EOFError: the stream is cut.
            zlib.error: the stream is corrupt, a member is followed by other data, or the stream is refused. The bytes
                before the damage are returned first.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free the memory of the decompressor; reading from the stream is an error from now on. The file stays open."""
        self._error = ValueError("the compressed stream is closed")
        self._input = b""

    def _take(self, n: int) -> None:
        """Count compressed bytes; set the error where they are too many for the content."""
        self._cost.taken += n
        try:
            self._cost.check()
        except RefusedStream as error:
            self._error = copy(error)

    def _count(self, data: bytes, is_end: bool) -> None:
        """Count content, perhaps the last of a member."""
        self._cost.content += len(data)
        if is_end:
            self.verified = self._cost.content
            self._cost.members += 1

    def _skip_padding(self) -> bool:
        """Go to the next byte that is not zero; False where the file ends."""
        block = self._input
        while not (left := block.lstrip(b"\0")) and self._error is None:
            self._take(len(block))
            block = self._file.read(_INPUT_BYTES)
            if not block:
                self._input = b""
                return False
        self._take(len(block) - len(left))
        self._input = left
        return True


class GzipStream(CompressedStream):
    """A gzip stream. Header fields (a name, a comment) are stepped over by zlib and not held in memory."""

    def __init__(self, file: Readable) -> None:
        super().__init__(file)
        self._inflate = _new_inflate()
        self._rescued = b""

    def read(self, size: int) -> bytes:
        """See CompressedStream."""
        while self._error is None:
            if self._inflate.eof:
                if not self._skip_padding():
                    return b""
                self._inflate = _new_inflate()
                continue
            self._input = self._input or self._file.read(_INPUT_BYTES)
            is_end = not self._input
            data = self._decompress(size)
            if data:
                return data
            if is_end and not self._inflate.eof:
                raise EOFError
        if not self._rescued:
            raise copy(self._error)
        data, self._rescued = self._rescued[:size], self._rescued[size:]
        return data

    def close(self) -> None:
        """See CompressedStream."""
        super().close()
        self._rescued = b""
        del self._inflate

    def _decompress(self, size: int) -> bytes:
        before = self._inflate.copy()
        try:
            data = self._inflate.decompress(self._input, size)
        except zlib.error as error:
            self._error, self._rescued = copy(error), _before_damage(before, self._input)
            return b""
        left = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
        self._count(data, self._inflate.eof)
        self._take(len(self._input) - len(left))
        self._input = left
        return data


def _new_inflate() -> "zlib._Decompress":
    return zlib.decompressobj(16 + zlib.MAX_WBITS)  # 16: gzip, with its checksum


def _before_damage(inflate: "zlib._Decompress", data: bytes) -> bytes:
    """Decompressed bytes before the damage in `data`: zlib drops the output of a call that fails."""
    pieces = []
    try:
        for byte in data:
            pieces.append(inflate.decompress(bytes([byte])))
    except zlib.error:
        pass
    return b"".join(pieces)


class _UnitStream(CompressedStream):
    """A stream that is decompressed in units of one size: a call that fails loses its output, at most one unit. What
    is read before the damage does not depend on how much is asked for at once."""

    def __init__(self, file: Readable) -> None:
        super().__init__(file)
        self._left = b""

    def read(self, size: int) -> bytes:
        """See CompressedStream."""
        pieces, have = [self._left], len(self._left)
        while have < min(size, _AT_ONCE) and self._error is None and (unit := self._unit()):
            pieces.append(unit)
            have += len(unit)
        data = b"".join(pieces)
        if not data and self._error is not None:
            raise copy(self._error)
        self._left = data[size:]
        return data[:size]

    def close(self) -> None:
        """See CompressedStream."""
        super().close()
        self._left = b""

    def _unit(self) -> bytes:
        """At most _UNIT bytes; b"" at the end, or where `_error` is set."""
        raise NotImplementedError


class _MemberStream(_UnitStream):
    """A stream of members for which Python has a decompressor."""

    def __init__(self, file: Readable, new: Callable[[], Any]) -> None:
        super().__init__(file)
        self._new = new
        self._member = new()

    def close(self) -> None:
        """See CompressedStream."""
        super().close()
        del self._member

    def _unit(self) -> bytes:
        while self._error is None:
            if self._member.eof:
                if not self._skip_padding():
                    return b""
                self._member = self._new()
            elif data := self._decompress():
                return data
        return b""

    def _decompress(self) -> bytes:
        if self._member.needs_input and not self._input:
            self._input = _full(self._file)
            if not self._input:
                self._error = EOFError()
                return b""
        given, self._input = self._input, b""
        try:
            data: bytes = self._member.decompress(given, _UNIT)
        except (lzma.LZMAError, OSError) as error:
            self._error = _explained(error)
            return b""
        if self._member.eof:
            self._input = self._member.unused_data
        self._count(data, self._member.eof)
        self._take(len(given) - len(self._input))
        return data


def _explained(error: Exception) -> zlib.error:
    if "Memory usage limit" in str(error):
        return RefusedStream(f"xz stream with a dictionary of more than {_MAX_WINDOW >> 20} MiB")
    return CorruptStream(str(error))


def _full(file: Readable) -> bytes:
    """_INPUT_BYTES; fewer at the end of the file only."""
    data = b""
    while len(data) < _INPUT_BYTES and (more := file.read(_INPUT_BYTES - len(data))):
        data += more
    return data


class XzStream(_MemberStream):
    """An xz stream, with a dictionary of at most 128 MiB."""

    def __init__(self, file: Readable) -> None:
        super().__init__(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY))


class Bzip2Stream(_MemberStream):
    """A bzip2 stream; its blocks take at most 4 MiB."""

    def __init__(self, file: Readable) -> None:
        super().__init__(file, bz2.BZ2Decompressor)


class ZstdStream(_UnitStream):
    """A zstd stream with windows of at most 128 MiB, decompressed by pyarrow."""

    def __init__(self, file: Readable) -> None:
        super().__init__(file)
        self._frames = _ZstdFrames(file, self._cost)
        try:
            self._stream = pa.CompressedInputStream(pa.PythonFile(_File(self._frames.pieces()), mode="r"), "zstd")
        except NotImplementedError as error:
            raise ConfigError("pyarrow was built without zstd: install one from PyPI, or repack as .tar.gz") from error

    def close(self) -> None:
        """See CompressedStream."""
        super().close()
        del self._stream  # frees its window and buffers, which its own `close` does not

    def _unit(self) -> bytes:
        before = self._cost.content
        try:
            data: bytes = self._stream.read(_UNIT)
        except (OSError, pa.ArrowException) as error:
            self._error = self._frames.error or CorruptStream(str(error))
            return b""
        self._cost.content += len(data)
        if self._frames.has_ended:
            self.verified = self._cost.content
        elif self._frames.is_new:
            self.verified, self._frames.is_new = before, False
        if not data:
            self._error = self._frames.error
        return data


class _ZstdFrames:
    """The frames of a zstd stream, without frames to be skipped, padding, and data behind the last frame.

    Blocks are followed by the sizes in their headers (RFC 8878), so that windows and frames without content are judged
    before the library sees them, and damage behind a frame costs nothing of it.

    Attributes:
        error: reason why the frames end before the file does, or in the middle of one.
        has_ended: True if nothing is left.
        is_new: set to True where a frame begins.
    """

    def __init__(self, file: Readable, cost: _Cost) -> None:
        self.error: Exception | None = None
        self.has_ended = self.is_new = False
        self._file, self._cost = file, cost
        self._buffer, self._at = b"", 0

    def pieces(self) -> Iterator[bytes]:
        """All frames, once, in pieces of whole blocks. Not kept here: a generator refers to its object."""
        blocks: list[bytes] = []
        try:
            while self._find():
                yield from self._frame(blocks)
                self._cost.members += 1
        except EOFError as error:
            self.error = copy(error)
            if blocks:  # all that there is of a frame
                yield b"".join(blocks) + self._buffer[self._at :]
        except (zlib.error, OSError) as error:
            self.error = copy(error)
        self.has_ended = True

    def _find(self) -> bool:
        """Go to the next frame with content, over others and padding; False at the end of the file."""
        while True:
            self._at += len(self._buffer) - self._at - len(self._buffer[self._at :].lstrip(b"\0"))
            if self._at == len(self._buffer):
                self._buffer, self._at = self._file.read(_INPUT_BYTES), 0
                self._pay(len(self._buffer))
                if not self._buffer:
                    return False
            elif self._peek(4) == _ZSTD:
                self.is_new = True
                return True
            elif compression_in(self._peek(8)) == "zstd":
                self._skip(int.from_bytes(self._get(8)[4:], "little"))
                self._cost.members += 1
            else:
                raise CorruptStream("data behind a frame")

    def _frame(self, blocks: list[bytes]) -> Iterator[bytes]:
        """Header, blocks and checksum of a frame, some at once; `blocks` has those that are held back."""
        start = self._get(5)
        flags = start[4]
        is_whole = flags >> 5 & 1  # the window is the content
        n_content = (is_whole, 2, 4, 8)[flags >> 6]
        fields = self._get((1 - is_whole) + (0, 1, 2, 4)[flags & 3] + n_content)
        content = int.from_bytes(fields[len(fields) - n_content :], "little") + 256 * (n_content == 2)
        window = content if is_whole else (8 + (fields[0] & 7)) << (7 + (fields[0] >> 3))
        if window > _MAX_WINDOW:
            raise RefusedStream(f"zstd stream with a window of more than {_MAX_WINDOW >> 20} MiB")
        if any(fields[1 - is_whole : len(fields) - n_content]):
            raise RefusedStream("zstd stream that needs a dictionary")
        blocks[:] = [start, fields]
        size, is_last = 0, False
        while not is_last:
            head = self._get(_BLOCK_HEADER)
            blocks.append(head)
            is_last, n = bool(head[0] & 1), int.from_bytes(head, "little") >> 3
            if n > _MAX_BLOCK:
                raise CorruptStream("a block larger than 128 KiB")
            blocks.append(self._get(1 if head[0] >> 1 & 3 == _RLE else n))
            size += _BLOCK_HEADER + len(blocks[-1])
            if size > _UNIT and not is_last:
                yield b"".join(blocks)
                blocks[:], size = [b""], 0  # never without an item inside a frame
        blocks.append(self._get(4 * (flags >> 2 & 1)))
        yield b"".join(blocks)
        blocks.clear()

    def _peek(self, n: int) -> bytes:
        while len(self._buffer) - self._at < n and (more := self._file.read(_INPUT_BYTES)):
            self._buffer, self._at = self._buffer[self._at :] + more, 0
            self._pay(len(more))
        return self._buffer[self._at : self._at + n]

    def _get(self, n: int) -> bytes:
        data = self._peek(n)
        if len(data) < n:
            raise EOFError
        self._at += n
        return data

    def _skip(self, n: int) -> None:
        while n > 0:
            if not self._peek(1):
                raise EOFError
            step = min(n, len(self._buffer) - self._at)
            self._at, n = self._at + step, n - step

    def _pay(self, n: int) -> None:
        self._cost.taken += n
        self._cost.check()


class _File:
    """Pieces of bytes as a file, for pyarrow."""

    closed = False

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._ready = pieces, b""

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        self._ready = self._ready or next(self._pieces, b"")
        data, self._ready = self._ready[:size], self._ready[size:]
        return data

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """No."""
        return False

    def close(self) -> None:
        """Nothing to do: the pieces are another's."""


_STREAMS: dict[str, Callable[[Readable], CompressedStream]] = {
    "gzip": GzipStream,
    "xz": XzStream,
    "bzip2": Bzip2Stream,
    "zstd": ZstdStream,
}


def decompressed(file: Readable, compression: str) -> CompressedStream:
    """The content of a compressed file as a stream.

    Args:
        file: the file, at its beginning.
        compression: as `compression_in` tells it.

    Raises:
        ConfigError: no library for it is installed.
    """
    return _STREAMS[compression](file)
