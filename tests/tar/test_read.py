"""The strict tar reader and writer against crafted bytes, Python's tarfile, GNU tar, and chance."""

import gzip
import hashlib
import io
import os
import pickle
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanitize.errors import DataError
from sanitize.tar.read import Member, TarDamage, TarLimits, TarReader, unsafe_name
from sanitize.tar.write import TarWriter

END = bytes(1024)
LIMITS = TarLimits(max_member_bytes=5000, max_name_bytes=300, max_extension_bytes=2000)


class Forward:
    """A stream that cannot seek and gives at most 700 bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def read(self, n: int = -1) -> bytes:
        return self._stream.read(min(n, 700))

    def seekable(self) -> bool:
        return False


def _gunzip(data: bytes) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data, 1))))


OPENERS: dict[str, Callable[[bytes], Any]] = {"seekable": io.BytesIO, "forward": Forward, "gzip": _gunzip}


class Outcome(NamedTuple):
    """Result of reading an archive: members with their payloads, then the damage or warning."""

    members: list[tuple[Member, bytes]]
    damage: tuple[str, int] | None
    warning: str | None


def outcome(stream: Any, limits: TarLimits = LIMITS, fast: bool = True, read: bool = True) -> Outcome:
    reader, members, damage = TarReader(stream, limits), [], None
    if not fast:
        reader._max_plain_bytes = -1
    try:
        for member in reader:
            members.append((member, reader.read() if read and member.kind == "file" else b""))
    except TarDamage as error:
        damage = (error.reason, error.offset)
    return Outcome(members, damage, reader.warning)


def everywhere(data: bytes, limits: TarLimits = LIMITS) -> Outcome:
    """The outcome, which must not depend on the kind of stream, the fast path, or skipped payloads."""
    first = outcome(io.BytesIO(data), limits)
    bare = first._replace(members=[(member, b"") for member, _ in first.members])
    for opener in OPENERS.values():
        for fast in (True, False):
            assert outcome(opener(data), limits, fast) == first
            assert outcome(opener(data), limits, fast, read=False) == bare
    return first


# --- crafted bytes, written out the slow, obvious way ---


def header(
    name: bytes = b"a.jpg",
    size: int | bytes = 0,
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    signed: bool = False,
    linkname: bytes = b"",
) -> bytes:
    field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    before = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0"
    after = kind + linkname.ljust(100, b"\0") + magic + bytes(64) + b"0000000\0" * 2 + prefix.ljust(167, b"\0")
    total = sum(b - 256 if signed and b > 127 else b for b in before + b" " * 8 + after)
    block = before + b"%06o\0 " % total + after
    assert len(block) == 512
    return block


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def item(name: bytes = b"a.jpg", data: bytes = b"payload", kind: bytes = b"0", **fields: Any) -> bytes:
    return header(name, len(data), kind, **fields) + pad(data)


def record(key: bytes, value: bytes) -> bytes:
    tail = b" " + key + b"=" + value + b"\n"
    return next(b"%d" % n + tail for n in range(9999) if len(b"%d" % n + tail) == n)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return item(b"PaxHeader", b"".join(records), kind)


def base256(value: int) -> bytes:
    return (value % 2**96 | 1 << 95).to_bytes(12)


A, B, LONG = item(b"a.jpg"), item(b"b.jpg"), b"d/" * 50 + b"n" * 100
GNU, V7 = b"ustar  \0", bytes(8)
SPARSE_0 = header(b"sparse", 512, b"S", GNU)
SPARSE = bytearray(SPARSE_0)
SPARSE[482] = 1
SPARSE[148:156] = b"%06o\0 " % (sum(SPARSE_0[:148]) + 256 + sum(SPARSE_0[156:]) + 1)
MAP, LAST_MAP = bytes(504) + b"\1" + bytes(7), bytes(512)

# Archive between A and B (or alone, where it says so): what is yielded for it, as (name, kind or payload, reason).
STEPS_OVER: dict[str, tuple[bytes, list[tuple[str, str | bytes, str]]]] = {
    "nothing": (b"", []),
    "v7 file": (item(b"v7", magic=V7, kind=b"\0"), [("v7", b"payload", "")]),
    "v7 directory": (header(b"v7/", magic=V7, kind=b"\0"), [("v7/", "directory", "")]),
    "contiguous file": (item(b"c", kind=b"7"), [("c", b"payload", "")]),
    "gnu file": (item(b"g", magic=GNU), [("g", b"payload", "")]),
    "gnu has no prefix": (item(b"g", magic=GNU, prefix=b"13370"), [("g", b"payload", "")]),
    "ustar prefix": (item(b"n", prefix=b"p/q"), [("p/q/n", b"payload", "")]),
    "100 and 155 bytes": (item(b"n" * 100, prefix=b"p" * 155), [("p" * 155 + "/" + "n" * 100, b"payload", "")]),
    "signed checksum": (item(b"\xe9.jpg", signed=True), [("\udce9.jpg", b"payload", "")]),
    "unsigned checksum": (item("é.jpg".encode()), [("é.jpg", b"payload", "")]),
    "name not utf-8": (item(b"\xff\xfe.jpg"), [("\udcff\udcfe.jpg", b"payload", "")]),
    "bytes behind the name's NUL": (item(b"x\0y"), [("x", b"payload", "")]),
    "absolute name": (item(b"/etc/passwd"), [("/etc/passwd", b"payload", "")]),
    "parent name": (item(b"../x"), [("../x", b"payload", "")]),
    "empty name": (item(b""), [("", b"payload", "")]),
    "empty file": (item(b"e", b""), [("e", b"", "")]),
    "size base 256": (header(b"x", base256(3)) + pad(b"abc"), [("x", b"abc", "")]),
    "size with blanks": (header(b"x", b"      3 ") + pad(b"abc"), [("x", b"abc", "")]),
    "size with 12 digits": (header(b"x", b"000000000003") + pad(b"abc"), [("x", b"abc", "")]),
    "size field empty": (header(b"x", b""), [("x", b"", "")]),
    "directory": (header(b"d/", kind=b"5"), [("d/", "directory", "")]),
    "directory with a size": (header(b"d/", 4096, b"5"), [("d/", "directory", "")]),
    "symlink": (header(b"l", kind=b"2", linkname=b"/etc"), [("l", "other", "symbolic link")]),
    "hard link with a size": (header(b"l", 7, b"1", linkname=b"a.jpg"), [("l", "other", "hard link")]),
    "character device": (header(b"l", kind=b"3"), [("l", "other", "character device")]),
    "block device": (header(b"l", kind=b"4"), [("l", "other", "block device")]),
    "fifo": (header(b"l", kind=b"6"), [("l", "other", "fifo")]),
    "volume label": (header(b"l", kind=b"V", magic=GNU), [("l", "other", "volume label")]),
    "another volume": (item(b"l", b"x" * 600, b"M", magic=GNU), [("l", "other", "part of another volume")]),
    "dump directory": (item(b"l", b"x" * 600, b"D", magic=GNU), [("l", "other", "GNU dump directory")]),
    "unknown type": (item(b"l", b"x" * 600, b"Z"), [("l", "other", "type 'Z'")]),
    "sparse": (SPARSE_0 + bytes(512), [("sparse", "other", "sparse file")]),
    "sparse with two maps": (bytes(SPARSE) + MAP + LAST_MAP + bytes(512), [("sparse", "other", "sparse file")]),
    "pax sparse": (
        pax(record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.name", b"real")) + item(b"GNUSparseFile.0/x"),
        [("real", "other", "sparse file")],
    ),
    "pax path": (pax(record(b"path", LONG)) + item(b"short"), [(LONG.decode(), b"payload", "")]),
    "pax path and gnu name": (
        pax(record(b"path", b"p")) + item(b"", b"g\0", b"L") + item(b"short"),
        [("p", b"payload", "")],
    ),
    "pax path with NUL": (pax(record(b"path", b"x\0y")) + item(), [("x\0y", b"payload", "")]),
    "pax path not utf-8": (pax(record(b"path", b"\xff")) + item(), [("\udcff", b"payload", "")]),
    "pax path with = and newline": (pax(record(b"path", b"a=b\nc")) + item(), [("a=b\nc", b"payload", "")]),
    "pax path empty": (pax(record(b"path", b"")) + item(b"short"), [("short", b"payload", "")]),
    "pax size": (pax(record(b"size", b"600")) + header(b"x") + pad(b"y" * 600), [("x", b"y" * 600, "")]),
    "pax mtime": (pax(record(b"mtime", b"1.5")) + item(b"x"), [("x", b"payload", "")]),
    "pax with NULs behind": (pax(record(b"path", b"p") + bytes(9)) + item(b"x"), [("p", b"payload", "")]),
    "pax empty": (pax() + item(b"x"), [("x", b"payload", "")]),
    "solaris pax": (pax(record(b"path", b"p"), kind=b"X") + item(), [("p", b"payload", "")]),
    "global comment": (pax(record(b"comment", b"c" * 40), kind=b"g") + item(b"x"), [("x", b"payload", "")]),
    "gnu long name": (item(b"././@LongLink", LONG + b"\0", b"L") + item(b"d/"), [(LONG.decode(), b"payload", "")]),
    "gnu long link": (
        item(b"././@LongLink", LONG + b"\0", b"K") + header(b"l", kind=b"2"),
        [("l", "other", "symbolic link")],
    ),
    "2000 extension headers": (pax(record(b"path", b"p")) * 2000 + item(), [("p", b"payload", "")]),
    "member too large": (
        item(b"big", b"x" * 5001),
        [("big", "refused", "larger than max_member_bytes")],
    ),
    "name too long": (
        item(b"", b"n" * 301, b"L") + item(b"x"),
        [("n" * 300, "refused", "name longer than max_name_bytes")],
    ),
    "extension header too large": (
        pax(record(b"comment", b"c" * 3000)) + item(b"x"),
        [("x", "refused", "extension header larger than max_extension_bytes")],
    ),
    "64 KiB name": (
        item(b"", b"n" * 65536, b"L") + item(b"x"),
        [("x", "refused", "extension header larger than max_extension_bytes")],
    ),
    **{
        f"pax record {bad[:24]!r}": (pax(bad) + item(b"x"), [("x", "refused", "broken extension header")])
        for bad in (
            b"99999999999999999999 path=x\n",
            b"9" * 1000 + b" path=x\n",
            b"0 path=x\n",
            b"-9 path=x\n",
            b"1 path=x\n",
            b"9 path=xx\n",
            b"8 path=x\n",
            b"7 path\n",
            b"path=x\n",
            b" \n",
            record(b"size", b"-1"),
            record(b"size", b"1e3"),
            record(b"size", b"9" * 400),
        )
    },
}

# What stands between A and B, and why nothing behind it is believed; offset relative to the end of A.
BREAKS: dict[str, tuple[bytes, str, int]] = {
    "garbage": (b"garbage!" * 64, "bad header checksum", 0),
    "payload longer than it says": (header(b"x", 4) + pad(b"y" * 600), "bad header checksum", 1024),
    "one bit": (header(b"x").replace(b"x", b"y", 1), "bad header checksum", 0),
    "negative size": (header(b"x", b"-0000000007"), "bad size field", 0),
    "negative size base 256": (header(b"x", base256(-512)), "bad size field", 0),
    "size 0o7": (header(b"x", b"0o7"), "bad size field", 0),
    "size 1_0": (header(b"x", b"1_0"), "bad size field", 0),
    "size +7": (header(b"x", b"+7"), "bad size field", 0),
    "size 00000000008": (header(b"x", b"00000000008"), "bad size field", 0),
    "size 8 EiB": (header(b"x", base256(2**63)), "truncated in a member", 0),
    "size 2**87": (header(b"x", base256(2**87)), "truncated in a member", 0),
    "size 8 GiB": (header(b"x", 8**11 - 1), "truncated in a member", 0),
    "size 4000": (header(b"x", 4000), "truncated in a member", 0),
    "pax size 8 EiB": (pax(record(b"size", b"%d" % 2**63)) + header(b"x"), "truncated in a member", 0),
    "link name of 8 EiB": (header(b"x", base256(2**63), b"K"), "truncated in an extension header", 0),
    "pax header of 1 GiB": (header(b"x", 2**30, b"x"), "truncated in an extension header", 0),
    "pax header of 1900 bytes": (header(b"x", 1900, b"x"), "truncated in an extension header", 0),
    "global header of 8 GiB": (header(b"x", 8**11 - 1, b"g"), "truncated in an extension header", 0),
    "negative pax header": (header(b"x", b"-1", b"x"), "bad size field", 0),
    "extension without a member": (pax(record(b"path", b"p")) + END, "extension header without a member", 0),
    "single zero block": (bytes(512), "data behind a single zero block", 0),
}

# A whole archive: its survivors, the damage, the warning.
WHOLE: dict[str, tuple[bytes, int, str | None, str | None]] = {
    "well formed": (A + B + END, 2, None, None),
    "empty file": (b"", 0, None, "no end-of-archive marker"),
    "only the marker": (END, 0, None, None),
    "padded to 10 KiB": (A + END + bytes(10240), 1, None, None),
    "no marker": (A + B, 2, None, "no end-of-archive marker"),
    "cut in the padding": (A + B[:-9], 2, None, "no end-of-archive marker"),
    "cut in the marker": (A + B + END[:300], 2, None, "no end-of-archive marker"),
    "half the marker": (A + B + END[:512], 2, None, "a single zero block at the end"),
    "cut in the second half": (A + B + END[:800], 2, None, "a single zero block at the end"),
    "cut in a header": (A + B[:300], 1, "truncated in a header", None),
    "cut behind a header": (A + B[:512], 1, "truncated in a member", None),
    "cut in a member": (A + B[:515], 1, "truncated in a member", None),
    "cut in a refused member": (A + header(b"x", 9000) + bytes(800), 1, "truncated in a member", None),
    "cut in a pax header": (A + pax(record(b"path", b"p"))[:520], 1, "truncated in an extension header", None),
    "cut behind a pax header": (A + pax(record(b"path", b"p")), 1, "truncated in an extension header", None),
    "cut in a sparse map": (A + bytes(SPARSE) + MAP, 1, "truncated in a header", None),
    "a second archive behind": (
        A + END + B + END,
        1,
        None,
        "another archive behind the end-of-archive marker is not read",
    ),
    "half a header behind": (A + END + B[:300], 1, None, "data behind the end-of-archive marker"),
    "global path": (
        pax(record(b"path", b"evil"), kind=b"g") + A + END,
        1,
        None,
        "a global header that is broken, or renames or resizes members, was ignored",
    ),
    "large global header": (
        pax(record(b"comment", b"c" * 3000), kind=b"g") + A + END,
        1,
        None,
        "a global header larger than max_extension_bytes was ignored",
    ),
    "not a tar": (b"\x89PNG\r\n\x1a\n" * 99, 0, "bad header checksum", None),
}


def described(members: list[tuple[Member, bytes]]) -> list[tuple[str, str | bytes, str]]:
    return [(m.name, data if m.kind == "file" else m.kind, m.reason) for m, data in members]


FIRST, LAST = ("a.jpg", b"payload", ""), ("b.jpg", b"payload", "")


@pytest.mark.parametrize("case", STEPS_OVER)
def test_odd_members_cost_at_most_themselves(case: str) -> None:
    crafted, expected = STEPS_OVER[case]
    result = everywhere(A + crafted + B + END)
    assert described(result.members) == [FIRST, *expected, LAST]
    assert (result.damage, result.warning) == (None, None)


@pytest.mark.parametrize("case", BREAKS)
def test_broken_structure_ends_the_archive(case: str) -> None:
    crafted, reason, where = BREAKS[case]
    result = everywhere(A + crafted + B + END)
    assert described(result.members)[:1] == [FIRST]
    assert len(result.members) == 1 + (where > 0)
    assert result.damage == (reason, len(A) + where)


@pytest.mark.parametrize("case", WHOLE)
def test_ends_of_archives(case: str) -> None:
    data, survivors, damage, warning = WHOLE[case]
    result = everywhere(data)
    assert len(result.members) == survivors
    assert (result.damage[0] if result.damage else None, result.warning) == (damage, warning)


def test_too_many_zeros_behind_the_marker() -> None:
    result = everywhere(A + END + bytes(5000), LIMITS.model_copy(update={"max_trailing_bytes": 4000}))
    assert result.warning == "more than max_trailing_bytes behind the end-of-archive marker"


def test_a_compression_bomb_ends_at_max_archive_bytes() -> None:
    limits = LIMITS.model_copy(update={"max_archive_bytes": 1 << 20})
    bomb = A + header(b"bomb", 1 << 26) + bytes(1 << 26) + B + END
    result = outcome(_gunzip(bomb), limits)
    assert described(result.members) == [FIRST]
    assert result.damage == ("archive larger than max_archive_bytes", len(A))


# --- gzip ---


def some_archive(n: int = 40) -> bytes:
    rng = random.Random(0)
    return written([(f"d/{i:04}.jpg", rng.randbytes(rng.randrange(2000))) for i in range(n)])


def test_gzip_cut_anywhere_keeps_what_was_whole() -> None:
    data = some_archive()
    whole = outcome(io.BytesIO(data)).members
    packed = gzip.compress(data, 1)
    kept = []
    for cut in [*range(0, len(packed), 997), *range(len(packed) - 12, len(packed))]:
        result = outcome(gzip.GzipFile(fileobj=io.BytesIO(packed[:cut])))
        assert result.members == whole[: len(result.members)]
        if cut:
            assert result.damage is not None
            assert result.damage[0] == "compressed stream is cut"
        kept.append(len(result.members))
    assert kept == sorted(kept)
    assert kept[-1] == len(whole)
    assert kept[len(kept) // 2] > len(whole) // 3  # nothing is thrown away with the read-ahead


def test_gzip_corruption_is_damage() -> None:
    data = some_archive()
    packed = bytearray(gzip.compress(data, 1))
    packed[-8] ^= 1  # the CRC
    result = outcome(gzip.GzipFile(fileobj=io.BytesIO(packed)))
    assert result.members == outcome(io.BytesIO(data)).members
    assert result.damage is not None
    assert result.damage[0] == "compressed stream is corrupt"
    rng = random.Random(1)
    for _ in range(100):
        broken = bytearray(gzip.compress(data, 1))
        for _ in range(3):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        plain, buffered = (gzip.GzipFile(fileobj=io.BytesIO(broken)) for _ in range(2))
        assert outcome(plain).damage is not None
        assert outcome(io.BufferedReader(cast(Any, buffered))).damage is not None


# --- twins: Python's tarfile and GNU tar ---


def twin(data: bytes) -> list[tuple[str, str, bytes]]:
    """Name, kind and payload of every member, by Python's tarfile."""
    rows = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for info in archive:
            kind = "file" if info.isreg() and not info.issparse() else "directory" if info.isdir() else "other"
            payload = cast(Any, archive.extractfile(info)).read() if kind == "file" else b""
            rows.append((info.name, kind, payload))
    return rows


