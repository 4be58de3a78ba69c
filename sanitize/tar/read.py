"""A strict tar reader: archives come from strangers, and what is left out must never go unsaid.

Reads v7, ustar, GNU (long names, base-256 sizes) and PAX. A member is yielded only when all of its payload is there;
nothing is allocated because a header claims it; what cannot be used but can be stepped over costs one member
("refused"); after anything else the archive counts as broken from there on. There is no resynchronising: payloads come
from strangers too and may contain perfect headers, so a search for the next good checksum would turn payload bytes
into members.
"""

import gzip
import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple
from zlib import error as zlib_error

from pydantic import BaseModel, ConfigDict, Field

from sanitize.errors import DataError
from sanitize.tar.compression import BarrenStream
from sanitize.tar.write import BLOCK, GNU, MAX_NAME_BYTES, POSIX, ZEROS, byte_sum

_CHUNK = 1 << 20  # most that is asked of the stream at once
_LEAST = 1 << 13  # read-ahead after a long seek
_MAX_RECORDS = 1000  # in one PAX header; writers put about ten there
_ASCII = bytes(range(128))
_NO_PAYLOAD = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "fifo"}
_PAYLOAD = {b"S": "sparse file", b"D": "GNU dump directory", b"M": "part of another volume", b"V": "volume label"}
_FILE, _PAX = ord("0"), ord("x")
_FIELDS = struct.Struct("100s 24x 11s 13x 6s 358x")  # of a header: name, size, checksum
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Kind = Literal["file", "directory", "other", "refused"]


class TarDamage(DataError):
    """The archive is broken from `offset` on; every member yielded before is whole and stands.

    Attributes:
        reason: a few fixed words, such as "truncated in a member" or "bad header checksum".
        offset: first byte of what could not be read (of its first header), counted as `Member.offset` is.
    """

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason, offset)
        self.reason, self.offset = reason, offset

    def __str__(self) -> str:
        return f"{self.reason} at byte {self.offset} of the archive"


class Member(NamedTuple):
    """One member. Offsets count bytes of the uncompressed archive from where the reader began.

    Attributes:
        name: as stored, with the "/" behind a directory; bytes that are not UTF-8 are surrogate-escaped, so that
            `name.encode("utf-8", "surrogateescape")` gives them back. May be anything: see `unsafe_name`.
        kind: "file" has a payload to read; "other" is a link, device, sparse file or the like; "refused" is beyond
            the limits or has broken extension headers (then its name may be incomplete).
        offset: of the payload.
        size: of the payload in the archive, in bytes; 0 where the type has none.
        start: of its first header, extension headers included.
        end: behind its padding, where the next member starts.
        reason: for "other" and "refused", what it is in a few fixed words; else "".
    """

    name: str
    kind: Kind
    offset: int
    size: int
    start: int
    end: int
    reason: str = ""


