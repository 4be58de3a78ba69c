"""The lock of a folder in an object store: at most one process writes, whatever happens to the others."""

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.s3.responses import S3Response

from flows.retry import is_transient
from sanitize import lease, remote, storage
from sanitize.errors import ArtifactError, ConfigError, LostLeaseError, StorageError
from sanitize.lease import Lease, take
from tests.clock import Clock
from tests.s3 import s3_bucket
from tests.side_by_side import side_by_side

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket whose conditional writes are atomic, as those of S3 are; moto looks first and writes then."""
    whole, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(self: S3Response) -> Any:
        with one_at_a_time:
            return whole(self)

    monkeypatch.setattr(S3Response, "put_object", put_object)
    with s3_bucket(monkeypatch, rate=0.0) as (url, _):
        yield url


@pytest.fixture(params=["memory", "s3"])
def folder(request: pytest.FixtureRequest) -> str:
    """A folder that does not exist yet, in each kind of store."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    return f"{request.getfixturevalue('s3')}/run"


def write(url: str, data: bytes = b"x") -> None:
    with storage.create(url) as writer:
        writer.write(data)


def left_in(folder: str) -> list[str]:
    """Objects beside the lock, which is a single object."""
    names = storage.names_below(folder)
    assert sum(name.startswith(".lock/") for name in names) == 1
    return [name for name in names if not name.startswith(".lock/")]


def test_a_holder_that_was_paused_writes_nothing_over_its_successor(folder: str, clock: Clock) -> None:
    with pytest.raises(LostLeaseError, match="was taken over by another process"), storage.exclusive(folder):  # noqa: PT012
        write(f"{folder}/before")
        clock.now += 130
        successor = take(folder)
        for change in (
            lambda: write(f"{folder}/x"),
            lambda: storage.create_new(f"{folder}/x", b"x"),
            lambda: storage.remove(f"{folder}/before"),
        ):
            with pytest.raises(LostLeaseError, match=rf"{folder} was taken over .*/{os.getpid()}/.*run again"):
                change()
        assert storage.names_below(folder) == [".lock/0000000002", "before"]
        write(f"{folder}2/x")  # it never held that one
    assert storage.names_below(folder) == [".lock/0000000002", "before"]  # its end leaves the lock of the other alone
    assert successor.renew()
    with pytest.raises(ArtifactError, match="another process"):
        take(folder)
    successor.give_back()
    assert left_in(folder) == ["before"]
    take(folder).give_back()


def test_an_error_of_the_work_is_not_hidden_by_a_lost_lease(folder: str, clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError), storage.exclusive(folder):  # noqa: PT012
        clock.now += 130
        take(folder)
        raise ZeroDivisionError


def test_a_holder_that_was_paused_goes_on_where_its_place_is_free(folder: str, clock: Clock) -> None:
    with storage.exclusive(folder):
        clock.now += 1000
        write(f"{folder}/x")
        with pytest.raises(ArtifactError, match="another process"):
            take(folder)
    assert left_in(folder) == ["x"]


