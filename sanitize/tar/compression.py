"""Compression of shards, by first bytes and not by name. gzip is read; other known compressions are named."""

import zlib
from typing import Protocol

GZIP = b"\x1f\x8b"
# Archives that are not read, by suffix; they are reported among the shards, not ignored.
UNREAD_SUFFIXES = {
    **dict.fromkeys((".tar.xz", ".txz", ".tar.lzma", ".tlz"), "xz"),
    **dict.fromkeys((".tar.zst", ".tar.zstd", ".tzst"), "zstd"),
    **dict.fromkeys((".tar.bz2", ".tbz2", ".tbz"), "bzip2"),
    ".tar.lz4": "lz4",
    ".tar.lz": "lzip",
    ".tar.br": "brotli",
    ".tar.z": "compress",
    ".zip": "zip",
    ".7z": "7z",
    ".rar": "rar",
}
_UNREAD_MAGIC = {
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0\x80": "xz",  # the older .lzma
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x1f\x9d": "compress",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
# Files in place of shards after a failed download.
_NOT_ARCHIVES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for: run `git lfs pull`",
    b"<!doctype html": "a web page, not an archive",
    b"<html": "a web page, not an archive",
    b"<?xml": "an XML document, not an archive",
}
HEAD_BYTES = 32  # length of the `head` of `explain`
_INPUT_BYTES = 1 << 14  # compressed bytes read at once
# Allowance for everything in a gzip stream but content: names, comments, padding, empty blocks, tiny members.
_FREE_BYTES = 1 << 20  # and twice the content
_FREE_MEMBERS = 10_000  # and one for each KiB of content; a member takes 15 us


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


def is_compressed(name: str) -> bool:
    """True for names in .gz or .tgz, in any case. Shards are written in the compression that their name says."""
    return name.lower().endswith((".gz", ".tgz"))


def explain(head: bytes) -> str | None:
    """Description of a file that is no tar archive, from its first bytes; None if they are unknown."""
    if not head:
        return "an empty file of 0 bytes"
    for magic, what in _UNREAD_MAGIC.items():
        if head.startswith(magic):
            return not_read(what)
    return next((what for start, what in _NOT_ARCHIVES.items() if head.lower().startswith(start)), None)


class BarrenStream(zlib.error):
    """A gzip stream with too little content for its length; the message can be a `TarDamage.reason`."""


class GzipStream:
    """A gzip stream of one or more members, decompressed forward; its content bounds the time.

    Header fields (a name, a comment) are stepped over by zlib and not held in memory.

    Attributes:
        verified: number of decompressed bytes in members whose checksum was right.
    """

    def __init__(self, file: Readable) -> None:
        self.verified = 0
        self._file = file
        self._input = b""
        self._n = self._taken = self._members = 0
        self._inflate = _new_inflate()
        self._error: zlib.error | None = None
        self._rescued = b""

    def seekable(self) -> bool:
        """No."""
        return False

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end of the last member.

        Raises:
            EOFError: the stream is cut.
            zlib.error: the stream is corrupt, a member is followed by other data, or the stream is a BarrenStream. The
                bytes before the damage are returned first.
        """
        while self._error is None:
            if self._inflate.eof:
                if not self._next_member():
                    return b""
                continue
            self._input = self._input or self._file.read(_INPUT_BYTES)
            is_end = not self._input
            data = self._decompress(size)
            if data:
                return data
            if is_end and not self._inflate.eof:
                raise EOFError
        if not self._rescued:
            raise self._error
        data, self._rescued = self._rescued[:size], self._rescued[size:]
        return data

    def _decompress(self, size: int) -> bytes:
        before = self._inflate.copy()
        try:
            data = self._inflate.decompress(self._input, size)
        except zlib.error as error:
            self._error, self._rescued = error, _before_damage(before, self._input)
            return b""
        left = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
        self._n += len(data)
        if self._inflate.eof:
            self.verified, self._members = self._n, self._members + 1
        self._take(len(self._input) - len(left))
        self._input = left
        return data

    def _take(self, n: int) -> None:
        """Count compressed bytes; set the error where they are too many for the content."""
        self._taken += n
        if self._taken > 2 * self._n + _FREE_BYTES:
            self._error = BarrenStream("compressed stream of little but headers, padding or empty blocks")
        elif self._members > self._n // 1024 + _FREE_MEMBERS:
            self._error = BarrenStream("compressed stream of too many small members")

    def _next_member(self) -> bool:
        """Go to the next member, over padding zeros; False where the file ends."""
        block = self._input
        while not (left := block.lstrip(b"\0")) and self._error is None:
            self._take(len(block))
            block = self._file.read(_INPUT_BYTES)
            if not block:
                return False
        self._take(len(block) - len(left))
        self._input, self._inflate = left, _new_inflate()
        return True


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