def ours(members: list[tuple[Member, bytes]]) -> list[tuple[str, str, bytes]]:
    """In the form of `twin`; tarfile removes the slash from names of directories."""
    return [(m.name.rstrip("/") if m.kind == "directory" else m.name, m.kind, data) for m, data in members]


TYPES = [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
component = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=60)
names = st.one_of(
    st.lists(component, min_size=1, max_size=8).map("/".join),
    st.text("ab/.", min_size=1, max_size=300).map(lambda name: name.rstrip("/") or "x"),
)
payloads = st.one_of(st.binary(max_size=40), st.integers(0, 1600).map(lambda n: b"\x5a" * n))
infos = st.tuples(names, payloads, st.sampled_from(TYPES), st.sampled_from([0, 1, 1.5, -7, 8**12]), st.text(max_size=9))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=40, deadline=None)
@given(st.lists(infos, max_size=8))
def test_reads_what_tarfile_writes(format: int, members: list[tuple[str, bytes, bytes, float, str]]) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=format) as archive:
        for name, data, kind, mtime, owner in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.uname = kind, mtime, owner
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            try:
                archive.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):  # ustar cannot hold it
                continue
    result = outcome(io.BytesIO(stream.getvalue()), TarLimits())
    assert (result.damage, result.warning) == (None, None)
    assert ours(result.members) == twin(stream.getvalue())
    assert outcome(Forward(stream.getvalue()), TarLimits(), fast=False) == result


