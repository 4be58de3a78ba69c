"""Objects behind a URL (s3://, gs://, http(s)://, memory:// …), through fsspec.

Failed requests are repeated with back-off; a read continues at the offset where it broke; and an object appears whole
or not at all, because a store shows an upload only when it is complete.
"""

import io
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback

from sanitize.errors import ConfigError, DataError, SanitizeError, StorageError

logger = logging.getLogger("sanitize.remote")
T = TypeVar("T")
Place = tuple[Any, str]  # a file system of fsspec, and a path in it

BLOCK = 8 << 20  # bytes of one ranged request; a reader holds two blocks, the current and the next
ATTEMPTS = 8
PARALLEL = 16  # requests at once, where many objects are looked at
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds; 11 s of pauses in all
# Errors that another attempt would not change. For others libraries raise many types, not only OSError.
_PERMANENT: tuple[type[Exception], ...] = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
_PERMANENT += (ImportError, ValueError, TypeError, NotImplementedError, SanitizeError)


def filesystem(url: str) -> Place:
    """The fsspec file system of a URL, and the path in it. Raises ConfigError where its library is not installed."""
    try:
        # Listings are not cached: another process may have written since.
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(f"cannot reach {url}: {error}; install it, e.g. `pip install 'sanitize[s3]'`") from error
    return fs, path


def retried(call: Callable[[], T], what: str) -> T:
    """Result of `call`, repeated while it fails with a transient error.

    Args:
        call: a request.
        what: description of the request, for messages.

    Raises:
        OSError, ValueError, SanitizeError: a permanent error, as raised by `call`.
        StorageError: all of `ATTEMPTS` attempts failed.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if isinstance(error, _PERMANENT) and not _is_http_trouble(error):
                raise
            if attempt == ATTEMPTS:
                raise StorageError(f"cannot {what}: {_message(error)} ({ATTEMPTS} attempts)") from error
            logger.info("cannot %s: %s; attempt %d of %d follows", what, _message(error), attempt + 1, ATTEMPTS)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    raise AssertionError("unreachable")


def _is_http_trouble(error: Exception) -> bool:
    """True where fsspec reports "not found" for a web server that did not answer."""
    cause = error.__cause__
    answered = getattr(cause, "status", 0) in range(400, 500)
    return type(cause).__module__.startswith("aiohttp") and not answered


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def info(url: str, place: Place | None = None) -> dict[str, Any]:
    """Size and other properties of an object; `place` is `filesystem(url)`. Raises FileNotFoundError."""
    fs, path = place or filesystem(url)
    found: dict[str, Any] = retried(lambda: fs.info(path), f"look at {url}")
    return found


def version(found: dict[str, Any]) -> str:
    """Version of an object: its ETag, or else its time."""
    names = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created")
    return next((str(found[name]) for name in names if found.get(name)), "")


def exists(url: str) -> bool:
    """True for an object, and for a prefix that has objects below it."""
    fs, path = filesystem(url)
    return bool(retried(lambda: fs.exists(path), f"look at {url}"))


def names_below(url: str) -> list[str]:
    """Names of all objects below a prefix, relative to it, sorted."""
    fs, path = filesystem(url)
    root = path.rstrip("/") + "/"
    found: list[str] = retried(lambda: fs.find(path), f"list {url}")
    return sorted(name[name.index(root) + len(root) :] for name in found if root in name)


def stamps_below(url: str) -> dict[str, tuple[int, float]]:
    """Size and time of modification, in seconds, of all objects below a prefix, by name relative to it."""
    fs, path = filesystem(url)
    root = path.rstrip("/") + "/"
    found: dict[str, dict[str, Any]] = retried(lambda: fs.find(path, detail=True), f"list {url}")
    return {
        name[name.index(root) + len(root) :]: (int(entry.get("size") or 0), _modified(entry))
        for name, entry in found.items()
        if root in name
    }


def _modified(found: dict[str, Any]) -> float:
    """Time of modification in seconds; 0 if unknown."""
    names = ("LastModified", "last_modified", "mtime", "updated", "created")
    written = next((found[name] for name in names if found.get(name)), 0.0)
    if isinstance(written, str):
        written = datetime.fromisoformat(written)
    return written.timestamp() if isinstance(written, datetime) else float(written)


def expand(url: str, suffixes: tuple[str, ...], place: Place | None = None) -> list[str]:
    """URLs of the objects of a prefix, a glob or a single URL, sorted.

    Args:
        url: prefix, glob or URL.
        suffixes: lower-case suffixes of the objects to return below a prefix.
        place: `filesystem(url)`, if it is open already.
    """
    fs, path = place or filesystem(url)
    protocol = url.partition("://")[0]
    if any(c in url for c in "*?["):
        found = list(retried(lambda: fs.glob(path), f"list {url}"))
    elif protocol not in ("http", "https") and retried(lambda: fs.isdir(path), f"look at {url}"):
        found = [name for name in retried(lambda: fs.find(path), f"list {url}") if name.lower().endswith(suffixes)]
    else:
        found = [path]
    return [name if "://" in name else f"{protocol}://{name}" for name in sorted(found)]


def read(url: str) -> bytes:
    """Content of an object. Raises FileNotFoundError."""
    with RangeReader(url) as reader:
        return reader.readall()


def modified(url: str) -> float:
    """Time of modification in seconds since 1970, by the clock of the store. Raises FileNotFoundError."""
    fs, path = filesystem(url)
    return float(retried(lambda: fs.modified(path), f"look at {url}").timestamp())


def _allowed() -> bool:
    return True


def upload(
    file: Path, url: str, check: Callable[[], object] = _allowed, is_allowed: Callable[[], bool] = _allowed
) -> None:
    """Upload a local file.

    Args:
        file: path of the file.
        url: URL of the object.
        check: called before each attempt; raises if the object must not be written.
        is_allowed: called after each piece of a large object, and so before the upload is completed; if it returns
            False, this attempt is dropped and `check` is called again. Must not call the store.
    """
    if url.startswith(("http://", "https://")):
        raise PermissionError("a web server is only read from")
    fs, path = filesystem(url)
    size = file.stat().st_size

    def watch(*_: object, **__: object) -> None:
        if not is_allowed():
            raise OSError("the permission to write must be checked again")

    def put() -> None:
        check()
        fs.put_file(str(file), path, callback=Callback(hooks={"watch": watch}))
        if (there := fs.info(path)["size"]) != size:
            raise OSError(f"{there} of {size} bytes arrived")

    retried(put, f"write {url}")


_CREATING = threading.Lock()  # in fsspec's memory://, looking and writing are two steps


def write_new(url: str, data: bytes) -> bool:
    """Create an object unless the name exists; False if it does. Of several writers one wins, if the store can tell."""
    fs, path = filesystem(url)

    def create() -> None:
        with _CREATING if url.startswith("memory://") else nullcontext():
            fs.pipe_file(path, data, mode="create")

    try:
        retried(create, f"write {url}")
    except FileExistsError:
        return False
    return True


def remove(url: str) -> None:
    """Remove an object, or all objects below a prefix, if there are any."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        retried(lambda: fs.rm(path, recursive=True), f"remove {url}")


