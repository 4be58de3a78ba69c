"""Paths and files. Local paths take the plain road; everything else goes through fsspec.

A file appears whole or not at all: it is written beside its final name, flushed to disk, and renamed.
"""

import fcntl
import glob
import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import fsspec

from sanitize.errors import ArtifactError, ConfigError, DataError

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# fsspec protocols that name bytes and do nothing else; others reach into archives, caches and programs on behalf of
# whoever wrote the URL, and `pipe:`, which webdataset knows, runs a shell.
_PLAIN = frozenset({"file", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})


def is_local(url: str) -> bool:
    """True for a plain path or a file:// URL."""
    return ("://" not in url and "::" not in url) or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://"))


def absolute(url: str) -> str:
    """A local URL as an absolute path; links are not followed, so that a folder of links keeps its names."""
    return os.path.abspath(local_path(url))  # noqa: PTH100 - Path.resolve would follow them


def check_url(url: str) -> str:
    """The URL itself, or ConfigError if opening it would do anything other than read bytes."""
    protocol = url.partition("://")[0].lower() if "://" in url else "file"
    if protocol not in _PLAIN or "::" in url or url.lower().startswith("pipe:"):
        raise ConfigError(f"{url!r} is refused: a shard is a path or a plain s3://, gs://, http(s):// or memory:// URL")
    return url


def open_read(url: str) -> BinaryIO:
    """Open for reading bytes; the result is seekable. Raises DataError if it is not there."""
    check_url(url)
    try:
        if is_local(url):
            return local_path(url).open("rb")
        fs, path = _filesystem(url)
        return cast(BinaryIO, fs.open(path, "rb"))
    except OSError as error:
        raise DataError(f"cannot open {url}: {error}") from error


def fingerprint(url: str) -> dict[str, str | int]:
    """What tells, without reading it, that a file has changed: size, and modification time or ETag."""
    check_url(url)
    try:
        if is_local(url):
            stat = local_path(url).stat()
            return {"url": absolute(url), "size": stat.st_size, "modified": stat.st_mtime_ns}
        fs, path = _filesystem(url)
        info = fs.info(path)
    except OSError as error:
        raise DataError(f"cannot read {url}: {error}") from error
    modified = next(
        (str(info[name]) for name in ("ETag", "etag", "LastModified", "mtime", "created") if name in info), ""
    )
    return {"url": url, "size": int(info["size"] or 0), "modified": modified}


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"cannot read {url}: {error}") from error
    return fs, path


def find_shards(sources: Sequence[str] | str) -> dict[str, str]:
    """Expand directories, globs and brace ranges (`train-{000000..000009}.tar`) into shards.

    Returns:
        {name: url}, sorted by name, which is the path below the folder all shards share. The order in which
        sources were given is forgotten on purpose: results must not depend on it.

    Raises:
        ConfigError: a source finds nothing, or the same shard was given twice.
    """
    from webdataset.shardlists import expand_urls

    urls: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        check_url(source)
        for url in expand_urls(source):
            found = _expand(check_url(url))  # again: braces may have hidden what it is
            if not found:
                raise ConfigError(f"no shards at {url!r}: expected files ending in {', '.join(SHARD_SUFFIXES)}")
            urls += found
    if not urls:
        raise ConfigError("no shards: the list of sources is empty")
    urls = [absolute(url) if is_local(url) else url for url in urls]
    if len(set(urls)) != len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise ConfigError(f"shard {twice} is listed twice")
    folders = [url.rpartition("/")[0] for url in urls]
    base = os.path.commonpath(folders) if all(map(is_local, urls)) else _common_prefix(folders)
    return dict(sorted((url[len(base) :].lstrip("/"), url) for url in urls))


def _common_prefix(folders: Sequence[str]) -> str:
    parts = [folder.split("/") for folder in folders]
    shared = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    while shared and not all(part[: len(shared)] == shared for part in parts):
        shared.pop()
    return "/".join(shared)


def _expand(url: str) -> list[str]:
    if is_local(url):
        path = local_path(url)
        if path.is_dir():
            return sorted(str(file) for file in path.rglob("*") if file.name.endswith(SHARD_SUFFIXES))
        if path.exists():
            return [str(path)]
        return sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - the pattern may be absolute
    fs, path_in_fs = _filesystem(url)
    protocol = url.partition("://")[0]
    if fs.isdir(path_in_fs):
        found = [name for name in fs.find(path_in_fs) if name.endswith(SHARD_SUFFIXES)]
    else:
        found = fs.glob(path_in_fs) if any(c in url for c in "*?[") else [path_in_fs]
    return [name if "://" in name else f"{protocol}://{name}" for name in sorted(found)]


class HashingWriter:
    """A binary file that remembers the sha256 and the size of what was written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`."""
        self._stream.write(data)
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand what is buffered to the file."""
        self._stream.flush()

    @property
    def sha256(self) -> str:
        """Hex digest of everything written so far."""
        return self._sha256.hexdigest()


@contextmanager
def create(path: Path) -> Iterator[HashingWriter]:
    """Write a file that appears under its name only when it is whole; an exception leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        with temporary.open("wb") as stream:
            writer = HashingWriter(stream)
            yield writer
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_file(path: Path) -> str:
    """Hex digest of a local file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; it is released when the process ends, however it ends.

    Raises:
        ArtifactError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(f"another process is writing {folder}; wait for it, or choose another --out") from error
        yield
