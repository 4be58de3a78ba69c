"""Hashing in a thread gives the digests of hashlib."""

import hashlib
import threading

from hypothesis import given
from hypothesis import strategies as st

from sanitize.hashing import Sha256

SIZES = st.sampled_from([0, 1, 1000, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 1 << 20])


@given(st.lists(st.tuples(SIZES, st.integers(0, 255)), max_size=8))
def test_it_is_the_digest_of_all_pieces_in_order(pieces: list[tuple[int, int]]) -> None:
    ours, reference = Sha256(), hashlib.sha256()
    for size, value in pieces:
        ours.update(bytes([value]) * size)
        reference.update(bytes([value]) * size)
    assert ours.hexdigest() == reference.hexdigest()
    ours.update(b"more")  # after a digest it goes on, as hashlib does
    reference.update(b"more")
    assert ours.hexdigest() == reference.hexdigest()


def test_a_buffer_may_be_filled_anew_at_once() -> None:
    ours, reference, buffer = Sha256(), hashlib.sha256(), bytearray(1 << 20)
    for value in range(20):
        buffer[:] = bytes([value]) * len(buffer)
        ours.update(memoryview(buffer))
        reference.update(buffer)
    assert ours.hexdigest() == reference.hexdigest()


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())  # a hash of an earlier test, dropped with its exception, may be there still

    def threads() -> list[threading.Thread]:
        new = set(threading.enumerate()) - before
        return [thread for thread in new if thread.name.startswith("sanitize-sha256")]

    asked = Sha256()
    asked.update(bytes(1 << 20))
    assert threads()
    asked.hexdigest()
    assert not threads()
    dropped = Sha256()
    dropped.update(bytes(1 << 20))
    (thread,) = threads()
    del dropped
    thread.join(10)
    assert not thread.is_alive()