def written(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    writer = TarWriter(stream)
    for name, data in members:
        writer.add(name, data)
    writer.close()
    return stream.getvalue()


file_names = st.one_of(
    names,
    st.binary(min_size=1, max_size=400)
    .map(lambda raw: raw.replace(b"\0", b"") or b"x")
    .map(lambda raw: (raw.rstrip(b"/") or b"x").decode("utf-8", "surrogateescape")),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(file_names, payloads), max_size=6))
def test_what_is_written_is_read(members: list[tuple[str, bytes]]) -> None:
    data = written(members)
    for fast in (True, False):
        result = outcome(io.BytesIO(data), TarLimits(), fast)
        assert [(m.name, data) for m, data in result.members] == members
        assert (result.damage, result.warning) == (None, None)
    assert twin(data) == [(name, "file", payload) for name, payload in members]


TRICKY = [
    ("é" * 40 + ".jpg", b"1"),
    ("n" * 100, b""),
    ("n" * 101, b"no slash"),
    ("p" * 155 + "/" + "n" * 100, b"x" * 512),
    ("p" * 156 + "/" + "n" * 99, b"prefix too long"),
    ("/" + "n" * 120, b"a slash nobody can split at"),
    ("d/" * 120 + "deep", b"y" * 70_000),
    ("e/" * 45 + "/" * 30 + "slashes where the name is cut", b"z"),
    ("ü/" * 400 + "x", b"z" * 3_000_000),
]


