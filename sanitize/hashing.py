"""SHA-256 beside the work: hashing is most of what copying a shard costs, and it needs no interpreter."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

_LARGE = 1 << 17  # bytes; hashing them takes so long that handing them to a thread does not count


class Sha256:
    """As `hashlib.sha256`, but large pieces are hashed by a thread, one piece behind the caller."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread: ThreadPoolExecutor | None = None
        self._behind: Future[None] | None = None

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Hash what comes next; `data` is the caller's again when this returns."""
        self._wait()
        if len(data) < _LARGE:
            self._sha256.update(data)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "sanitize-sha256")
        self._behind = self._thread.submit(self._sha256.update, bytes(data))  # bytes of bytes are no copy

    def hexdigest(self) -> str:
        """Of everything so far; ends the thread, which a hash that is dropped does too."""
        self._wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._behind is not None:
            self._behind.result()
            self._behind = None
