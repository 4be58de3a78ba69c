"""Copies of one picture among many: exact ones by digest, near ones by perceptual hash and a check on pixels.

Exact: equal sha256. Near: hashes differ in at most `bits` of 64, and the thumbnails correlate: their distance
||a - b|| for thumbnails of mean 0 and length 1 is at most `distance` (.28 is a correlation of .96). Neither brightness,
contrast nor colour of the whole picture changes it. Groups are connected components.

Pairs are sought among neighbours in sorted order (Hernandez and Stolfo, 1995): hashes are sorted `ROTATIONS` times,
each time with other bits first, and each is compared with the next `WINDOW`. That takes N log N whatever the hashes
are, also if all are equal. Who floods the data with different pictures of one hash can hide a pair among them.

Shapes: N images, T thumbnails of P = 256 pixels.
"""

import mmap
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

ROTATIONS, WINDOW = 16, 8
PIXELS = 256
_CHUNK = 1 << 15  # pairs compared at once
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Thumbnails:
    """Thumbnails of all images in a file, so that memory holds those that are compared.

    Args:
        file: N x 256 bytes.
        n: number of images.
    """

    def __init__(self, file: BinaryIO, n: int) -> None:
        self._map = mmap.mmap(file.fileno(), n * PIXELS, access=mmap.ACCESS_READ) if n else None
        self._pixels_NP = np.frombuffer(self._map or b"", np.uint8).reshape(-1, PIXELS)

    def rows(self, at: np.ndarray) -> np.ndarray:
        """Thumbnails of mean 0 and length 1, float32 (M, 256); one of a single colour is 0."""
        x_MP = self._pixels_NP[at].astype(np.float32)
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)  # else pages that were read count as memory of this process
        x_MP -= x_MP.mean(1, keepdims=True)
        return x_MP / np.maximum(np.linalg.norm(x_MP, axis=1, keepdims=True), 1e-6)


def first_of(keys_N: np.ndarray) -> np.ndarray:
    """Index of the first row with the same key, int32 (N,).

    Args:
        keys_N: digests, a structured array of numbers; zeros stand for no digest.
    """
    order = np.lexsort([keys_N[name] for name in keys_N.dtype.names or ()]).astype(np.int32)  # stable
    ordered = keys_N[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] == np.zeros(1, keys_N.dtype))
    first_N = np.empty(len(order), np.int32)
    first_N[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    return first_N


def near_groups(
    hash_N: np.ndarray, group_N: np.ndarray, is_judged_N: np.ndarray, thumbnails: Thumbnails, bits: int, distance: float
) -> np.ndarray:
    """Smallest index in the group of each image, int32 (N,): itself where it has no copies.

    Args:
        hash_N: perceptual hashes, uint64.
        group_N: groups so far, of closer copies, in the same form.
        is_judged_N: False for images that have no near copies, such as those of one colour.
        thumbnails: for the check on pixels.
        bits: most bits in which the hashes of a pair differ.
        distance: largest distance of the thumbnails of a pair.
    """
    at_M = np.flatnonzero(is_judged_N).astype(np.int32)
    for rotation in range(ROTATIONS):
        linked = list(
            _linked(hash_N, group_N, at_M, rotation, bits, lambda i, j: _distance(thumbnails, i, j) <= distance)
        )
        if linked:
            here, there = (np.concatenate(ends) for ends in zip(*linked, strict=True))
            group_N = _merged(group_N, here, there)
    return group_N


def _linked(
    hash_N: np.ndarray,
    group_N: np.ndarray,
    at_M: np.ndarray,
    rotation: int,
    bits: int,
    is_alike: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of alike images that are close in one sorted order; at most one pair for each image."""
    turn = np.uint64(64 // ROTATIONS * rotation)
    hash_M = hash_N[at_M]
    turned_M = (hash_M << turn) | (hash_M >> (np.uint64(64) - turn) if turn else np.uint64(0))
    order_M = at_M[np.argsort(turned_M, kind="stable")]
    del hash_M, turned_M
    is_linked_N = np.zeros(len(hash_N), bool)
    for offset in range(1, WINDOW + 1):
        for start in range(0, len(order_M) - offset, _CHUNK):
            stop = min(start + _CHUNK, len(order_M) - offset)
            i, j = order_M[start:stop], order_M[start + offset : stop + offset]
            close = np.bitwise_count(hash_N[i] ^ hash_N[j]) <= bits
            close &= (group_N[i] != group_N[j]) & ~is_linked_N[j]
            if rotation:  # equal hashes are in the same order every time
                close &= hash_N[i] != hash_N[j]
            i, j = i[close], j[close]
            if len(i):
                alike = is_alike(i, j)
                is_linked_N[j[alike]] = True
                yield i[alike], j[alike]


def _distance(thumbnails: Thumbnails, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Distances of the thumbnails of pairs, float32, in [0, 2]."""
    parts = range(0, len(i), 4096)
    return np.concatenate(
        [np.linalg.norm(thumbnails.rows(i[s : s + 4096]) - thumbnails.rows(j[s : s + 4096]), axis=1) for s in parts]
    )


def _merged(group_N: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The groups after these links, each named by its smallest index."""
    n = len(group_N)
    ends = group_N[here], group_N[there]
    links = coo_matrix((np.ones(len(here), bool), ends), shape=(n, n))
    component_N = connected_components(links, directed=False)[1]
    smallest = np.full(int(component_N.max()) + 1, n, np.int32)
    np.minimum.at(smallest, component_N, np.arange(n, dtype=np.int32))
    return smallest[component_N[group_N]]


def usual_distance(key_N: np.ndarray, is_judged_N: np.ndarray, thumbnails: Thumbnails, most: int = 2000) -> float:
    """Median distance from an image to the nearest other one, among `most` images with the smallest keys.

    Pictures of some data sets are all alike (digits, icons); there a pair must be closer to count as copies.

    Args:
        key_N: numbers that do not depend on the order of the images, uint64; such as the beginning of a digest.
        is_judged_N: images to choose from.
        thumbnails: thumbnails of all images.
        most: number of images.

    Returns:
        The distance; infinity with fewer than three images.
    """
    at_M = np.flatnonzero(is_judged_N)
    key_M = key_N[at_M] * _MIX
    if len(at_M) > most:
        at_M = at_M[np.argsort(key_M, kind="stable")[:most]]
    if len(at_M) < 3:
        return float("inf")
    x_MP = thumbnails.rows(at_M)
    nearest_M = np.concatenate([_nearest(x_MP, start) for start in range(0, len(x_MP), 500)])
    return float(np.median(np.sqrt(np.maximum(0, 2 - 2 * nearest_M))))


def _nearest(x_MP: np.ndarray, start: int) -> np.ndarray:
    """Largest correlation of 500 rows from `start` on with any other row."""
    similar_BM = x_MP[start : start + 500] @ x_MP.T
    rows = np.arange(len(similar_BM))
    similar_BM[rows, start + rows] = -1
    return similar_BM.max(1)