def test_every_reader_agrees_on_tricky_names() -> None:
    data = written(TRICKY)
    assert [(m.name, payload) for m, payload in outcome(io.BytesIO(data), TarLimits()).members] == TRICKY
    assert twin(data) == [(name, "file", payload) for name, payload in TRICKY]
    assert hashlib.sha256(data).hexdigest()[:16] == "96cc379b2f8564c7"


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_gnu_tar_reads_what_is_written(tmp_path: Any) -> None:
    (tmp_path / "x.tar").write_bytes(written(TRICKY))
    options = ["--absolute-names", "--quoting-style=literal", "-f", tmp_path / "x.tar"]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    listing = subprocess.run(["tar", "-t", *options], capture_output=True, check=True, env=environment)
    assert listing.stdout.decode().splitlines() == [name for name, _ in TRICKY]
    assert listing.stderr == b""
    contents = subprocess.run(["tar", "-x", "-O", *options], capture_output=True, check=True, env=environment)
    assert contents.stdout == b"".join(data for _, data in TRICKY)


# --- what must hold for any bytes ---


def mixed_archive() -> bytes:
    """Every kind of header, in one archive."""
    return b"".join(crafted for case, (crafted, _) in STEPS_OVER.items() if len(crafted) < 2500) + A + B + END


