"""A lock on a folder of an object store: one process at a time writes there, and a dead process loses the lock.

The lock is an object FOLDER/.lock/NUMBER that names its holder. Every new holder and every renewal creates the next
number and removes the earlier ones. A store creates a name only where there is none (`If-None-Match: *` on S3,
`ifGenerationMatch=0` on Google Cloud Storage), so of two processes that try, one fails. To give the lock back, its
holder creates the next number without a holder; this object stays, so that numbers only rise and only earlier numbers
are removed. Conditions on existing objects (`If-Match`) are not needed; fsspec offers them for S3 alone.

A lock that was not renewed for `EXPIRED` seconds may be taken. Its age is measured by the clock of the store: the
modification time of the lock against that of an object created now. The holder measures the time since its last renewal
by its own clocks; after `DOUBTFUL` seconds (a pause, or a store out of reach) it renews the lock before it writes. If
another process has taken the lock, the renewal fails, and the former holder stops writing (`LostLeaseError`).

One case remains: a request that has been sent cannot be withdrawn. A process that is paused during a request for longer
than `EXPIRED` may still write that one object when it continues.
"""

import json
import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep, time

from sanitize import remote
from sanitize.errors import ArtifactError, ConfigError, LostLeaseError, StorageError

logger = logging.getLogger("sanitize.lease")

RENEWED = 20.0  # seconds between renewals of a lease
DOUBTFUL = 90.0  # seconds since a renewal after which a lease is renewed before the next write
EXPIRED = 120.0  # seconds since a renewal after which another process may take the lease
SETTLED = 0.5  # seconds to wait for a second writer, in a store that cannot keep two apart
_LARGEST = 4096  # bytes read of a lock, which other processes write
_NUMBER = re.compile(r"(?!0+$)[0-9]{10}")  # numbers begin at 1
_LAST = 9_000_000_000  # at one number every 20 s, 5,700 years


def _entry(holder: str) -> bytes:
    return json.dumps({"holder": holder}).encode()


_FREE = _entry("")


class Lease:
    """The lock of one folder, held by this process.

    Attributes:
        folder: URL of the folder.
        number: number of the current lock object.
        keeps_apart: True if the store creates an object only where there is none.
    """

    def __init__(self, folder: str, number: int, data: bytes, keeps_apart: bool = True) -> None:
        self.folder, self.number, self.keeps_apart = folder, number, keeps_apart
        self._data = data  # content of object `number`; until the lease is taken, that of another process or none
        self._mine = _entry(f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex}")
        self._renewed = (0.0, 0.0)
        self._began: tuple[float, float] | None = None  # start of a renewal without an answer; it may have succeeded
        self._lost = ""
        self._one_at_a_time = threading.Lock()

    @property
    def is_sure(self) -> bool:
        """True while no other process can have taken the lease; sends no request."""
        return not self._lost and self._age() < DOUBTFUL

    def _age(self) -> float:
        """Seconds since the last renewal, the larger of two clocks: some clocks stop while a machine sleeps."""
        return max(now - then for now, then in zip((monotonic(), time()), self._renewed, strict=True))

    def renew(self) -> bool:
        """Create the next number; False where another process was faster, or already holds the lease.

        Raises:
            StorageError: the store cannot be reached; this process may still hold the lease.
        """
        with self._one_at_a_time:
            return self._renew()

    def _renew(self) -> bool:
        if self._lost:
            return False
        # The age of a lease begins with the first request, not with the answer, nor with a repeated request.
        self._began = self._began or (monotonic(), time())
        try:
            is_next = self._create_next(self._mine)
        except OSError as error:
            raise StorageError(f"cannot renew the lock of {self.folder}: {error}") from error
        if not is_next:
            self._lost = _holder_of(self.folder)
            if self._data == self._mine:
                logger.error("%s was taken over by another process: %s", self.folder, self._lost)
            return False
        self._renewed, self._began = self._began, None
        self.number, self._data = self.number + 1, self._mine
        with suppress(OSError, StorageError):  # the next renewal removes the rest
            self._remove_before(self.number)
        return True

    def _create_next(self, data: bytes) -> bool:
        """Create number + 1 while `number` is unchanged: later holders remove `number`, and it never comes back."""
        following = _url(self.folder, self.number + 1)
        if not self._is_unchanged() or (not self.keeps_apart and _read(following) not in (None, data)):
            return False
        remote.write_new(following, data)
        if not self.keeps_apart:
            sleep(SETTLED)
        # The object is read back, because an answer may be lost and its request repeated.
        if _read(following) != data:
            return False
        if not self._is_unchanged():  # this process was paused, and numbers were removed and created since
            remote.remove(following)
            return False
        return True

    def _is_unchanged(self) -> bool:
        if self.number == 0:  # there was no lock: the only number is the one that this process creates
            return set(_numbers(self.folder)) <= {1}
        return _read(_url(self.folder, self.number)) == self._data

    def _remove_before(self, number: int) -> None:
        for earlier in sorted(_numbers(self.folder)):  # in order: `_create_next` relies on it
            if earlier < number:
                remote.remove(_url(self.folder, earlier))

    def check(self) -> None:
        """Return if this process may write now; renew the lease first where this is in doubt.

        Raises:
            LostLeaseError: another process has taken the lease.
            StorageError: the lease has to be renewed, and the store cannot be reached.
        """
        for _ in range(2):  # the first may complete a renewal that began long ago
            if self.is_sure:
                return
            if not self.renew():
                raise LostLeaseError(self._why_lost())
        if not self.is_sure:
            raise StorageError(f"the store of {self.folder} takes longer than {DOUBTFUL:.0f} s to renew a lock")

    def _why_lost(self) -> str:
        return (
            f"{self.folder} was taken over by another process ({self._lost}), because this one had not renewed its "
            f"lock for {EXPIRED:.0f} s: it was paused, or did not reach the store. It has stopped writing there. Wait "
            "for the other process, and run again"
        )

    def give_back(self) -> None:
        """Release the folder, unless another process holds it already."""
        with self._one_at_a_time:
            try:
                is_held = self._renew()
                self._renewed = (0.0, 0.0)
                if is_held and self._create_next(_FREE):
                    self._remove_before(self.number + 1)
            except (OSError, StorageError) as error:
                logger.warning("cannot give %s back: %s; its lock expires in %.0f s", self.folder, error, EXPIRED)
            self._lost = self._lost or "it was given back"


