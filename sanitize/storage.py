"""Files, by path or URL. Local paths use the file system; everything else goes through `remote`.

A file appears whole or not at all: it is written beside its final name, flushed to disk, and renamed; an object is
written to a temporary file here first, and uploaded when it is complete.
"""

import errno
import fcntl
import hashlib
import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, TypeVar, cast

from sanitize import remote
from sanitize.errors import ArtifactError, ConfigError, DataError, StorageError
from sanitize.hashing import Sha256
from sanitize.lease import check_held, is_surely_held, leased
from sanitize.remote import Place

T = TypeVar("T")

# fsspec protocols that only read bytes. Others open archives, caches and programs, and `pipe:` of webdataset runs a
# shell: with those, a URL could do more than its reader expects.
_PLAIN = frozenset({"file", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_local(url: str) -> bool:
    """True for a plain path or a file:// URL."""
    return ("://" not in url and "::" not in url) or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://"))


def absolute(url: str) -> str:
    """Absolute path of a local URL; links are not followed, so that a folder of links keeps its names."""
    return os.path.abspath(local_path(url))  # noqa: PTH100 - Path.resolve would follow them


def join(folder: str | Path, *names: str) -> str:
    """Path or URL of a file or folder inside a folder."""
    return "/".join([str(folder).rstrip("/"), *names])


def check_url(url: str) -> str:
    """The URL itself, or ConfigError if opening it would do anything other than read bytes."""
    protocol = url.partition("://")[0].lower() if "://" in url else "file"
    if protocol not in _PLAIN or "::" in url or url.lower().startswith("pipe:"):
        raise ConfigError(f"{url!r} is refused: a shard is a path or a plain s3://, gs://, http(s):// or memory:// URL")
    return url


def open_read(url: str) -> BinaryIO:
    """Seekable binary stream of a file. Raises DataError if the file cannot be opened."""
    check_url(url)
    try:
        if is_local(url):
            return open(local_path(url), "rb", opener=_open_regular)
        return io.BufferedReader(remote.RangeReader(url), 1 << 20)
    except OSError as error:
        raise DataError(f"cannot open {url}: {error}") from error


def read_bytes(url: str | Path) -> bytes:
    """Content of a small file. Raises FileNotFoundError."""
    return local_path(str(url)).read_bytes() if is_local(str(url)) else remote.read(str(url))


def exists(url: str | Path) -> bool:
    """True for a file and for a folder; in an object store, a folder exists when an object is in it."""
    return local_path(str(url)).exists() if is_local(str(url)) else remote.exists(str(url))


def names_below(folder: str | Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted; empty without a folder."""
    if not is_local(str(folder)):
        return remote.names_below(str(folder))
    path = local_path(str(folder))
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def stamps_below(folder: str | Path) -> dict[str, tuple[int, float]]:
    """Size in bytes and time of modification, in seconds, of all files below a folder, by name relative to it."""
    if not is_local(str(folder)):
        return remote.stamps_below(str(folder))
    path, found = local_path(str(folder)), {}
    for where, _, names in os.walk(path):
        for name in names:
            file = Path(where, name)
            with suppress(FileNotFoundError):  # a link to nothing
                status = file.stat()
                found[str(file.relative_to(path))] = status.st_size, status.st_mtime
    return found


def remove(url: str | Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if not is_local(str(url)):
        check_held(str(url))
        remote.remove(str(url))
    elif (path := local_path(str(url))).is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _open_regular(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO in place of a shard would otherwise wait for a writer.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return descriptor


def fingerprint(url: str) -> dict[str, str | int]:
    """URL, size, and modification time or ETag of a file: they differ where the file has changed.

    Raises:
        DataError: the file is not there.
    """
    return fingerprints([url])[0]


def fingerprints(urls: Sequence[str]) -> list[dict[str, str | int]]:
    """Fingerprint of each file; object stores get up to `remote.PARALLEL` requests at once.

    Raises:
        DataError: a file is not there.
    """
    return for_each(_fingerprint, urls)


def for_each(function: Callable[[str, Place | None], T], urls: Sequence[str]) -> list[T]:
    """`function(url, place)` for each URL, for object stores in up to `remote.PARALLEL` threads.

    Args:
        function: takes a URL, and its file system with the path in it, None for a local file.
        urls: paths or URLs.

    Raises:
        ConfigError: opening a URL could do more than read bytes.
    """
    # fsspec opens a file system for each thread that needs one: here one serves all threads.
    places = [None if is_local(check_url(url)) else remote.filesystem(url) for url in urls]
    if not any(places):
        return [function(url, None) for url in urls]
    with ThreadPoolExecutor(remote.PARALLEL) as pool:
        return list(pool.map(function, urls, places))


def _fingerprint(url: str, place: Place | None) -> dict[str, str | int]:
    try:
        if place is None:
            status = local_path(url).stat()
            return {"url": absolute(url), "size": status.st_size, "modified": status.st_mtime_ns}
        found = remote.info(url, place)
    except OSError as error:
        raise DataError(f"cannot read {url}: {error}") from error
    return {"url": url, "size": int(found["size"] or 0), "modified": remote.version(found)}


class HashingWriter:
    """A binary file that computes the sha256 and the size of the bytes written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = Sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`."""
        self.size += len(data)  # first: where the disk is full, this is the size that was needed
        self._sha256.update(data)
        self._stream.write(data)
        return len(data)

    def flush(self) -> None:
        """Write buffered bytes to the file."""
        self._stream.flush()

    @property
    def sha256(self) -> str:
        """Hex digest of all bytes written so far."""
        return self._sha256.hexdigest()


@contextmanager
def create(url: str | Path) -> Iterator[HashingWriter]:
    """Write a file that appears under its name only when it is whole; an exception leaves no file behind.

    Raises:
        StorageError: the disk is full, the file may not be written, or the store cannot be reached.
        LostLeaseError: another process has taken the folder that this process had locked; see `exclusive`.
    """
    with _create_file(local_path(str(url))) if is_local(str(url)) else _create_object(str(url)) as writer:
        yield writer


def create_new(url: str | Path, data: bytes) -> bool:
    """Write a small file unless the name exists; False if it does. Of several writers one wins.

    Raises:
        StorageError: the file may not be written, or the store cannot be reached.
    """
    if not is_local(str(url)):
        check_held(str(url))
        return remote.write_new(str(url), data)
    path = local_path(str(url))
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{path.name}")
    with create(temporary) as writer:
        writer.write(data)
    try:
        os.link(temporary, path)  # fails where the name exists; a rename would replace the file
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot_write(path, len(data), error) from error
    finally:
        _remove(temporary)
    sync_folder(path.parent)
    return True


@contextmanager
def _create_object(url: str) -> Iterator[HashingWriter]:
    with tempfile.TemporaryDirectory(prefix=f"sanitize-{os.getpid()}-") as folder:
        file = Path(folder) / "object"
        with _create_file(file) as writer:
            yield writer
        try:
            remote.upload(file, url, partial(check_held, url), partial(is_surely_held, url))
        except OSError as error:
            raise StorageError(f"cannot write {url}: {error}") from error


@contextmanager
def _create_file(path: Path) -> Iterator[HashingWriter]:
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{path.name}")
    writer = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            writer = HashingWriter(stream)
            yield writer
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            raise _cannot_write(path, writer.size if writer else 0, error) from error
        raise


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; flushing a file does not flush its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(folder: Path) -> None:
    """The same for a folder and all below it."""
    for where, _, _ in os.walk(folder):
        sync_folder(Path(where))


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _cannot_write(path: Path, size: int, error: OSError) -> StorageError:
    if error.errno not in _FULL:
        return StorageError(f"cannot write {path}: {error.strerror or error}")
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    except OSError:
        free = "the free space there is unknown"
    return StorageError(
        f"no space left to write {path}: it takes more than {size:,} bytes, {free}. Make room, or choose another "
        "--out, and run again: finished parts are kept"
    )


def sha256_file(url: str | Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open_read(str(url)) as stream:
        return hashlib.file_digest(cast(io.BufferedReader, stream), "sha256").hexdigest()


@contextmanager
def exclusive(url: str | Path) -> Iterator[None]:
    """Hold the lock of a run folder; when the process ends, for any reason, another may take the lock.

    Raises:
        ArtifactError: another process holds the lock.
        LostLeaseError: the folder is in an object store, and another process has taken the lock; see `lease`.
    """
    with _locked(local_path(str(url))) if is_local(str(url)) else leased(str(url)):
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(f"another process is writing {folder}; wait for it, or choose another --out") from error
        yield
