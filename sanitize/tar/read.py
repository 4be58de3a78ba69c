"""A strict tar reader for untrusted archives: everything that is left out is reported.

Reads v7, ustar, GNU (long names, base-256 sizes) and PAX. A member is yielded only when its whole payload is present;
memory is not allocated for what a header merely claims. A member that cannot be used but can be stepped over is
"refused"; after any other damage the archive counts as broken from there on. The reader does not resynchronise:
payloads are untrusted too and may contain perfect headers, so a search for the next good checksum would turn payload
bytes into members.
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
from sanitize.tar.compression import RefusedStream
from sanitize.tar.write import BLOCK, GNU, MAX_NAME_BYTES, POSIX, ZEROS, byte_sum

_CHUNK = 1 << 20  # bytes; largest request to the stream
_LEAST = 1 << 13  # bytes; read-ahead after a long seek
_MAX_RECORDS = 1000  # in one PAX header; writers put about ten there
_ASCII = bytes(range(128))
_NO_PAYLOAD = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "fifo"}
_PAYLOAD = {b"S": "sparse file", b"D": "GNU dump directory", b"M": "part of another volume", b"V": "volume label"}
_FILE, _PAX = ord("0"), ord("x")
_FIELDS = struct.Struct("100s 24x 11s 13x 6s 358x")  # of a header: name, size, checksum
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Kind = Literal["file", "directory", "other", "refused"]


class TarDamage(DataError):
    """The archive is broken from `offset` on; the members yielded before are whole and valid.

    Attributes:
        reason: one of a few fixed texts, such as "truncated in a member" or "bad header checksum".
        offset: first byte of the unreadable member (of its first header), counted like `Member.offset`.
    """

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason, offset)
        self.reason, self.offset = reason, offset

    def __str__(self) -> str:
        return f"{self.reason} at byte {self.offset} of the archive"


class Member(NamedTuple):
    """One member. Offsets count bytes of the uncompressed archive from where the reader began.

    Attributes:
        name: name as stored, with the "/" behind a directory; bytes that are not UTF-8 are surrogate-escaped, so that
            `name.encode("utf-8", "surrogateescape")` gives them back. Not checked: see `unsafe_name`.
        kind: "file" has a payload to read; "other" is a link, device, sparse file or the like; "refused" is beyond
            the limits or has broken extension headers (its name may be incomplete).
        offset: first byte of the payload.
        size: size of the payload in the archive, in bytes; 0 where the type has none.
        start: first byte of its first header, extension headers included.
        end: byte behind its padding, where the next member starts.
        reason: description of "other" and "refused" in a few fixed words; else "".
    """

    name: str
    kind: Kind
    offset: int
    size: int
    start: int
    end: int
    reason: str = ""


class TarLimits(BaseModel):
    """Limits on what is read of an archive.

    Attributes:
        max_member_bytes: size of a file; larger files are refused and stepped over.
        max_name_bytes: length of a name; a member with a longer name is refused, and its reported name is cut.
        max_extension_bytes: size of one PAX or GNU long-name header; the member behind a larger one is refused.
        max_headers_bytes: size of all headers before one payload; an archive with more counts as broken there.
        max_trailing_bytes: bytes read behind the end-of-archive marker, to find hidden data and to reach the checksum
            of a compressed stream.
        max_archive_bytes: bytes read from the stream in all; bounds the time that a compression bomb takes.
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
    """Iterate once over the members of an archive; `read` returns the payload of the last yielded member.

    Where the stream cannot seek (or is compressed), the payload of a file is buffered before its member is yielded.
    Memory is at most about twice `max_member_bytes`, and at most about twice what the stream delivered.

    Args:
        stream: blocking stream, positioned at the first header; it is left open, at no particular position.
        limits: limits on what is read.

    Attributes:
        warning: an oddity that cost no known member, e.g. "no end-of-archive marker"; complete after the last member.
        joined_at: first byte of another archive behind the end-of-archive marker (`cat a.tar b.tar`), which is not
            read; None where there is none.

    Raises:
        TarDamage: from the iteration, where the archive is broken.
    """

    def __init__(self, stream: BinaryIO, limits: TarLimits = _DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.warning: str | None = None
        self.joined_at: int | None = None
        self._max_plain_bytes = limits.max_member_bytes  # tests set -1: then `_chain` reads every member
        self._source = Source(stream, limits.max_archive_bytes)
        self._current: Member | None = None
        self._has_begun = False

    def __iter__(self) -> Iterator[Member]:
        # Not kept here: a generator refers to its object, and a ring would keep the stream.
        if self._has_begun:
            raise ValueError("a TarReader is iterated once")
        self._has_begun = True
        return self._walk()

    def read(self) -> bytes:
        """Payload of the last yielded member, a "file"; may be called repeatedly until the next member.

        Raises:
            ValueError: there is no such member, or it is no file.
            TarDamage: the archive became shorter while it was read.
        """
        member, source = self._current, self._source
        if member is None or member.kind != "file":
            raise ValueError("read() needs a member of kind 'file' that was just yielded")
        if not source.cover(member.offset, member.size):
            raise self._damage("truncated in a member", member.start)
        index = member.offset - source.base
        return source.window[index : index + member.size]

    @property
    def head(self) -> bytes:
        """First bytes of the archive, as long as no more than its first header was read."""
        return self._source.window[:BLOCK] if self._source.base == 0 else b""

    def _walk(self) -> Iterator[Member]:
        source = self._source
        end = at = 0  # end of the payload before; offset of the next header
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
        """Step over the payload, or buffer that of a file; False where the stream ends before."""
        if self._source.seeks:
            return False  # `present` was the length of the stream
        skipped = member.size if member.kind != "file" else 0
        return self._source.cover(member.offset + skipped, member.size - skipped)

    def _plain(self, window: bytes, index: int, at: int) -> Member | None:
        """Fast path for the headers that most writers give to a file with a short ASCII name; None for others."""
        found, offset = _plain_header(window[index : index + BLOCK]), at + BLOCK
        if found is not None and found[0] == _PAX:
            body, pax_size = window[index + BLOCK : index + 2 * BLOCK], found[2]
            if not has_only_mtime(body, pax_size) or pax_size > self.limits.max_extension_bytes:
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
        more = kind == b"S" and block[482]  # more blocks of a sparse map follow
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
        """Add the fields of one extension header."""
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
        """The stream ends where a header is expected: harmless only between two members."""
        if self._source.failure or left.strip(b"\0") or at != start:
            raise self._damage("truncated in a header" if left else "truncated in an extension header", start)
        self._warn("no end-of-archive marker")

    def _finish(self, at: int, start: int) -> None:
        """Check what follows the first zero block; `at` is the byte behind it."""
        if at != start + BLOCK:
            raise TarDamage("extension header without a member", start)
        second = self._source.get(at, BLOCK)
        if second.strip(b"\0"):
            raise TarDamage("data behind a single zero block", start)  # other readers stop here without an error
        if len(second) < BLOCK:
            self._warn("a single zero block at the end")
        seen = 0
        pieces = self._source.rest(at)
        for piece in pieces:
            if left := piece.lstrip(b"\0"):
                while len(left) < BLOCK and (more := next(pieces, b"")):
                    left += more
                if _is_header(left[:BLOCK]):
                    self.joined_at = at + seen + len(piece) - len(piece.lstrip(b"\0"))
                    self._warn("another archive behind the end-of-archive marker is not read")
                else:
                    self._warn("data behind the end-of-archive marker")
                return
            seen += len(piece)
            if seen > self.limits.max_trailing_bytes:
                self._warn("more than max_trailing_bytes behind the end-of-archive marker")
                return
        if not self._source.failure:
            return
        if self._source.verified < at + len(second):
            raise self._damage("", at)
        self._warn("data behind the end of the compressed stream")  # the members before it passed their checksum

    def _damage(self, reason: str, offset: int) -> TarDamage:
        return TarDamage(self._source.failure or reason, offset)

    def _warn(self, what: str) -> None:
        self.warning = self.warning or what


class Source:
    """Bytes of the archive, forward only: `window` holds those from offset `base` on.

    Bytes up to `present` are known to exist. `failure` is the reason why the stream ends early, "" for a plain end.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.window, self.base, self.present, self.failure = b"", 0, 0, ""
        self._stream, self._left, self._ahead, self._origin = stream, limit, _LEAST, 0
        # read1 returns the bytes before the damage in a gzip stream; read would lose them with the exception.
        self._read = getattr(stream, "read1", stream.read)
        self.seeks = stream.seekable() and not isinstance(getattr(stream, "raw", stream), gzip.GzipFile)
        if self.seeks:
            self._origin = stream.tell()
            self.present = stream.seek(0, os.SEEK_END) - self._origin
            stream.seek(self._origin)

    @property
    def verified(self) -> int:
        """Number of bytes whose checksum was right, where the stream has checksums."""
        return int(getattr(self._stream, "verified", 0))

    def cover(self, start: int, n: int) -> bool:
        """Make the window hold bytes start : start + n, start >= base; False where the stream ends before."""
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
        """Bytes start : start + n, or fewer at the end of the stream."""
        self.cover(start, n)
        index = start - self.base
        return self.window[index : index + n]

    def rest(self, at: int) -> Iterator[bytes]:
        """Everything from offset `at` on, in pieces."""
        yield self.window[at - self.base :]
        while piece := self._pull(_CHUNK):
            yield piece

    def _advance(self, start: int, gap: int) -> int:
        """Step over `gap` bytes up to `start`; returns the number of missing bytes."""
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
            self.failure = str(error) if isinstance(error, RefusedStream) else "compressed stream is corrupt"
            return b""
        self._left -= len(piece)
        return piece


class _Extra:
    """Fields of the extension headers before a member."""

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
        """The member, from its header and these fields; `offset` is that of the payload."""
        name, size = self.name or name, size if self.size < 0 else self.size
        what: Kind = "other"
        reason = _NO_PAYLOAD.get(kind) or _PAYLOAD.get(kind) or f"type {chr(kind[0])!r}"
        if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):  # v7 has no type for directories
            what, reason, size = "directory", "", 0
        elif kind in (b"0", b"\0", b"7"):
            what, reason = ("other", "sparse file") if self.sparse else ("file", "")
        elif kind in _NO_PAYLOAD:
            size = 0  # as in Python's tarfile, which loaders use: the size field is ignored
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
    """Type (_FILE or _PAX), name and size of a header as most writers make it; else None."""
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


def has_only_mtime(body: bytes, size: int) -> bool:
    """True for the PAX header that most writers put before a file: the time of modification in a single record."""
    return body.startswith(b"%d mtime=" % size) and size <= len(body) and body[size - 1] == 10


def _pax_records(body: bytes) -> dict[bytes, bytes] | None:
    """Records "LENGTH KEY=VALUE\\n" up to the end or a NUL; None if one is malformed or there are too many."""
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


def _is_header(block: bytes) -> bool:
    try:
        return len(block) == BLOCK and bool(_parse(block, 0))
    except TarDamage:
        return False


def _number(field: bytes) -> int | None:
    """Value of an octal field, or of GNU's base 256; None for negative and malformed fields."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.partition(b"\0")[0].strip(b" ") or b"0"
    return int(digits, 8) if digits.isdigit() and not (b"8" in digits or b"9" in digits) else None


def unsafe_name(name: str) -> str | None:
    """Reason why a file of this name is unsafe to extract on some platform, or None."""
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
