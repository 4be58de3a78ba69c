"""Calls that begin at the same moment, each in a thread of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def side_by_side(n: int, work: Callable[[int], T]) -> list[T]:
    """Results of work(0), …, work(n - 1). Raises the first error of a call."""
    barrier = threading.Barrier(n)

    def begin(i: int) -> T:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(begin, range(n)))
