"""Compression is recognised by content; damage costs no more than it must; every file that is not read is named."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shard, index_shards
from sanitize.data.samples import ShardReader
from sanitize.data.sources import list_sources
from sanitize.errors import DataError
from sanitize.tar import compression
from sanitize.tar.compression import (
    HEAD_BYTES,
    CompressedStream,
    GzipStream,
    compression_in,
    compression_of,
    decompressed,
    explain,
    plain_suffix,
    unread_suffix,
)

Members = list[tuple[str, bytes]]
slow = settings(max_examples=80, deadline=None)


def archive(members: Members) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def drained(stream: CompressedStream, size: int = 1000) -> tuple[bytes, str]:
    """Bytes of the stream, and the name of the error at its end."""
    pieces = []
    try:
        while piece := stream.read(size):
            assert len(piece) <= size
            pieces.append(piece)
    except (EOFError, zlib.error) as error:
        return b"".join(pieces), type(error).__name__
    return b"".join(pieces), ""


# --- the stream -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.binary(max_size=400) | st.integers(1, 60_000).map(bytes), max_size=4),
    st.integers(0, 9),
    st.integers(1, 5000),
)
@slow
def test_members_of_a_stream_are_read_one_behind_the_other(pieces: list[bytes], level: int, size: int) -> None:
    data = b"".join(gzip.compress(piece, level, mtime=0) for piece in pieces)
    stream = GzipStream(io.BytesIO(data))
    if data:
        assert drained(stream, size) == (b"".join(pieces), "")
        assert stream.verified == len(b"".join(pieces))


@given(st.binary(min_size=1, max_size=3000), st.data())
@slow
def test_a_stream_that_is_cut_gives_what_there_is(content: bytes, data: st.DataObject) -> None:
    whole = gzip.compress(content, mtime=0)
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    found, error = drained(GzipStream(io.BytesIO(cut)))
    assert error == "EOFError"
    assert content.startswith(found)
    assert len(found) >= len(zlib.decompressobj(31).decompress(cut))


def test_all_that_comes_before_a_wrong_checksum_or_damage_is_read() -> None:
    noise = b"".join(i.to_bytes(4, "big") for i in range(50_000))
    whole = gzip.compress(noise, 0, mtime=0)
    assert drained(GzipStream(io.BytesIO(whole[:-8] + bytes(8)))) == (noise, "error")
    first = int.from_bytes(whole[11:13], "little")  # level 0 stores blocks, each behind a header of five bytes
    damaged = bytearray(whole)
    damaged[10 + 5 + first] = 0xFF
    found, error = drained(GzipStream(io.BytesIO(bytes(damaged))))
    assert (found, error) == (noise[:first], "error")


@pytest.mark.hostile
def test_millions_of_empty_members_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_FREE_MEMBERS", 50)
    empty = gzip.compress(b"", mtime=0)
    assert drained(GzipStream(io.BytesIO(gzip.compress(b"a") + empty * 40 + gzip.compress(b"b")))) == (b"ab", "")
    stream = GzipStream(io.BytesIO(gzip.compress(b"a") + empty * 100 + gzip.compress(b"b")))
    assert drained(stream) == (b"a", "RefusedStream")


@pytest.mark.hostile
def test_a_long_header_is_stepped_over() -> None:
    head = (
        b"\x1f\x8b\x08\x1c" + bytes(6) + b"\xff\xff" + bytes(65_535) + b"n" * 400_000 + b"\0" + b"c" * 400_000 + b"\0"
    )
    stream = GzipStream(io.BytesIO(head + gzip.compress(b"content", mtime=0)[10:]))
    assert drained(stream) == (b"content", "")


@pytest.mark.hostile
@pytest.mark.parametrize("n_content", [0, 1, 100_000])
def test_a_stream_may_hold_a_mebibyte_and_twice_its_content_of_other_things(n_content: int) -> None:
    content, whole = gzip.compress(bytes(n_content), mtime=0), (bytes(n_content), "")
    for n, outcome in ((2**20 - 2**17, whole), (2**20 + 2**17, (b"", "RefusedStream"))):
        name = content[:3] + b"\x08" + content[4:10] + b"n" * n + b"\0" + content[10:]
        blocks = content[:10] + b"\0\0\0\xff\xff" * (n // 5) + content[10:]
        assert drained(GzipStream(io.BytesIO(name))) == drained(GzipStream(io.BytesIO(blocks))) == outcome
    for more, error in ((-(2**17), ""), (2**17, "RefusedStream")):
        padded = content + bytes(2**20 + 2 * n_content + more)
        assert drained(GzipStream(io.BytesIO(padded))) == (bytes(n_content), error)


# --- all compressions -------------------------------------------------------------------------------------------


def zstd(data: bytes, checksum: bool = False) -> bytes:
    """A frame, as pyarrow writes it; or one of uncompressed blocks with a checksum that is right where data is b""."""
    if not checksum:
        return bytes(pa.compress(data, "zstd", asbytes=True))
    assert data == b""
    return b"\x28\xb5\x2f\xfd\x04\x00" + zstd_block(b"", True) + bytes.fromhex("99e9d851")


def zstd_block(data: bytes, is_last: bool = False, repeat: int = 0) -> bytes:
    """A block of raw bytes, or of one byte that is repeated."""
    n = repeat or len(data)
    return (n << 3 | bool(repeat) << 1 | is_last).to_bytes(3, "little") + data


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "xz": lambda data: lzma.compress(data, preset=0),
    "bzip2": bz2.compress,
    "zstd": zstd,
}


def opened(data: bytes) -> CompressedStream:
    return decompressed(io.BytesIO(data), compression_in(data[:HEAD_BYTES]))


@pytest.mark.parametrize("how", PACKERS)
@given(data=st.data(), size=st.integers(1, 9000))
@settings(max_examples=40, deadline=None)
def test_members_are_read_and_padding_and_data_behind_them_cost_nothing(how: str, data: Any, size: int) -> None:
    pieces = data.draw(
        st.lists(st.binary(max_size=400) | st.integers(1, 300_000).map(bytes), min_size=1, max_size=4), "pieces"
    )
    whole, packed = b"".join(pieces), b"".join(map(PACKERS[how], pieces))
    assert compression_in(packed[:HEAD_BYTES]) == how
    for behind, error in ((b"", ""), (bytes(700), ""), (b"garbage", "CorruptStream"), (packed[:3], "EOFError")):
        stream = opened(packed + behind)
        found, name = drained(stream, size)
        assert found == whole
        assert stream.verified == len(whole)
        assert (name == "") == (error == "")


@pytest.mark.parametrize("how", PACKERS)
@pytest.mark.hostile
@given(data=st.data(), seed=st.integers(0, 99), flip=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_what_is_read_of_a_damaged_stream_does_not_depend_on_how_it_is_read(
    how: str, data: Any, seed: int, flip: int
) -> None:
    noise = random.Random(seed).randbytes(40_000)
    content = noise + bytes(100_000) + noise
    whole = PACKERS[how](content)
    at = data.draw(st.integers(HEAD_BYTES, len(whole) - 1), "at")
    cut = whole[:at]
    assert drained(opened(cut), 512) == drained(opened(cut), 100_000)
    found, name = drained(opened(cut))
    assert name == "EOFError"
    assert content.startswith(found)
    damaged = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
    a, b = (drained(opened(damaged), size) for size in (512, 100_000))
    assert a == b
    assert a[1] or how == "zstd"  # pyarrow writes no checksum
    if how == "gzip":
        assert len(a[0]) > 0


@pytest.mark.hostile
def test_a_window_or_dictionary_of_more_than_128_mib_is_refused() -> None:
    for exponent, error in ((17, ""), (18, "RefusedStream"), (31, "RefusedStream")):
        frame = b"\x28\xb5\x2f\xfd\0" + bytes([exponent << 3]) + zstd_block(b"a", True)
        assert drained(opened(frame)) == (b"" if error else b"a", error)
    single = b"\x28\xb5\x2f\xfd\xe0" + (2**27 + 1).to_bytes(8, "little") + zstd_block(b"a", True)
    assert drained(opened(single)) == (b"", "RefusedStream")
    for size, error in ((1 << 27, ""), (1 << 28, "RefusedStream")):
        whole = lzma.compress(b"a", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": size}])
        assert drained(opened(whole)) == (b"" if error else b"a", error)


@pytest.mark.hostile
def test_a_zstd_frame_with_a_dictionary_is_refused_and_a_checksum_compared() -> None:
    head = b"\x28\xb5\x2f\xfd\x01\0"
    assert drained(opened(head + b"\7" + zstd_block(b"a", True))) == (b"", "RefusedStream")
    assert drained(opened(head + b"\0" + zstd_block(b"a", True))) == (b"a", "")
    empty = zstd(b"", checksum=True)
    assert drained(opened(zstd(b"a") + empty + zstd(b"b"))) == (b"ab", "")
    assert drained(opened(zstd(b"a") + empty[:-1] + b"\0" + zstd(b"b"))) == (b"", "CorruptStream")


@pytest.mark.hostile
@pytest.mark.parametrize("how", PACKERS)
def test_thousands_of_empty_members_or_much_padding_are_not_followed(how: str) -> None:
    one, empty = PACKERS[how](b"a"), PACKERS[how](b"")
    assert drained(opened(one + empty * 2000 + one)) == (b"aa", "")
    assert drained(opened(one + empty * 12_000 + one))[1] == "RefusedStream"
    assert drained(opened(one + bytes(900_000) + one)) == (b"aa", "")
    assert drained(opened(one + bytes(1_200_000) + one))[1] == "RefusedStream"


@pytest.mark.hostile
def test_zstd_frames_without_content_and_tiny_blocks_are_not_followed() -> None:
    skipped = b"\x5a\x2a\x4d\x18" + (100).to_bytes(4, "little") + bytes(100)
    assert drained(opened(skipped * 3 + zstd(b"a") + skipped)) == (b"a", "")
    assert drained(opened(skipped * 12_000 + zstd(b"a")))[1] == "RefusedStream"
    huge = b"\x50\x2a\x4d\x18" + (2**32 - 1).to_bytes(4, "little")
    assert drained(opened(huge + bytes(2_000_000))) == (b"", "RefusedStream")
    assert drained(opened(zstd(b"a") + huge + b"cut")) == (b"a", "EOFError")
    head = b"\x28\xb5\x2f\xfd\0\0"
    assert drained(opened(head + zstd_block(b"") * 400_000))[1] == "RefusedStream"
    assert drained(opened(head + (3 << 1 | 1).to_bytes(3, "little")))[1] == "CorruptStream"  # no such kind of block
    assert drained(opened(head + zstd_block(bytes(2**17 + 1), True)))[1] == "CorruptStream"


@pytest.mark.hostile
@pytest.mark.parametrize("how", ["xz", "bzip2", "zstd"])
def test_a_bomb_is_read_in_pieces(how: str) -> None:
    if how == "zstd":
        packed = b"\x28\xb5\x2f\xfd\0\0" + zstd_block(b"\0", repeat=1024) * 50_000 + zstd_block(b"", True)
        n = 1024 * 50_000
    else:
        packed, n = PACKERS[how](bytes(50_000_000)), 50_000_000
    stream = opened(packed)
    tracemalloc.start()
    try:
        found = 0
        while piece := stream.read(100_000):
            assert not any(piece)
            found += len(piece)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert found == n


class Failing(io.BytesIO):
    """A file that cannot be read beyond its first bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(min(size or 0, 1000))
        if not data:
            raise DataError("cannot read x.tar")
        return data


