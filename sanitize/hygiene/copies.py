"""Copies of one picture among many: exact ones by digest, near ones by perceptual hash and a check on pixels.

Exact: equal sha256. Near: hashes differ in at most `bits` of 64, and the thumbnails correlate: their distance
||a - b|| for thumbnails of mean 0 and length 1 is at most `distance` (.28 is a correlation of .96). Neither brightness,
contrast nor colour of the whole picture changes it. Groups are connected components.

Pairs are sought among neighbours in sorted order (Hernandez and Stolfo, 1995): hashes are sorted `ROTATIONS` times,
each time with other bits first, and each is compared with the next `WINDOW`. That takes N log N whatever the hashes
are, also if all are equal. Who floods the data with different pictures of one hash can hide a pair among them.

Shapes: N images, T thumbnails of P = 256 pixels.
"""

import os
from collections.abc import Iterator
from itertools import combinations_with_replacement
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

    They are read, not mapped: the kernel maps up to 64 KiB around each one, which counts as memory of this process.

    Args:
        file: 256 bytes an image, flushed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def rows(self, at: np.ndarray) -> np.ndarray:
        """Thumbnails of mean 0 and length 1, float32 (M, 256); one of a single colour is 0."""
        descriptor = self._file.fileno()
        read = b"".join([os.pread(descriptor, PIXELS, PIXELS * i) for i in at.tolist()])
        x_MP = np.frombuffer(read, np.uint8).reshape(len(at), PIXELS).astype(np.float32)
        x_MP -= x_MP.mean(1, keepdims=True)
        x_MP /= np.maximum(np.linalg.norm(x_MP, axis=1, keepdims=True), 1e-6)
        return x_MP


def first_of(keys_N: np.ndarray) -> np.ndarray:
    """Index of the first row with the same key, int32 (N,).

    Args:
        keys_N: digests, a structured array of numbers; zeros stand for no digest.
    """
    order = np.lexsort([keys_N[name] for name in keys_N.dtype.names or ()]).astype(np.int32)  # stable
    ordered = keys_N[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] == np.zeros(1, keys_N.dtype))
    del ordered
    start_N = np.arange(len(order), dtype=np.int32)
    start_N *= is_new
    np.maximum.accumulate(start_N, out=start_N)
    first_N = np.empty(len(order), np.int32)
    first_N[order] = order[start_N]
    return first_N


def near_groups(
    hash_N: np.ndarray, first_N: np.ndarray, is_judged_N: np.ndarray, thumbnails: Thumbnails, bits: int, distance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of copies at half the distance, and at the distance: smallest index in the group of each image.

    Args:
        hash_N: perceptual hashes, uint64.
        first_N: index of the first image with the same file, int32.
        is_judged_N: False for images that have no near copies, such as those of one colour.
        thumbnails: for the check on pixels.
        bits: most bits in which the hashes of a pair differ.
        distance: largest distance of the thumbnails of a pair.

    Returns:
        Two arrays, int32 (N,): an image has its own index where it has no copies. The groups of the first lie within
        those of the second.
    """
    at_M = np.flatnonzero(is_judged_N).astype(np.int32)
    half_N = whole_N = first_N
    for rotation in range(ROTATIONS):
        linked = list(_linked(hash_N, half_N, whole_N, at_M, rotation, bits, distance, thumbnails))
        if linked:
            i, j, is_half = (np.concatenate(parts) for parts in zip(*linked, strict=True))
            whole_N = _merged(whole_N, i, j)
            half_N = _merged(half_N, i[is_half], j[is_half])
    return half_N, whole_N


def _linked(
    hash_N: np.ndarray,
    half_N: np.ndarray,
    whole_N: np.ndarray,
    at_M: np.ndarray,
    rotation: int,
    bits: int,
    distance: float,
    thumbnails: Thumbnails,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of alike images that are close in one sorted order, and whether they are alike at half the distance.

    At most one pair of either kind for each image: a burst has as many links as copies.
    """
    turn = np.uint64(64 // ROTATIONS * rotation)
    hash_M = hash_N[at_M]
    turned_M = (hash_M << turn) | (hash_M >> (np.uint64(64) - turn) if turn else np.uint64(0))
    order_M = at_M[np.argsort(turned_M, kind="stable")]
    del turned_M
    hash_M = hash_N[order_M]
    has_half_N, has_whole_N = np.zeros(len(hash_N), bool), np.zeros(len(hash_N), bool)
    for offset in range(1, WINDOW + 1):
        for start in range(0, len(order_M) - offset, _CHUNK):
            stop = min(start + _CHUNK, len(order_M) - offset)
            differ = hash_M[start:stop] ^ hash_M[start + offset : stop + offset]
            is_close = np.bitwise_count(differ) <= bits
            if rotation:  # equal hashes are in the same order every time
                is_close &= differ != 0
            at = np.flatnonzero(is_close) + start
            i, j = order_M[at], order_M[at + offset]
            is_new_half = (half_N[i] != half_N[j]) & ~has_half_N[j]
            is_new = (whole_N[i] != whole_N[j]) & ~has_whole_N[j]
            wanted = is_new_half | is_new
            i, j, is_new_half, is_new = i[wanted], j[wanted], is_new_half[wanted], is_new[wanted]
            if len(i):
                distance_P = _distance(thumbnails, i, j)
                is_half = is_new_half & (distance_P <= distance / 2)
                is_linked = is_half | (is_new & (distance_P <= distance))
                has_half_N[j[is_half]] = True
                has_whole_N[j[is_linked]] = True
                yield i[is_linked], j[is_linked], is_half[is_linked]


def _distance(thumbnails: Thumbnails, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Distances of the thumbnails of pairs, float32, in [0, 2]."""
    parts = range(0, len(i), 4096)
    return np.concatenate(
        [np.linalg.norm(thumbnails.rows(i[s : s + 4096]) - thumbnails.rows(j[s : s + 4096]), axis=1) for s in parts]
    )


def _merged(group_N: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The groups after these links, each named by its smallest index."""
    if not len(here):
        return group_N
    involved, ends = np.unique(np.concatenate([group_N[here], group_N[there]]), return_inverse=True)
    n = len(involved)
    links = coo_matrix((np.ones(len(here), bool), (ends[: len(here)], ends[len(here) :])), shape=(n, n))
    component_G = connected_components(links, directed=False)[1]
    smallest = np.full(n, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(smallest, component_G, involved)
    named_N = np.arange(len(group_N), dtype=np.int32)
    named_N[involved] = smallest[component_G]
    return named_N[group_N]


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
    nearest_M = _nearest(x_MP)
    return float(np.median(np.sqrt(np.maximum(0, 2 - 2 * nearest_M))))


def _nearest(x_MP: np.ndarray) -> np.ndarray:
    """Largest correlation of each row with any other one."""
    nearest_M = np.full(len(x_MP), -1, np.float32)
    parts = [slice(start, start + 500) for start in range(0, len(x_MP), 500)]
    for here, there in combinations_with_replacement(parts, 2):
        similar = x_MP[here] @ x_MP[there].T
        if here == there:
            np.fill_diagonal(similar, -1)
        nearest_M[here] = np.maximum(nearest_M[here], similar.max(1))
        nearest_M[there] = np.maximum(nearest_M[there], similar.max(0))
    return nearest_M