class RangeReader(io.RawIOBase):
    """An object as a seekable stream of ranged requests; the next block is fetched while one is read.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: the store does not report the size, or does not serve ranges.
        StorageError: a range could not be read in `ATTEMPTS` attempts.
    """

    def __init__(self, url: str, block: int | None = None) -> None:
        super().__init__()
        self._url, self._block = url, block or BLOCK
        self._fs, self._path = filesystem(url)
        size = info(url)["size"]
        if size is None:
            raise DataError(f"cannot read {url}: the server does not report its size")
        self.size = int(size)
        self._at = 0
        self._start, self._data = 0, b""  # the current block
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Change the position; data is requested by the next read."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current block, or else from the next one."""
        if self._at >= self.size:
            return 0
        if not self._start <= self._at < self._start + len(self._data):
            self._data, self._start = self._fetch(self._at), self._at
        begin = self._at - self._start
        piece = memoryview(self._data)[begin : begin + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _fetch(self, start: int) -> bytes:
        ahead, self._ahead = self._ahead, None
        data = ahead[1].result() if ahead is not None and ahead[0] == start else self._range(start)
        if (following := start + len(data)) < self.size:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="sanitize-read")
            self._ahead = following, self._thread.submit(self._range, following)
        return data

    def _range(self, start: int) -> bytes:
        stop = min(start + self._block, self.size)

        def get() -> bytes:
            data: bytes = self._fs.cat_file(self._path, start=start, end=stop)
            if len(data) > stop - start:
                raise ValueError(f"cannot read {self._url}: the server sends more than the requested range")
            if len(data) < stop - start:
                raise OSError(f"{len(data)} of {stop - start} bytes arrived")
            return data

        return retried(get, f"read {self._url} from byte {start}")

    def close(self) -> None:
        """Close the stream; a pending request is abandoned."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._data = b""
        super().close()