@pytest.mark.parametrize("how", PACKERS)
def test_a_disk_that_fails_is_no_damage(how: str) -> None:
    packed = PACKERS[how](random.Random(0).randbytes(50_000))
    with pytest.raises(DataError, match=r"cannot read x\.tar"):
        drained(decompressed(Failing(packed[:30_000]), how))


@pytest.mark.parametrize("how", PACKERS)
def test_an_error_is_raised_again_and_a_closed_stream_is_not_read(how: str) -> None:
    packed = PACKERS[how](random.Random(0).randbytes(50_000))
    cut = opened(packed[:-10])
    assert drained(cut)[1] == drained(cut)[1] == "EOFError"
    for stream in (cut, opened(packed)):
        stream.close()
        with pytest.raises(ValueError, match="is closed"):
            stream.read(100)


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        ("x.tar", ""),
        ("x.TAR", ""),
        ("x.tar.gz", "gzip"),
        ("x.TGZ", "gzip"),
        ("deep/X.Tar.Xz", "xz"),
        ("x.tar.bz2", "bzip2"),
        ("x.TBZ", "bzip2"),
        ("x.tar.zst", "zstd"),
        ("x.tzst", "zstd"),
    ],
)
def test_names_that_say_a_compression(name: str, compression: str) -> None:
    assert compression_of(name) == compression == compression_of(f"y{plain_suffix(compression)}")
    assert not unread_suffix(name)


