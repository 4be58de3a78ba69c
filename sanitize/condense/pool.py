"""A class-balanced sample of a data set that fits into memory: what real images are drawn from, again and again.

Of each class those images are held whose hash is smallest (bottom-k sampling), in the order of their hashes: the sample
depends neither on the order of shards nor on keys. The hash is keyed by the seed, so that an attacker who does not know
it cannot make images that are sure to be chosen. Equal images of a class count once. Shapes: K classes, N images.
"""

import hashlib
import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError, DataError
from sanitize.progress import track


class Pool(NamedTuple):
    """Images of all classes, class by class.

    Attributes:
        images_NCHW: uint8.
        first_K, count_K: of each class, where its images begin and how many there are, int64.
    """

    images_NCHW: Tensor
    first_K: Tensor
    count_K: Tensor

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Which `n` images of each class come next, (K, n) rows drawn with replacement by a CPU generator."""
        u_Kn = torch.rand(len(self.count_K), n, dtype=torch.float64, generator=generator)
        return self.first_K[:, None] + (u_Kn * self.count_K[:, None]).long()

    def hold_out(self, per_class: int) -> tuple["Pool", Tensor, Tensor]:
        """The pool without the last images of each class, and those: uint8 (M, C, H, W), and their labels (M,).

        Of each class `per_class` images at most, and never more than a tenth of it.
        """
        held_K = (self.count_K // 10).clamp(max=per_class)
        end_K = self.first_K + self.count_K
        rows = [torch.arange(int(end - n), int(end)) for end, n in zip(end_K, held_K, strict=True)]
        labels_M = torch.arange(len(held_K)).repeat_interleave(held_K)
        return self._replace(count_K=self.count_K - held_K), self.images_NCHW[torch.cat(rows)], labels_M


class _Reservoir:
    """The images of one class with the smallest hashes; as many as `images_NCHW` has room for."""

    def __init__(self, images_NCHW: Tensor) -> None:
        self._images_NCHW = images_NCHW
        self._largest: list[tuple[int, int]] = []  # (-hash, row): the largest hash is on top, first to go
        self._hashes: set[int] = set()

    def offer(self, image_CHW: Tensor, value: int) -> None:
        if value in self._hashes:
            return
        if len(self._largest) < len(self._images_NCHW):
            row = len(self._largest)
            heapq.heappush(self._largest, (-value, row))
        elif -value > self._largest[0][0]:
            row = self._largest[0][1]
            self._hashes.remove(-heapq.heapreplace(self._largest, (-value, row))[0])
        else:
            return
        self._hashes.add(value)
        self._images_NCHW[row] = image_CHW

    def finish(self) -> Tensor:
        """The images, by their hashes."""
        rows = [row for _, row in sorted(self._largest, reverse=True)]
        self._images_NCHW[: len(rows)] = self._images_NCHW[rows]
        return self._images_NCHW[: len(rows)]


def fill_pool(dataset: Dataset, max_bytes: int, compute: Compute) -> Pool:
    """One pass over the data set.

    Args:
        dataset: only usable samples are read.
        max_bytes: of uint8 pixels; each class gets the same share, and uses no more of it than it needs.
        compute: its seed is the key of the hash.

    Returns:
        The pool, on the CPU.

    Raises:
        DataError: a class has no usable sample.
        ConfigError: the share of a class holds no image.
    """
    counts = [dataset.info["labels"].get(str(label), 0) for label in range(dataset.n_classes)]
    capacity = max_bytes // (torch.Size(dataset.image_shape).numel() * dataset.n_classes)
    if 0 in counts:
        raise DataError(f"cannot condense {dataset.path}: class {counts.index(0)} has no usable sample")
    if capacity == 0:
        raise ConfigError(f"pool_bytes={max_bytes} does not hold one image of each of {dataset.n_classes} classes")
    sizes = [min(capacity, count) for count in counts]
    images_NCHW = torch.empty(sum(sizes), *dataset.image_shape, dtype=torch.uint8)
    reservoirs = [_Reservoir(part_NCHW) for part_NCHW in images_NCHW.split(sizes)]
    key = compute.seed_for("condense", "pool").to_bytes(8, "big")
    with track("sample", dataset.n_samples) as advance:
        for batch in dataset.batches(1024):
            for image_CHW, label in zip(batch.images_BCHW, batch.labels_B.tolist(), strict=True):
                digest = hashlib.blake2b(image_CHW.numpy(), digest_size=16, key=key).digest()
                reservoirs[label].offer(image_CHW, int.from_bytes(digest, "big"))
            advance(len(batch.keys))
    held = [reservoir.finish() for reservoir in reservoirs]
    count_K = torch.tensor([len(part_NCHW) for part_NCHW in held])
    first_K = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    return Pool(images_NCHW, first_K, count_K)
