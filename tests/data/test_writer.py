import bz2
import gc
import gzip
import hashlib
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sanitize.artifacts import Artifact, Part, Recipe, make
from sanitize.data.writer import _Raw, shard_writer
from sanitize.tar.compression import HEAD_BYTES, compression_in, compression_of

MEMBERS = [("a.jpg", b"1" * 700), ("folder/" * 40 + "b.cls", b""), ("caf\u00e9.txt", b"2" * 512)]


def write(out: Path, name: str, level: int = 6) -> Artifact:
    def fill(part: Part) -> None:
        with shard_writer(part, name, level) as tar:
            for member in MEMBERS:
                tar.add(*member)

    return make(Artifact, out, Recipe(stage="made-up"), fill)


@pytest.mark.parametrize("name", ["x.tar", "deep/x.tar.gz", "x.tgz", "x.tar.xz", "x.TBZ"])
def test_a_shard_is_read_back_by_python_and_has_the_same_bytes_every_time(
    tmp_path: Path, read_tar: Callable[..., list], name: str
) -> None:
    first, second = write(tmp_path / "a", name), write(tmp_path / "b", name)
    assert read_tar(first.file(name)) == MEMBERS
    assert first.digest == second.digest
    data = first.file(name).read_bytes()
    assert compression_in(data[:HEAD_BYTES]) == compression_of(name)
    assert (compression_of(name) == "") == (name == "x.tar")
    entry = first.manifest().files[name]
    assert (entry.sha256, entry.size) == (hashlib.sha256(data).hexdigest(), len(data))


def test_compression_changes_the_file_and_not_what_is_in_it(tmp_path: Path) -> None:
    plain = write(tmp_path / "a", "x.tar").file("x.tar").read_bytes()
    for level in (0, 9):
        file = write(tmp_path / f"{level}", "x.tar.gz", level).file("x.tar.gz")
        assert gzip.decompress(file.read_bytes()) == plain
    for name, read in {"x.tar.xz": lzma.decompress, "x.tar.bz2": bz2.decompress, "x.tar.zst": unzstd}.items():
        once, again = (write(tmp_path / f"{i}-{name}", name) for i in range(2))
        assert read(once.file(name).read_bytes()) == plain
        assert once.digest == again.digest


def unzstd(data: bytes) -> bytes:
    return bytes(pa.CompressedInputStream(pa.BufferReader(data), "zstd").read())


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.xz", "x.tar.bz2", "x.tar.zst"])
def test_an_exception_leaves_no_shard(tmp_path: Path, name: str) -> None:
    def fill(part: Part) -> None:
        with shard_writer(part, name) as tar:
            tar.add("a.jpg", b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        make(Artifact, tmp_path / "a", Recipe(stage="made-up"), fill)
    assert not list(tmp_path.rglob("*x.tar*"))


def test_the_buffer_of_a_failed_writer_reaches_no_file_when_it_is_collected() -> None:
    """The collector may run inside a thread pool that holds locks which hashing needs."""
    written: list[int] = []

    class Sink:
        def write(self, data: Any) -> int:
            written.append(len(data))
            return len(data)

    raw = _Raw(Sink())
    buffered = io.BufferedWriter(raw, 1000)
    buffered.write(b"x" * 10)
    raw.abandon()
    del buffered
    gc.collect()
    assert written == []