@pytest.mark.parametrize(
    ("head", "compression", "says"),
    [
        (b"LZIP", "", "lzip compressed: not read"),
        (b"\x04\x22\x4d\x18", "", "lz4 compressed: not read"),
        (b"PK\x03\x04", "", "zip compressed: not read"),
        (b"<HTML>", "", "a web page"),
        (b"\n\n  <html>", "", "a web page"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "gzip", "gzip compressed: a web page"),
        (b"version https://git-lfs.github", "", "git lfs pull"),
        (b"PAR1\x15", "", "sanitize import"),
        (b"\x1f\x8b\x08\0", "gzip", "compressed twice (gzip in gzip)"),
        (b"\x89PNG\r\n", "", "a picture"),
        (b"AccessDenied\n\x1b[2J", "", r"bad header; it begins with 'AccessDenied\x0a\x1b[2J'"),
        (b"par1.png\0\0", "", "bad header; it begins with 'par1.png'"),
        (b"", "gzip", "bad header"),
        (bytes(32), "", "bad header"),
    ],
)
def test_what_is_no_tar_is_explained(head: bytes, compression: str, says: str) -> None:
    found = explain(head, "bad header", compression)
    assert says in found
    assert says != "bad header" or found == says


# --- shards -----------------------------------------------------------------------------------------------------

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "gzip of two members": lambda data: gzip.compress(data[:700], 1, mtime=0) + gzip.compress(data[700:], 1, mtime=0),
    "xz": lambda data: lzma.compress(data, preset=0),
    "xz of two streams": lambda data: lzma.compress(data[:700], preset=0) + lzma.compress(data[700:], preset=0),
    "bzip2": bz2.compress,
    "zstd": zstd,
    "zstd of two frames": lambda data: zstd(data[:700]) + zstd(data[700:]),
    "lz4": lambda data: bytes(pa.compress(data, "lz4", asbytes=True)),
}
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".TAR", ".Tar.Gz", ".tar.xz", ".TZST", ".tar.bz2", ".tar.lz4")