@contextmanager
def leased(folder: str) -> Iterator[Lease]:
    """Hold the lock of a folder, and renew it in a thread.

    Raises:
        ArtifactError: another process holds the lock.
        LostLeaseError: another process has taken the lock before the block ended.
        ConfigError: the store cannot create an object only where there is none.
    """
    lease, done = take(folder.rstrip("/")), threading.Event()

    def keep() -> None:
        is_held = True
        while is_held and not done.wait(RENEWED):
            with suppress(StorageError):  # the next renewal may succeed; `check` raises if the store stays out of reach
                is_held = lease.renew()

    thread = threading.Thread(target=keep, name="sanitize-lease", daemon=True)
    thread.start()
    _HELD.append(lease)
    try:
        yield lease
        lease.check()
    finally:
        done.set()
        thread.join()
        _HELD.remove(lease)
        lease.give_back()


_HELD: list[Lease] = []
os.register_at_fork(after_in_child=_HELD.clear)  # the child has no thread that renews; its parent holds the lease


def _over(url: str) -> list[Lease]:
    """Leases of this process on folders around `url`, the last of each folder."""
    return list({lease.folder: lease for lease in list(_HELD) if f"{url}/".startswith(f"{lease.folder}/")}.values())


def check_held(url: str) -> None:
    """Return if this process may write `url`: it still holds its leases on all folders around it.

    Raises:
        LostLeaseError: another process has taken a lease.
        StorageError: a lease has to be renewed, and the store cannot be reached.
    """
    for lease in _over(url):
        lease.check()


def is_surely_held(url: str) -> bool:
    """The same without a request to the store: False where `check_held` needs one."""
    return all(lease.is_sure for lease in _over(url))


def take(folder: str) -> Lease:
    """Take the lock of a folder that is free, or was not renewed for `EXPIRED` seconds.

    Raises:
        ArtifactError: another process holds the lock, or was faster.
        ConfigError: the store cannot create an object only where there is none.
    """
    now, keeps_apart = _ask_store(folder)
    number = max(_numbers(folder), default=0)
    if number >= _LAST:
        raise ArtifactError(f"{_url(folder, number)} is no lock of ours; remove it")
    data = _read(_url(folder, number)) if number else _FREE
    is_free = data == _FREE
    with suppress(FileNotFoundError):  # it has just been renewed or given back
        is_free = is_free or (data is not None and now - remote.modified(_url(folder, number)) >= EXPIRED)
    lease = Lease(folder, number, data or b"", keeps_apart)
    if is_free and lease.renew():
        return lease
    raise ArtifactError(
        f"another process ({_holder_of(folder)}) is writing {folder}; wait for it, or choose another --out. If it is "
        f"dead, its lock in {folder}/.lock expires {EXPIRED:.0f} s after its last renewal"
    )


def _ask_store(folder: str) -> tuple[float, bool]:
    """Seconds since 1970 by the store's clock, and True if the store creates an object only where there is none."""
    url = f"{folder}/.lock/ask-{uuid.uuid4().hex}"
    try:
        remote.write_new(url, b"?")
        now, keeps_apart = remote.modified(url), not remote.write_new(url, b"?")
    except (NotImplementedError, TypeError, ValueError) as error:
        store = url.partition("://")[0]
        raise ConfigError(
            f"{folder} cannot be locked: {store}:// cannot create an object only where there is none ({error}); choose "
            "another --out"
        ) from error
    finally:
        with suppress(OSError, StorageError):
            remote.remove(url)
    if not keeps_apart:
        logger.warning(
            "the store of %s replaces an object although it should create one only if there is none: two runs that "
            "begin there in the same second, or one that continues after a pause of %.0f s, may write at the same time",
            folder,
            EXPIRED,
        )
    return now, keeps_apart


def _numbers(folder: str) -> list[int]:
    return [int(name) for name in remote.names_below(f"{folder}/.lock") if _NUMBER.fullmatch(name)]


def _url(folder: str, number: int) -> str:
    return f"{folder}/.lock/{number:010d}"


def _read(url: str) -> bytes | None:
    """Content of a lock, at most `_LARGEST` bytes; None where there is none."""
    try:
        with remote.RangeReader(url, block=_LARGEST) as reader:
            return reader.read(_LARGEST)
    except FileNotFoundError:
        return None


def _holder_of(folder: str) -> str:
    """Holder of the lock, for a message."""
    try:
        data = _read(_url(folder, max(_numbers(folder))))
        return ascii(str(json.loads(data or b"")["holder"]))[1:-1][:200]
    except (OSError, StorageError, ValueError, LookupError, TypeError, RecursionError):
        return "whose name is not known"