def test_any_prefix_gives_a_prefix_of_the_members() -> None:
    data = mixed_archive()
    whole = outcome(io.BytesIO(data)).members
    rng = random.Random(0)
    for cut in [*range(0, len(data), 512), *(rng.randrange(len(data)) for _ in range(40))]:
        results = [outcome(opener(data[:cut])) for opener in (io.BytesIO, Forward)]
        assert results[0] == results[1]
        assert results[0].members == whole[: len(results[0].members)]
        # Nothing that is whole is held back.
        assert len(results[0].members) >= sum(member.end <= cut for member, _ in whole)


def test_mutated_bytes_only_ever_raise_damage_and_stay_small() -> None:
    data, rng = mixed_archive(), random.Random(0)
    fields = [0, 124, 125, 134, 148, 150, 156, 257, 345, 482, 504, 512, 514]
    tracemalloc.start()
    try:
        for _ in range(120):
            broken = bytearray(data)
            for _ in range(rng.choice([1, 1, 3, 30])):
                block = rng.randrange(len(data) // 512 - 3) * 512
                byte = rng.choice([0, 32, 48, 55, 57, 128, 255, rng.randrange(256)])
                broken[block + rng.choice([*fields, rng.randrange(512)])] = byte
                if rng.random() < 0.7:  # or hardly anything would get past the checksum
                    body = broken[block : block + 148] + b" " * 8 + broken[block + 156 : block + 512]
                    broken[block + 148 : block + 156] = b"%06o\0 " % sum(body)
            frozen = bytes(broken)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            results = [outcome(opener(frozen)) for opener in (io.BytesIO, Forward)]
            assert tracemalloc.get_traced_memory()[1] - before < 20 * len(data)
            assert results[0] == results[1] == outcome(io.BytesIO(frozen), fast=False)
            assert all(m.size <= LIMITS.max_member_bytes for m, _ in results[0].members if m.kind == "file")
            assert all(m.start < m.offset <= m.offset + m.size <= m.end for m, _ in results[0].members)
    finally:
        tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000))