class TarLimits(BaseModel):
    """What an archive may ask of us.

    Attributes:
        max_member_bytes: a larger file is refused, and stepped over.
        max_name_bytes: a member with a longer name is refused; the name it reports is cut there.
        max_extension_bytes: one PAX or GNU long-name header; the member behind a larger one is refused.
        max_headers_bytes: all headers before one payload; an archive with more counts as broken there.
        max_trailing_bytes: read behind the end-of-archive marker to see whether something hides there, and to reach
            the checksum of a compressed stream.
        max_archive_bytes: read from the stream in all; bounds the time a compression bomb takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_member_bytes: int = Field(default=2**30, gt=0)
    max_name_bytes: int = Field(default=MAX_NAME_BYTES, ge=256)  # a ustar header alone can hold 256
    max_extension_bytes: int = Field(default=2**16, gt=0)
    max_headers_bytes: int = Field(default=2**21, gt=0)
    max_trailing_bytes: int = Field(default=2**24, ge=0)
    max_archive_bytes: int = Field(default=2**38, gt=0)


_DEFAULT_LIMITS = TarLimits()


class TarReader:
    """Iterates once over the members of an archive; `read` gives the payload of the one just yielded.

    Where the stream cannot seek (or is gzip), a file's payload is buffered before its member is yielded; so memory is
    at most about twice `max_member_bytes`, and never more than about twice what the stream really delivered.

    Args:
        stream: blocking, positioned at the first header; left open, at no particular position.
        limits: see TarLimits.

    Attributes:
        warning: something odd that cost no member we know of, e.g. "no end-of-archive marker"; complete after the
            last member.

    Raises:
        TarDamage: from the iteration, where the archive is broken.
    """

    def __init__(self, stream: BinaryIO, limits: TarLimits = _DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.warning: str | None = None
        self._max_plain_bytes = limits.max_member_bytes  # a test sets -1, to send everything the long way
        self._source = Source(stream, limits.max_archive_bytes)
        self._current: Member | None = None
        self._members = self._walk()

    def __iter__(self) -> Iterator[Member]:
        return self._members

    def read(self) -> bytes:
        """Payload of the member just yielded, which must be a "file"; may be repeated until the next is asked for.

        Raises:
            ValueError: there is no such member, or it is no file.
            TarDamage: the file became shorter while it was read.
        """
        member, source = self._current, self._source
        if member is None or member.kind != "file":
            raise ValueError("read() needs a member of kind 'file' that was just yielded")
        if not source.cover(member.offset, member.size):
            raise self._damage("truncated in a member", member.start)
        index = member.offset - source.base
        return source.window[index : index + member.size]

    def _walk(self) -> Iterator[Member]:
        source = self._source
        end = at = 0  # of the payload before; of the next header
        try:
            while True:
                window, index = source.window, at - source.base
                if index + BLOCK > len(window):
                    source.cover(end, at - end + BLOCK)
                    window, index = source.window, at - source.base
                member = self._plain(window, index, at) or self._chain(at)
                if member is None:
                    return
                end, at = member.offset + member.size, member.end
                if end > source.present and not self._fetch(member):
                    raise self._damage("truncated in a member", member.start)
                self._current = member
                yield member
        finally:
            self._current = None

    def _fetch(self, member: Member) -> bool:
        """Make sure that the payload is there, and a file's at hand; False where it is not."""
        if self._source.seeks:
            return False  # `present` was the length of the stream
        skipped = member.size if member.kind != "file" else 0
        return self._source.cover(member.offset + skipped, member.size - skipped)

    def _plain(self, window: bytes, index: int, at: int) -> Member | None:
        """The fast way, for the headers that most writers give to a file with a short ASCII name; None for others."""
        found, offset = _plain_header(window[index : index + BLOCK]), at + BLOCK
        if found is not None and found[0] == _PAX:
            body, pax_size = window[index + BLOCK : index + 2 * BLOCK], found[2]
            if not tells_only_time(body, pax_size) or pax_size > self.limits.max_extension_bytes:
                return None
            found, offset = _plain_header(window[index + 2 * BLOCK : index + 3 * BLOCK]), at + 3 * BLOCK
        if found is None or found[0] == _PAX or found[2] > self._max_plain_bytes:
            return None
        _, name, size = found
        # Member(...) goes through a Python-level __new__ at twice the cost.
        return tuple.__new__(Member, (name, "file", offset, size, at, offset + (size + 511 & -512), ""))

    def _chain(self, start: int) -> Member | None:
        """Any member: its extension headers, then its header; None at the end of the archive."""
        at, extra = start, _Extra()
        while True:
            block = self._source.get(at, BLOCK)
            if len(block) < BLOCK:
                self._cut(block, at, start)
                return None
            self._limit_headers(at, start)
            at += BLOCK
            if block == ZEROS:
                self._finish(at, start)
                return None
            kind, name, size = _parse(block, start)
            if kind not in (b"x", b"X", b"g", b"L", b"K"):
                break
            self._extend(extra, kind, at, size, start)
            at += size + 511 & -512
        more = kind == b"S" and block[482]  # blocks of a sparse map
        while more:
            block = self._source.get(at, BLOCK)
            if len(block) < BLOCK:
                raise self._damage("truncated in a header", start)
            more, at = block[504], at + BLOCK
            self._limit_headers(at, start)
        return extra.member(kind, name, size, start, at, self.limits)

    def _limit_headers(self, at: int, start: int) -> None:
        if at - start > self.limits.max_headers_bytes:
            raise TarDamage("more extension headers before a member than max_headers_bytes", start)

    def _extend(self, extra: "_Extra", kind: bytes, at: int, size: int, start: int) -> None:
        """Note what one extension header says."""
        if size > self.limits.max_extension_bytes:
            if kind == b"g":
                self._warn("a global header larger than max_extension_bytes was ignored")
            else:
                extra.problem = "extension header larger than max_extension_bytes"
            return
        body = self._source.get(at, size + 511 & -512)
        if len(body) < size:
            raise self._damage("truncated in an extension header", start)
        if kind == b"g":
            records = _pax_records(body[:size])
            if records is None or records.keys() & {b"path", b"size"}:
                self._warn("a global header that is broken, or renames or resizes members, was ignored")
        elif kind != b"K":
            extra.add(kind, body[:size])

    def _cut(self, left: bytes, at: int, start: int) -> None:
        """The bytes end where a header is wanted: harmless only between two members."""
        if self._source.failure or left.strip(b"\0") or at != start:
            raise self._damage("truncated in a header" if left else "truncated in an extension header", start)
        self._warn("no end-of-archive marker")

    def _finish(self, at: int, start: int) -> None:
        """Behind the first zero block, at `at`."""
        if at != start + BLOCK:
            raise TarDamage("extension header without a member", start)
        second = self._source.get(at, BLOCK)
        if second.strip(b"\0"):
            raise TarDamage("data behind a single zero block", start)  # where others stop and say nothing
        if len(second) < BLOCK:
            self._warn("a single zero block at the end")
        seen = 0
        for piece in self._source.rest(at):
            seen += len(piece)
            if piece.count(0) != len(piece):
                self._warn("data behind the end-of-archive marker")
                return
            if seen > self.limits.max_trailing_bytes:
                self._warn("more than max_trailing_bytes behind the end-of-archive marker")
                return
        if not self._source.failure:
            return
        if self._source.verified < at + len(second):
            raise self._damage("", at)
        self._warn("data behind the end of the compressed stream")  # the checksum of what holds the samples was right

    def _damage(self, reason: str, offset: int) -> TarDamage:
        return TarDamage(self._source.failure or reason, offset)

    def _warn(self, what: str) -> None:
        self.warning = self.warning or what


