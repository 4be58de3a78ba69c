"""SHA-256 in a thread: hashing is most of the cost of copying a shard, and does not hold the interpreter lock."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

_LARGE = 1 << 17  # bytes; hashing them takes much longer than handing them to a thread


class Sha256:
    """Like `hashlib.sha256`; large pieces are hashed by a thread, one piece behind the caller."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread: ThreadPoolExecutor | None = None
        self._behind: Future[None] | None = None

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Hash the next bytes; the caller may change `data` afterwards."""
        self._wait()
        if len(data) < _LARGE:
            self._sha256.update(data)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "sanitize-sha256")
        self._behind = self._thread.submit(self._sha256.update, bytes(data))  # bytes(bytes) is no copy

    def hexdigest(self) -> str:
        """Hex digest of all bytes so far; ends the thread (garbage collection does so too)."""
        self._wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._behind is not None:
            self._behind.result()
            self._behind = None
