"""A class-balanced sample of a data set that fits into memory; real images are drawn from this pool.

The pool holds the images of each class with the smallest hashes (bottom-k sampling), in the order of their hashes: it
depends neither on the order of shards nor on keys. The hash is keyed by the seed, so that an attacker without the seed
cannot craft images that are chosen. Equal images of a class count once. Shapes: K classes, N images.
"""

import hashlib
import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.class_names import class_name
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError, DataError
from sanitize.progress import track


class Pool(NamedTuple):
    """Images of all classes, class by class.

    Attributes:
        images_NCHW: uint8.
        first_K, count_K: first row and number of images of each class, int64.
    """

    images_NCHW: Tensor
    first_K: Tensor
    count_K: Tensor

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw rows of `n` images of each class with replacement, (K, n), by a CPU generator."""
        u_Kn = torch.rand(len(self.count_K), n, dtype=torch.float64, generator=generator)
        return self.first_K[:, None] + (u_Kn * self.count_K[:, None]).long()

    def hold_out(self, per_class: int) -> tuple["Pool", Tensor, Tensor]:
        """The pool without the last images of each class; those images, (M, C, H, W) uint8; and their labels (M,).

        At most `per_class` images and at most a tenth of each class are held out.
        """
        held_K = (self.count_K // 10).clamp(max=per_class)
        end_K = self.first_K + self.count_K
        rows = [torch.arange(int(end - n), int(end)) for end, n in zip(end_K, held_K, strict=True)]
        labels_M = torch.arange(len(held_K)).repeat_interleave(held_K)
        return self._replace(count_K=self.count_K - held_K), self.images_NCHW[torch.cat(rows)], labels_M


class _Reservoir:
    """The images of one class with the smallest hashes, as many as fit into `images_NCHW`."""

    def __init__(self, images_NCHW: Tensor) -> None:
        self._images_NCHW = images_NCHW
        self._largest: list[tuple[int, int]] = []  # (-hash, row): the largest hash is on top
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
        """The images in the order of their hashes."""
        rows = [row for _, row in sorted(self._largest, reverse=True)]
        self._images_NCHW[: len(rows)] = self._images_NCHW[rows]
        return self._images_NCHW[: len(rows)]


def fill_pool(dataset: Dataset, max_bytes: int, compute: Compute) -> Pool:
    """Fill a pool in one pass over the data set.

    Args:
        dataset: the data set; only usable samples are read.
        max_bytes: bytes of uint8 pixels; each class gets the same share and uses at most as much as it needs.
        compute: the seed is the key of the hash.

    Returns:
        The pool, on the CPU.

    Raises:
        DataError: a class has no usable sample.
        ConfigError: the share of a class holds no image.
    """
    counts = [dataset.info["labels"].get(str(label), 0) for label in range(dataset.n_classes)]
    capacity = max_bytes // (torch.Size(dataset.image_shape).numel() * dataset.n_classes)
    if 0 in counts:
        empty = class_name(counts.index(0), dataset.class_names)
        raise DataError(f"cannot condense {dataset.path}: class {empty} has no usable sample")
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