class Source:
    """The archive's bytes, forward only: `window` holds those from offset `base` on.

    `present`: bytes up to here are known to be there. `failure`: why the stream gives no more, "" for a plain end.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.window, self.base, self.present, self.failure = b"", 0, 0, ""
        self._stream, self._left, self._ahead, self._origin = stream, limit, _LEAST, 0
        # read1 hands out what a damaged gzip stream still gave; read would lose it with the exception.
        self._read = getattr(stream, "read1", stream.read)
        self.seeks = stream.seekable() and not isinstance(getattr(stream, "raw", stream), gzip.GzipFile)
        if self.seeks:
            self._origin = stream.tell()
            self.present = stream.seek(0, os.SEEK_END) - self._origin
            stream.seek(self._origin)

    @property
    def verified(self) -> int:
        """Bytes whose checksum was right, where the stream has checksums."""
        return int(getattr(self._stream, "verified", 0))

    def cover(self, start: int, n: int) -> bool:
        """Make the window hold bytes start : start + n, start >= base; False where they end before."""
        have = self.base + len(self.window) - start
        if have >= n:
            return True
        pieces = [self.window[-have:]] if have > 0 else []
        if have < 0:
            missing = self._advance(start, -have)
            start, n, have = start - missing, n + missing, 0
        ahead = self._ahead if n <= _CHUNK else 0
        while have < n and (piece := self._pull(max(n - have, ahead))):
            pieces.append(piece)
            have += len(piece)
        self.window, self.base = b"".join(pieces), start
        self.present = max(self.present, start + have)
        self._ahead = min(2 * self._ahead, _CHUNK)
        return have >= n

    def get(self, start: int, n: int) -> bytes:
        """Bytes start : start + n, or as many of them as there are."""
        self.cover(start, n)
        index = start - self.base
        return self.window[index : index + n]

    def rest(self, at: int) -> Iterator[bytes]:
        """Everything from offset `at` on, in pieces."""
        yield self.window[at - self.base :]
        while piece := self._pull(_CHUNK):
            yield piece

    def _advance(self, start: int, gap: int) -> int:
        """Step over `gap` bytes up to `start`; how many of them are missing."""
        if self.seeks:
            missing = max(start - self.present, 0)
            self._stream.seek(self._origin + start - missing)
            self._ahead = _LEAST if gap > self._ahead else self._ahead
            return missing
        while gap > 0 and (piece := self._pull(gap)):
            gap -= len(piece)
        return gap

    def _pull(self, n: int) -> bytes:
        if not self.failure and self._left <= 0:
            self.failure = "archive larger than max_archive_bytes"
        if self.failure:
            return b""
        try:
            piece: bytes = self._read(min(n, _CHUNK))
        except EOFError:
            self.failure = "compressed stream is cut"
            return b""
        except (gzip.BadGzipFile, zlib_error) as error:
            self.failure = str(error) if isinstance(error, BarrenStream) else "compressed stream is corrupt"
            return b""
        self._left -= len(piece)
        return piece


class _Extra:
    """What extension headers say about the member behind them."""

    name, size, sparse, problem = b"", -1, False, ""

    def add(self, kind: bytes, body: bytes) -> None:
        if kind == b"L":
            self.name = self.name or body.partition(b"\0")[0]
            return
        records = _pax_records(body)
        size = (records or {}).get(b"size", b"0")
        if records is None or not size.isdigit() or len(size) > 20:
            self.problem = self.problem or "broken extension header"
            return
        self.name = records.get(b"GNU.sparse.name") or records.get(b"path") or self.name
        self.size = int(size) if b"size" in records else self.size
        self.sparse = self.sparse or any(key.startswith(b"GNU.sparse.") for key in records)

    def member(self, kind: bytes, name: bytes, size: int, start: int, offset: int, limits: TarLimits) -> Member:
        """What the header and these say together; `offset` is that of the payload."""
        name, size = self.name or name, size if self.size < 0 else self.size
        what: Kind = "other"
        reason = _NO_PAYLOAD.get(kind) or _PAYLOAD.get(kind) or f"type {chr(kind[0])!r}"
        if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):  # v7 has no type for directories
            what, reason, size = "directory", "", 0
        elif kind in (b"0", b"\0", b"7"):
            what, reason = ("other", "sparse file") if self.sparse else ("file", "")
        elif kind in _NO_PAYLOAD:
            size = 0  # whatever the field says: Python's tarfile, which loaders use, reads it so
        problem = self.problem
        if what == "file" and size > limits.max_member_bytes:
            problem = problem or "larger than max_member_bytes"
        if len(name) > limits.max_name_bytes:
            problem = problem or "name longer than max_name_bytes"
            name = name[: limits.max_name_bytes]
        if problem:
            what, reason = "refused", problem
        text = name.decode("utf-8", "surrogateescape")
        return Member(text, what, offset, size, start, offset + (size + 511 & -512), reason)


def _plain_header(block: bytes) -> tuple[int, str, int] | None:
    """Type (_FILE or _PAX), name and size, where all of the block is as most writers do it."""
    if len(block) < BLOCK or not block.isascii():
        return None
    kind, magic = block[156], block[257:265]
    if kind not in (_FILE, _PAX) or not (magic == GNU or (magic == POSIX and not block[345])):
        return None
    if block[135] or not block.startswith(b"\0 ", 154):
        return None
    name, digits, stored = _FIELDS.unpack(block)
    if not digits.isdigit() or not stored.isdigit():
        return None
    try:
        size, checksum = int(digits, 8), int(stored, 8)
    except ValueError:
        return None
    # 7 x 32: blanks instead of the six digits, for a blank and a NUL are there already as one blank.
    if byte_sum(block) - byte_sum(stored) + 7 * 32 != checksum:
        return None
    name = name.rstrip(b"\0")
    return None if b"\0" in name else (kind, name.decode(), size)


def tells_only_time(body: bytes, size: int) -> bool:
    """True for the PAX header most writers put before a file: the time of modification in a single record."""
    return body.startswith(b"%d mtime=" % size) and size <= len(body) and body[size - 1] == 10


def _pax_records(body: bytes) -> dict[bytes, bytes] | None:
    """Records "LENGTH KEY=VALUE\\n" up to the end or a NUL; None if one is malformed, or there are too many."""
    records: dict[bytes, bytes] = {}
    at = 0
    for _ in range(_MAX_RECORDS):
        if at >= len(body) or not body[at]:
            return records
        length, _, _ = body[at : at + 20].partition(b" ")
        end = at + int(length) if length.isdigit() else 0
        key, equals, value = body[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals or not at < end <= len(body) or body[end - 1] != 10:
            return None
        records[key] = value
        at = end
    return None


def _parse(block: bytes, start: int) -> tuple[bytes, bytes, int]:
    """Type, name and size of any header block; `start` is for the error."""
    fields, rest = block[:148], block[156:]
    total = byte_sum(fields) + 8 * 32 + (byte_sum(rest) if rest.isascii() else sum(rest))
    stored = _number(block[148:156])
    # Some old writers summed signed characters: 256 less for each byte that is not ASCII.
    if stored != total and stored != total - 256 * len((fields + rest).translate(None, _ASCII)):
        raise TarDamage("bad header checksum", start)
    size = _number(block[124:136])
    if size is None:
        raise TarDamage("bad size field", start)
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == POSIX[:6]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return block[156:157], name, size


def _number(field: bytes) -> int | None:
    """Octal, or GNU's base 256; None for what is neither or is negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.partition(b"\0")[0].strip(b" ") or b"0"
    return int(digits, 8) if digits.isdigit() and not (b"8" in digits or b"9" in digits) else None


def unsafe_name(name: str) -> str | None:
    """Why an extractor must not write a file of this name, on any platform; None if it may."""
    if name[:1] not in ("", "/", "\\") and name[1:2] != ":" and ".." not in name and not _CONTROL.search(name):
        return None
    if not name:
        return "empty"
    if _CONTROL.search(name):
        return "control character"
    if name[0] in "/\\":
        return "absolute path"
    if name[1:2] == ":":
        return "drive letter"
    return "'..' component" if ".." in re.split(r"[/\\]", name) else None