def test_an_outage_that_is_shorter_than_a_lease_costs_nothing(
    folder: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with storage.exclusive(folder):
        with monkeypatch.context() as outage:
            outage.setattr(remote, "write_new", no_answer)
            for _ in range(5):
                clock.now += 20
                with pytest.raises(StorageError, match="no answer"):
                    storage_lease(folder).renew()
            with pytest.raises(StorageError, match="no answer"):  # it cannot know who holds the lease now
                write(f"{folder}/x")
        assert not storage.exists(f"{folder}/x")
        with pytest.raises(ArtifactError, match="another process"):
            take(folder)
        write(f"{folder}/x")
    assert left_in(folder) == ["x"]


def no_answer(*_: object) -> Any:
    raise StorageError("no answer")


def test_a_lease_is_renewed_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED", 0.05)
    folder = f"memory://{uuid.uuid4().hex}/run"
    with storage.exclusive(folder):
        deadline = time.monotonic() + 60
        while max(lease._numbers(folder)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "sanitize-lease" not in [thread.name for thread in threading.enumerate()]
    assert left_in(folder) == []


def storage_lease(folder: str) -> Lease:
    return next(held for held in lease._HELD if held.folder == folder)


def test_a_renewal_whose_answer_was_lost_does_not_make_the_lease_younger(
    folder: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, whole = take(folder), remote.write_new

    def write_new(url: str, data: bytes) -> bool:
        whole(url, data)
        raise StorageError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "write_new", write_new)
        with pytest.raises(StorageError, match="answer was lost"):
            held.renew()
    clock.now += 100
    assert held.renew()  # it finds its number there, and that is 100 s old
    assert not held.is_sure
    held.check()
    clock.now += 30
    with pytest.raises(ArtifactError, match="another process"):
        take(folder)
    held.check()


def test_a_store_that_is_gone_at_the_end_is_said_and_the_lock_expires(
    folder: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as outage:
        with storage.exclusive(folder):
            outage.setattr(remote, "names_below", no_answer)
            outage.setattr(remote, "remove", no_answer)
            outage.setattr(lease, "_read", no_answer)
        assert "expires in 120 s" in caplog.text
    with pytest.raises(ArtifactError, match="another process"):
        take(folder)
    clock.now += 120
    take(folder)


@pytest.mark.parametrize("is_expired", [True, False])
def test_of_those_that_begin_at_once_exactly_one_holds_the_folder(folder: str, clock: Clock, is_expired: bool) -> None:
    if is_expired:
        take(folder)
        clock.now += 121

    def begin(_i: int) -> Lease | None:
        with contextlib.suppress(ArtifactError):
            return take(folder)
        return None

    held = [lease for lease in side_by_side(4, begin) if lease is not None]
    assert len(held) == 1
    held[0].check()


def test_an_upload_of_minutes_is_not_completed_by_a_holder_that_was_replaced(
    s3: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = remote.filesystem(s3)
    whole, asked = fs.put_file, []
    monkeypatch.setattr(fs, "put_file", lambda *args, **more: whole(*args, chunksize=5 << 20, **more))

    def is_surely_held(url: str) -> bool:
        if not asked:
            clock.now += 130
        asked.append(url)
        return lease.is_surely_held(url)

    monkeypatch.setattr(storage, "is_surely_held", is_surely_held)
    folder = f"{s3}/run"
    content = random.Random(0).randbytes(11 << 20)
    with pytest.raises(LostLeaseError), storage.exclusive(folder):  # noqa: PT012
        write(f"{folder}/a.tar", content)  # the lease is free: it is renewed, and the upload made again
        assert storage.sha256_file(f"{folder}/a.tar")
        assert len(asked) > 3
        asked.clear()
        monkeypatch.setattr(storage, "check_held", check_then(lambda: taken_after_130_s(clock, folder)))
        write(f"{folder}/b.tar", content)
    assert not storage.exists(f"{folder}/b.tar")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    assert not client.list_multipart_uploads(Bucket=s3.removeprefix("s3://")).get("Uploads")


def check_then(event: Callable[[], object]) -> Callable[[str], None]:
    """`check_held`, and then an event, once."""
    happened: list[object] = []

    def check(url: str) -> None:
        lease.check_held(url)
        if not happened:
            happened.append(event())

    return check


def taken_after_130_s(clock: Clock, folder: str) -> Lease:
    clock.now += 130
    return take(folder)


SCRIPT = """
import sys
from sanitize import lease, storage
lease.RENEWED, lease.DOUBTFUL, lease.EXPIRED = 0.5, 2.0, 4.0
with storage.exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
    with storage.create(sys.argv[1] + "/late") as writer:
        writer.write(b"late")
"""


def test_a_process_that_is_really_stopped_is_replaced_and_stops_when_it_wakes(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("RENEWED", 0.5), ("DOUBTFUL", 2.0), ("EXPIRED", 4.0)):
        monkeypatch.setattr(lease, name, seconds)
    folder = f"{s3}/run"
    first = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, folder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGSTOP)
        with when_expired(folder) as held:
            first.send_signal(signal.SIGCONT)
            _, errors = first.communicate("go on\n", timeout=120)
            assert "LostLeaseError" in errors
            assert first.returncode == 1
            held.check()
            write(f"{folder}/mine")
    finally:
        first.kill()
        first.communicate()
    assert left_in(folder) == ["mine"]


@contextlib.contextmanager
def when_expired(folder: str) -> Iterator[Lease]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with lease.leased(folder) as held:
                yield held
                return
        except ArtifactError:
            time.sleep(0.5)
    raise AssertionError("the lease never expired")


HOSTILE = [b"", b"no JSON", b"[]", b"7", b"[" * 100_000, b'{"holder": NaN, "time": 1e999}', bytes(3_000_000)]
HOSTILE += [b'{"holder": {"a": 1}}', json.dumps({"holder": "\x1b[2J\n" * 700}).encode()]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_lock_is_a_lock_and_expires(folder: str, clock: Clock, content: bytes) -> None:
    write(f"{folder}/.lock/0000000007", content)
    with pytest.raises(ArtifactError, match="another process") as refused:
        take(folder)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000
    clock.now += 121
    taken = take(folder)
    assert taken.number == 8
    taken.give_back()
    assert left_in(folder) == []


def test_names_that_are_no_locks_are_left_alone_and_a_number_without_a_next_one_is_refused(
    folder: str, clock: Clock
) -> None:
    for name in ("-000000001", "00000000x1", "1", "٣٣٣٣٣٣٣٣٣٣", "99999999999", "0000000000", "more/0000000002"):
        write(f"{folder}/.lock/{name}")
    take(folder).give_back()
    write(f"{folder}/.lock/9999999999")
    clock.now += 121
    with pytest.raises(ArtifactError, match=r"9999999999 is no lock of ours; remove it"):
        take(folder)


def test_a_lock_that_an_earlier_version_left_does_not_matter(s3: str) -> None:
    write(f"{s3}/run/.lock", b'{"holder": "somebody", "time": 1e12}')
    with storage.exclusive(f"{s3}/run"):
        write(f"{s3}/run/x")


def test_a_folder_that_was_deleted_under_its_holder_is_lost(folder: str, clock: Clock) -> None:
    first = take(folder)
    assert first.renew()
    storage.remove(folder)
    second = take(folder)
    assert not first.renew()
    assert second.renew()
    second.check()


def test_a_lock_that_comes_free_again_is_not_taken_for_the_next_one(
    folder: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, whole, removed = take(folder), remote.remove, []
    clock.now += 130
    with monkeypatch.context() as patch:  # the second dies before it has removed the lock of the first
        patch.setattr(remote, "remove", no_answer)
        take(folder)
    clock.now += 130

    def remove(url: str) -> None:
        if "/ask-" not in url:
            removed.append(url)
        if len(removed) < 2:
            whole(url)

    with monkeypatch.context() as patch:  # the third is paused when it has removed one of the two
        patch.setattr(remote, "remove", remove)
        third = take(folder)
    assert len(removed) == 2
    assert not first.renew()
    assert third.renew()


def test_a_store_that_cannot_keep_two_apart_is_named(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"memory://{uuid.uuid4().hex}/run"
    fs, _ = remote.filesystem(folder)
    whole = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda path, data, mode: whole(path, data))
    monkeypatch.setattr(lease, "SETTLED", 0.01)
    with caplog.at_level(logging.WARNING), pytest.raises(LostLeaseError), storage.exclusive(folder):  # noqa: PT012
        assert f"the store of {folder} replaces an object" in caplog.text
        clock.now += 130
        successor = take(folder)
        write(f"{folder}/x")
    successor.check()
    successor.give_back()
    assert left_in(folder) == []


def test_a_store_that_cannot_create_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"memory://{uuid.uuid4().hex}/run"
    fs, _ = remote.filesystem(folder)
    whole = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda path, data: whole(path, data))
    with pytest.raises(ConfigError, match="memory:// cannot create an object only where there is none"):
        take(folder)


def test_a_lost_lease_is_not_tried_again() -> None:
    state = types.SimpleNamespace(result=lambda raise_on_failure: LostLeaseError("gone"))
    assert not is_transient(None, None, state)


class Stopped(BaseException):
    """The end of an actor."""


class Actor:
    """A process that takes, renews and gives back one lease again and again, and stops at each of its requests."""

    def __init__(self, folder: str) -> None:
        self.folder, self.held, self.fault = folder, [], ""
        self._go, self._waits, self._is_over = threading.Semaphore(0), threading.Semaphore(0), False
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self._waits.acquire()

    def step(self) -> None:
        """Run it up to its next request."""
        self._go.release()
        assert self._waits.acquire(timeout=60)

    def end(self) -> None:
        self._is_over = True
        self._go.release()
        self._thread.join()

    def wait(self) -> None:
        if not self._is_over:
            self._waits.release()
            self._go.acquire()
        if self._is_over:
            raise Stopped

    def fail(self, fault: str) -> None:
        if self.fault == fault:
            self.fault = ""
            raise StorageError(fault)

    def _live(self) -> None:
        with contextlib.suppress(Stopped):
            self.wait()
            while True:
                with contextlib.suppress(ArtifactError, StorageError):
                    self._work()
                self.wait()

    def _work(self) -> None:
        taken = take(self.folder)
        self.held.append(taken)
        for _ in range(3):
            self.wait()
            with contextlib.suppress(StorageError):
                taken.check()
            with contextlib.suppress(StorageError):
                taken.renew()
        taken.give_back()


def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    """A request that waits before it is sent and before its answer arrives, and that may fail at both."""

    def call(*args: Any, **more: Any) -> Any:
        target = getattr(threading.current_thread(), "_target", None)
        actor = getattr(target, "__self__", None)
        if not isinstance(actor, Actor):
            return function(*args, **more)
        actor.wait()
        actor.fail("before")
        answer = function(*args, **more)
        actor.wait()
        actor.fail("after")
        return answer

    return call


# Long runs of one actor with few changes, and time in jumps: what a fair scheduler hardly ever does.
TURN = st.tuples(
    st.integers(0, 2),
    st.integers(1, 40),
    st.sampled_from([0.0, 1.0, 19.0, 89.0, 91.0, 121.0]),
    st.sampled_from(["", "", "before", "after"]),
)


def sure_in(turns: list[tuple[int, int, float, str]]) -> list[set[int]]:
    """Run the actors: after each step, the numbers of those that are sure of the lease."""
    folder, sure = f"memory://{uuid.uuid4().hex}/run", []
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        patch.setattr(lease, "_read", stepping(lease._read))
        for name in ("write_new", "modified", "names_below", "remove"):
            patch.setattr(remote, name, stepping(getattr(remote, name)))
        actors = [Actor(folder) for _ in range(3)]
        try:
            for number, n_steps, seconds, fault in turns:
                clock.now += seconds
                actors[number].fault = fault
                for _ in range(n_steps):
                    actors[number].step()
                    held = [(i, taken) for i, actor in enumerate(actors) for taken in actor.held if taken.is_sure]
                    assert len(held) <= 1, held
                    sure.append({i for i, _ in held})
        finally:
            for actor in actors:
                actor.end()
            storage.remove(folder)
    return sure


@settings(max_examples=300, deadline=None)
@given(st.lists(TURN, max_size=15))
def test_never_two_that_may_write(turns: list[tuple[int, int, float, str]]) -> None:
    sure_in(turns)


def test_one_after_the_other_may_write() -> None:
    """Or the test above shows nothing."""
    stopped_at = next(n for n, sure in enumerate(sure_in([(0, 40, 0.0, "")])) if sure) + 1
    sure = sure_in([(0, stopped_at, 0.0, ""), (1, 40, 0.0, ""), (2, 40, 121.0, "")])
    assert sure[stopped_at - 1] == {0}
    assert all(at == {0} for at in sure[stopped_at : stopped_at + 40]), "the second waits"
    assert {2} in sure[stopped_at + 40 :], "the first has let it expire"
