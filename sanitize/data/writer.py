"""Writer for one shard of an artifact: the same samples give the same bytes, compressed or not."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from sanitize.artifacts import Part
from sanitize.storage import HashingWriter
from sanitize.tar.compression import is_compressed
from sanitize.tar.write import TarWriter

_BUFFER_BYTES = 1 << 20  # hashing small members one by one is slow


@contextmanager
def shard_writer(part: Part, name: str, gzip_level: int = 6) -> Iterator[TarWriter]:
    """A tar writer for the file `name` of the artifact, gzip-compressed if the name says so."""
    with part.create(name) as file:
        if not is_compressed(name):
            buffered = io.BufferedWriter(_Raw(file), _BUFFER_BYTES)
            tar = TarWriter(cast(BinaryIO, buffered))
            yield tar
            tar.close()
            buffered.flush()
            return
        # mtime 0 and no file name in the gzip header: otherwise each run gives other bytes.
        with gzip.GzipFile("", "wb", gzip_level, cast(BinaryIO, file), mtime=0) as compressor:
            tar = TarWriter(cast(BinaryIO, compressor))
            yield tar
            tar.close()


class _Raw(io.RawIOBase):
    """Adapter of a file for `io.BufferedWriter`."""

    def __init__(self, file: HashingWriter) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)