@st.composite
def shards(draw: st.DrawFn) -> dict[str, Any]:
    """A small shard: its number of samples, compression, name, and damage at its end."""
    n = draw(st.integers(0, 5))
    extra = [draw(st.binary(max_size=700)) for _ in range(n)]
    members = [m for i in range(n) for m in ((f"{i}.png", PNG), (f"{i}.cls", b"%d" % (i % 2)), (f"{i}.bin", extra[i]))]
    how = draw(st.sampled_from(list(PACK)))
    data = PACK[how](archive(members))
    end = draw(st.sampled_from(["whole", "garbage", "zeros", "cut"]))
    if end == "cut":
        data = data[: draw(st.integers(0, len(data) - 1))]
    behind = draw(st.binary(min_size=1, max_size=1500)) if end == "garbage" else bytes(1000 * (end == "zeros"))
    suffix = draw(st.sampled_from(SUFFIXES))
    return {
        "n": n,
        "members": members,
        "how": how,
        "suffix": suffix,
        "end": end,
        "behind": behind,
        "data": data + behind,
    }


def is_readable(shard: dict[str, Any]) -> bool:
    return shard["how"] != "lz4" and not unread_suffix(shard["suffix"])


def usable(table: pa.Table) -> list[str]:
    return [row["key"] for row in table.to_pylist() if row["status"] == "ok"]