def test_random_bytes(data: bytes) -> None:
    assert outcome(io.BytesIO(data)) == outcome(Forward(data))


class Recorder(io.BytesIO):
    """Counts the bytes that are requested and delivered."""

    largest, total = 0, 0

    def read1(self, n: int | None = -1) -> bytes:
        assert n is not None
        assert n > 0
        piece = super().read1(n)
        self.largest, self.total = max(self.largest, n), self.total + len(piece)
        return piece

    read = read1


def test_claims_allocate_nothing() -> None:
    for size in (2**30, 8**11 - 1):
        stream = Recorder(A + header(b"x", size) + B)
        stream.seekable = lambda: False  # type: ignore[method-assign]
        tracemalloc.start()
        assert len(outcome(stream, TarLimits(max_member_bytes=2**40)).members) == 1
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
        assert stream.largest <= 1 << 20


def test_payloads_are_skipped_by_seeking_and_read_in_pieces() -> None:
    members = [(f"{i}.bin", random.Random(i).randbytes(1_500_000 + i)) for i in range(4)]
    data = written(members)
    stream = Recorder(data)
    assert len(list(TarReader(stream))) == 4
    assert stream.total < 200_000
    for opener in OPENERS.values():
        assert [(m.name, payload) for m, payload in outcome(opener(data), TarLimits()).members] == members


