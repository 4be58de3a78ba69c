"""Keys that occur in several shards: of a table of labels, different samples would get the label of one row."""

from collections.abc import Iterable

import numpy as np

from sanitize.plural import are, counted
from sanitize.tar.names import printable


class SharedKeys:
    """Keys of usable samples, shard by shard; 8 bytes for each."""

    def __init__(self) -> None:
        self._shards: list[str] = []
        self._hashes: list[np.ndarray] = []

    def add(self, shard: str, keys: Iterable[str]) -> None:
        """Add the keys of a shard; those that repeat in it count once."""
        self._shards.append(shard)
        self._hashes.append(np.unique(np.array([hash(key) for key in keys], np.int64)))

    def problem(self) -> str | None:
        """What is wrong, and what to do; None where each key is in one shard."""
        hashes_N = np.concatenate([np.empty(0, np.int64), *self._hashes])
        values, counts = np.unique(hashes_N, return_counts=True)
        shared = values[counts > 1]
        if not len(shared):
            return None
        where = [shard for shard, found in zip(self._shards, self._hashes, strict=True) if shared[0] in found][:2]
        n = counted(len(shared), "key")
        return (
            f"{n} {are(len(shared))} in several shards, such as {' and '.join(map(printable, where))}: "
            "the table of labels has one row for a key, and its samples may be different ones; give each sample a key "
            "of its own, or clean each shard with a table of its own"
        )