@pytest.mark.hostile
@given(shards())
@slow
def test_samples_are_read_or_the_shard_is_reported_as_damaged(shard: dict[str, Any]) -> None:
    keys = [str(i) for i in range(shard["n"])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{shard['suffix']}"
        path.write_bytes(shard["data"])
        found = {check: index_shard(str(path), IndexConfig(check=check)) for check in ("decode", "digest", "headers")}
        read = {s.key: s.members for s in ShardReader(str(path))}
        again = ShardReader(str(path), suffix="cls", digest=False)
        assert [s.key for s in again] == list(read)
    table, summary = found["decode"]
    for other, its_summary in found.values():  # all readers agree, by columns or one by one
        assert usable(other) == usable(table)
        assert (its_summary["damage"], its_summary["counts"], its_summary["bytes"]) == (
            summary["damage"],
            summary["counts"],
            summary["bytes"],
        )
    assert usable(table) == keys[: len(usable(table))]
    for key in usable(table):
        members = [member for member in shard["members"] if member[0].startswith(f"{key}.")]
        # A member behind the damage is missing, where the archive seems to end between two members.
        assert read[key] == members or (shard["end"] == "cut" and key == usable(table)[-1] and read[key] == members[:2])
    if len(usable(table)) < shard["n"]:
        assert summary["damage"]
    if is_readable(shard) and shard["end"] != "cut":
        assert usable(table) == keys
        assert (summary["damage"] is not None) == any(shard["behind"])
    if not is_readable(shard):
        assert usable(table) == []
        assert summary["damage"]


@pytest.mark.hostile
@given(st.lists(shards(), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_no_shard_vanishes(given_shards: list[dict[str, Any]]) -> None:
    """Every file is indexed with all its samples, or marked as damaged, or named by the error that stops the run."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in")
        source.mkdir()
        names = [f"{i}{shard['suffix']}" for i, shard in enumerate(given_shards)]
        for name, shard in zip(names, given_shards, strict=True):
            (source / name).write_bytes(shard["data"])
        listing = list_sources(str(source))
        listed = [*listing.shards, *(url.rpartition("/")[2] for url in listing.refused)]
        assert sorted(listed) == sorted(names)
        config = IndexConfig(max_bad_fraction=1)
        found = {name: index_shard(str(source / name), config) for name in names}
        bad = [name for name, (table, summary) in found.items() if summary["damage"] and not usable(table)]
        out, compute = str(Path(folder) / "index"), Compute(device="cpu")
        if bad or not any(usable(table) for table, _ in found.values()):
            with pytest.raises(DataError) as raised:
                index_shards(config, str(source), out, compute)
            named = {name for name in names if name in str(raised.value)}
            assert named >= set([name for name in bad if unread_suffix(name)] or bad)
            return
        dataset = index_shards(config, str(source), out, compute)
        assert dataset.shards == sorted(names)
        for name, shard in zip(names, given_shards, strict=True):
            summary = dataset.info["shards"][name]
            n_ok = summary["counts"]["samples"] - summary["counts"]["unreadable"]
            assert n_ok == shard["n"] or (n_ok > 0 and summary["damage"])
            seen = [sample.key for sample, _ in dataset.samples(name)]
            assert seen == [row["key"] for row in dataset.rows(name).to_pylist()]
