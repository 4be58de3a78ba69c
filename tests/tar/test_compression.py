"""Compression is recognised by content; damage costs no more than it must; every file that is not read is named."""

import bz2
import gzip
import io
import lzma
import tarfile
import tempfile
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
from sanitize.tar.compression import GzipStream, explain, is_compressed, unread_suffix

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


def drained(stream: GzipStream, size: int = 1000) -> tuple[bytes, str]:
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
    assert drained(stream) == (b"a", "BarrenStream")


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
    for n, outcome in ((2**20 - 2**17, whole), (2**20 + 2**17, (b"", "BarrenStream"))):
        name = content[:3] + b"\x08" + content[4:10] + b"n" * n + b"\0" + content[10:]
        blocks = content[:10] + b"\0\0\0\xff\xff" * (n // 5) + content[10:]
        assert drained(GzipStream(io.BytesIO(name))) == drained(GzipStream(io.BytesIO(blocks))) == outcome
    for more, error in ((-(2**17), ""), (2**17, "BarrenStream")):
        padded = content + bytes(2**20 + 2 * n_content + more)
        assert drained(GzipStream(io.BytesIO(padded))) == (bytes(n_content), error)


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.tar.gz", "x.TGZ", "deep/X.Tar.Gz"])
def test_names_that_say_gzip(name: str) -> None:
    assert is_compressed(name)
    assert not unread_suffix(name)


@pytest.mark.parametrize(
    "head", [b"", b"\xfd7zXZ\0", b"BZh9", b"PK\x03\x04", b"<HTML>", b"version https://git-lfs.github"]
)
def test_what_is_no_tar_is_explained(head: bytes) -> None:
    assert explain(head)
    assert explain(b"000000.png") is None


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
    "bzip2": bz2.compress,
}
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".TAR", ".Tar.Gz", ".tar.xz", ".TZST")


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
    return shard["how"] not in ("xz", "bzip2") and not unread_suffix(shard["suffix"])


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
