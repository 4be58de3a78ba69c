"""Writing one shard inside an artifact: the same samples give the same bytes, compressed or not."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from sanitize.artifacts import Part
from sanitize.data.tar import TarWriter


def is_compressed(name: str) -> bool:
    """True for .tar.gz and .tgz."""
    return name.endswith((".gz", ".tgz"))


@contextmanager
def shard_writer(part: Part, name: str, gzip_level: int = 6) -> Iterator[TarWriter]:
    """A tar writer into the file `name` of the artifact, gzip-compressed where the name says so."""
    with part.create(name) as file:
        stream = cast(BinaryIO, file)
        if not is_compressed(name):
            tar = TarWriter(stream)
            yield tar
            tar.close()
            return
        # mtime 0 and no file name in the gzip header: otherwise every run would give other bytes.
        with gzip.GzipFile("", "wb", gzip_level, stream, mtime=0) as compressor:
            tar = TarWriter(cast(BinaryIO, compressor))
            yield tar
            tar.close()
