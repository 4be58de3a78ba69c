"""A few samples of a data set, for work that is too costly to do on all samples.

The samples with the smallest hashes of seed, shard, key and position: the choice does not depend on any order, and
further shards only replace some of the samples.
"""

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset, ImageBatch
from sanitize.data.shuffle import usable_rows

_READ_AT_ONCE = 256  # images decoded together


class ChosenImages(NamedTuple):
    """Samples in memory, in the order of shards and positions.

    Attributes:
        shards, positions, keys: shard, position and key of each sample.
        labels_N: labels, int64.
        images_NCHW: images, uint8.
    """

    shards: list[str]
    positions: list[int]
    keys: list[str]
    labels_N: Tensor
    images_NCHW: Tensor


def choose_samples(dataset: Dataset, n: int | None, compute: Compute) -> Mapping[str, set[int]]:
    """Positions of `n` usable samples (of all, if there are fewer or `n` is None), by shard; none of them is empty."""

    def hashed() -> Iterator[tuple[bytes, str, int]]:
        for shard in dataset.shards:
            rows = usable_rows(dataset, shard).select(["position", "key"]).to_pydict()
            for position, key in zip(rows["position"], rows["key"], strict=True):
                name = f"{compute.seed}/{shard}/{key}/{position}"
                yield hashlib.blake2b(name.encode(), digest_size=8).digest(), shard, position

    chosen: dict[str, set[int]] = {}
    for _, shard, position in hashed() if n is None else heapq.nsmallest(n, hashed()):
        chosen.setdefault(shard, set()).add(position)
    return chosen


def read_chosen(dataset: Dataset, shard: str, positions: set[int], batch_size: int) -> Iterator[ImageBatch]:
    """Batches of these samples of a shard, of at most `batch_size`; the division into batches is always the same."""
    for batch in dataset.batches(_READ_AT_ONCE, [shard]):
        at = [i for i, position in enumerate(batch.positions_B.tolist()) if position in positions]
        for start in range(0, len(at), batch_size):
            group = at[start : start + batch_size]
            keys = [batch.keys[i] for i in group]
            yield ImageBatch(shard, batch.positions_B[group], keys, batch.labels_B[group], batch.images_BCHW[group])


def chosen_images(dataset: Dataset, n: int, compute: Compute) -> ChosenImages:
    """Images and labels of the samples that `choose_samples` returns."""
    chosen = choose_samples(dataset, n, compute)
    batches = [batch for shard in sorted(chosen) for batch in read_chosen(dataset, shard, chosen[shard], _READ_AT_ONCE)]
    return ChosenImages(
        [batch.shard for batch in batches for _ in batch.keys],
        [position for batch in batches for position in batch.positions_B.tolist()],
        [key for batch in batches for key in batch.keys],
        torch.cat([batch.labels_B for batch in batches]),
        torch.cat([batch.images_BCHW for batch in batches]),
    )