# --- the contract of the classes ---


def test_read_is_for_the_current_file_only() -> None:
    reader = TarReader(io.BytesIO(A + header(b"d/", kind=b"5") + B + END))
    with pytest.raises(ValueError, match="just yielded"):
        reader.read()
    members = iter(reader)
    assert next(members).name == "a.jpg"
    assert reader.read() == reader.read() == b"payload"
    assert next(members).kind == "directory"
    with pytest.raises(ValueError, match="just yielded"):
        reader.read()
    assert [m.name for m in members] == ["b.jpg"]
    with pytest.raises(ValueError, match="just yielded"):
        reader.read()
    with pytest.raises(ValueError, match="iterated once"):
        iter(reader)


def test_a_file_that_shrinks_is_damage(tmp_path: Any) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(A + item(b"big", b"x" * 300_000) + END)
    with path.open("rb") as stream:
        reader = TarReader(stream)
        members = iter(reader)
        next(members), next(members)
        os.truncate(path, 100_000)
        with pytest.raises(TarDamage, match="truncated in a member at byte 1024"):
            reader.read()


def test_reading_starts_where_the_stream_stands() -> None:
    stream = io.BytesIO(b"preamble" + A + B + END)
    stream.seek(8)
    assert outcome(stream) == outcome(io.BytesIO(A + B + END))


def test_other_errors_of_the_stream_pass_through() -> None:
    class Failing(Forward):
        def read(self, n: int = -1) -> bytes:
            raise OSError("connection reset")

    with pytest.raises(OSError, match="connection reset"):
        outcome(Failing(A))


def test_damage_travels_between_processes() -> None:
    damage = pickle.loads(pickle.dumps(TarDamage("bad size field", 512)))
    assert (damage.reason, damage.offset) == ("bad size field", 512)
    assert str(damage) == "bad size field at byte 512 of the archive"
    assert isinstance(damage, DataError)


@pytest.mark.parametrize("name", ["", "a/", "a\0b", "n" * 4097])
def test_writer_refuses_names_it_cannot_keep(name: str) -> None:
    stream = io.BytesIO()
    with pytest.raises(DataError, match="cannot name"):
        TarWriter(stream).add(name, b"")
    assert stream.getvalue() == b""


def test_writer_takes_views_and_streams_that_take_a_part() -> None:
    class Reluctant(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(memoryview(data).cast("B")[:1000]))

    members = [("a", b"x" * 5001), ("b", b"y" * 200_000)]
    stream = Reluctant()
    writer = TarWriter(stream)
    writer.add("a", memoryview(members[0][1]))
    writer.add("b", memoryview(members[1][1]).cast("I"))
    writer.close()
    assert stream.getvalue() == written(members)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, None) for name in ("train/000.jpg", "./a..b/c", "ab:c", "é/\udcff.jpg", "a\\b", "...")),
        *((name, "absolute path") for name in ("/etc/passwd", "\\\\host\\x")),
        *((name, "drive letter") for name in ("C:x", "c:\\x")),
        *((name, "'..' component") for name in ("..", "a/../b", "a/..", "a\\..\\b")),
        *((name, "control character") for name in ("a\0b", "a\nb", "a\x7f", "a\x9bb", "a\n")),
        ("", "empty"),
    ],
)
def test_unsafe_names(name: str, reason: str | None) -> None:
    assert unsafe_name(name) == reason
