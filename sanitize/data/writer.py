"""Writer for one shard of an artifact: the same samples give the same bytes, compressed or not."""

import bz2
import gzip
import io
import lzma
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, cast

import pyarrow as pa

from sanitize.artifacts import Part
from sanitize.data.class_names import CLASSES_FILE, as_listed
from sanitize.storage import HashingWriter
from sanitize.tar.compression import compression_of
from sanitize.tar.write import TarWriter

_BUFFER_BYTES = 1 << 20  # hashing and compressing small members one by one is slow
_XZ_PRESET = 1  # pictures are compressed already; level 6 would take five times as long


@contextmanager
def shard_writer(part: Part, name: str, gzip_level: int = 6) -> Iterator[TarWriter]:
    """A tar writer for the file `name` of the artifact, compressed as the name says."""
    with part.create(name) as file, _compressor(file, compression_of(name), gzip_level) as sink:
        tar = TarWriter(sink)
        yield tar
        tar.close()


def write_class_names(part: Part, shards: Iterable[str], names: Mapping[int, str]) -> None:
    """`classes.json` beside shards of the artifact, so that who reads them has the names; nothing without names.

    Args:
        part: part of the artifact.
        shards: names of the shards' files in the artifact.
        names: names of the classes by number (`Dataset.class_names`).
    """
    if names:
        for folder in sorted({shard[: shard.rfind("/") + 1] for shard in shards}):
            part.write_json(folder + CLASSES_FILE, as_listed(names))


@contextmanager
def _compressor(file: HashingWriter, compression: str, gzip_level: int) -> Iterator[BinaryIO]:
    """A file that writes compressed bytes into `file`."""
    if compression == "gzip":
        # mtime 0 and no file name in the header: otherwise each run gives other bytes. Not buffered: at level 0 the
        # bytes depend on the size of each write.
        with gzip.GzipFile("", "wb", gzip_level, cast(BinaryIO, file), mtime=0) as zipped:
            yield cast(BinaryIO, zipped)
        return
    with ExitStack() as stack:
        sink: Any = file
        if compression == "xz":
            sink = stack.enter_context(lzma.LZMAFile(cast(BinaryIO, file), "wb", preset=_XZ_PRESET))
        elif compression == "bzip2":
            sink = stack.enter_context(bz2.BZ2File(cast(BinaryIO, file), "wb"))
        elif compression == "zstd":
            sink = stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(_KeptOpen(file), mode="w"), "zstd"))
        raw = _Raw(sink)
        buffered = io.BufferedWriter(raw, _BUFFER_BYTES)
        try:
            yield cast(BinaryIO, buffered)
            buffered.flush()
        finally:
            raw.abandon()


class _KeptOpen:
    """A file that pyarrow may not close."""

    closed = False

    def __init__(self, file: HashingWriter) -> None:
        self.write = file.write

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Raw(io.RawIOBase):
    """Adapter of a file for `io.BufferedWriter`."""

    def __init__(self, file: Any) -> None:
        self._file: Any = file

    def abandon(self) -> None:
        """Drop what is written from now on.

        After an error the buffer still holds bytes. The garbage collector flushes them, in any thread and perhaps while
        it holds locks that hashing needs.
        """
        self._file = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data) if self._file is None else int(self._file.write(data))
