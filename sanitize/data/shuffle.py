"""Shuffled mini-batches for training: from memory if the data fits, else through a buffer.

The order of an epoch depends on its number alone, not on earlier epochs, so that training can resume in the middle.
Shapes: B batch, N samples, C H W image.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from sanitize.data.dataset import Dataset, ImageBatch

Order = Callable[[int], torch.Generator]  # the CPU generator of an epoch, by its number
Batches = Iterator[tuple[Tensor, Tensor, Tensor]]  # inputs, targets, and rows of the data set


class Resident:
    """Data that is held whole on the CPU or the device: each sample is copied from the host once.

    Args:
        inputs_N: (N, C, H, W) uint8 or (N, D) float.
        targets_N: labels (N,) int64 or targets (N, K) float.
        batch_size: B; the last incomplete batch of an epoch is dropped unless it is the only one.
        order: random generator of each epoch.
    """

    def __init__(self, inputs_N: Tensor, targets_N: Tensor, batch_size: int, order: Order) -> None:
        self.inputs_N, self.targets_N = inputs_N, targets_N
        self.batch_size = min(batch_size, len(inputs_N))
        self._order = order

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of one epoch."""
        return len(self.inputs_N) // self.batch_size

    def epoch(self, number: int) -> Batches:
        """One pass in a random order."""
        order_N = torch.randperm(len(self.inputs_N), generator=self._order(number)).to(self.inputs_N.device)
        for rows_B in order_N.split(self.batch_size)[: self.steps_per_epoch]:
            yield self.inputs_N[rows_B], self.targets_N[rows_B], rows_B


class Streamed:
    """Images of a data set that may be larger than memory: shards are streamed in random order through a bounded
    buffer, from which samples are drawn at random.

    Args:
        dataset: data set to stream.
        batch_size: as for `Resident`.
        cache_bytes: size of the decoded images in the buffer; it holds at least two batches.
        order: random generator of each epoch.
        only: positions of the samples to read, by shard; None reads all usable samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        cache_bytes: int,
        order: Order,
        only: Mapping[str, set[int]] | None = None,
    ) -> None:
        self.dataset, self._only = dataset, only
        self.n_samples = dataset.n_samples if only is None else sum(map(len, only.values()))
        self.batch_size = min(batch_size, self.n_samples)
        self._capacity = max(2 * self.batch_size, cache_bytes // torch.Size(dataset.image_shape).numel())
        self._order = order

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of one epoch."""
        return self.n_samples // self.batch_size

    def epoch(self, number: int) -> Batches:
        """One pass in a random order."""
        generator = self._order(number)
        names = self.dataset.shards if self._only is None else sorted(self._only)
        order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        next_row = first_rows(self.dataset)
        images: list[Tensor] = []
        named: list[tuple[int, int]] = []  # label, row
        n_steps = 0
        for batch in self.dataset.batches(self.batch_size, order):
            while len(images) + len(batch.keys) > self._capacity:
                yield self._draw(images, named, generator)
                n_steps += 1
            first = next_row[batch.shard]
            next_row[batch.shard] += len(batch.keys)
            at = _among(batch, self._only)
            images += [batch.images_BCHW[i].clone() for i in at]  # a view would keep the whole batch
            named += [(int(batch.labels_B[i]), first + i) for i in at]
        while len(images) >= self.batch_size and n_steps < self.steps_per_epoch:
            yield self._draw(images, named, generator)
            n_steps += 1

    def _draw(
        self, images: list[Tensor], named: list[tuple[int, int]], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        drawn, names = [], []
        for _ in range(self.batch_size):
            i = int(torch.randint(len(images), (), generator=generator))
            images[i], images[-1] = images[-1], images[i]
            named[i], named[-1] = named[-1], named[i]
            drawn.append(images.pop())
            names.append(named.pop())
        labels_B, rows_B = torch.tensor(names).T
        return torch.stack(drawn), labels_B, rows_B


class Joined:
    """Batches of a data set, each with a few of some further samples, which are spread evenly over the epoch.

    The batches themselves stay as they are. Those with one sample more than others come first.

    Args:
        data: the data set.
        inputs_MX, targets_M: the further samples, held in memory.
        first_row: row of the first of them.
        order: random generator of each epoch.
    """

    def __init__(
        self, data: Resident | Streamed, inputs_MX: Tensor, targets_M: Tensor, first_row: int, order: Order
    ) -> None:
        self._data, self._inputs_MX, self._targets_M = data, inputs_MX, targets_M
        self._first_row, self._order = first_row, order

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of one epoch."""
        return self._data.steps_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples of one epoch."""
        return self._data.steps_per_epoch * self._data.batch_size + len(self._targets_M)

    def epoch(self, number: int) -> Batches:
        """One pass in a random order."""
        order_M = torch.randperm(len(self._targets_M), generator=self._order(number))
        batches = self._data.epoch(number)
        for at, (inputs_B, targets_B, rows_B) in zip(order_M.tensor_split(self.steps_per_epoch), batches, strict=True):
            further = self._inputs_MX[at], self._targets_M[at], at + self._first_row
            yield tuple(  # type: ignore[misc]
                torch.cat([one, more.to(one.device)])
                for one, more in zip((inputs_B, targets_B, rows_B), further, strict=True)
            )


def shuffled(
    dataset: Dataset,
    batch_size: int,
    cache_bytes: int,
    order: Order,
    device: torch.device | None = None,
    only: Mapping[str, set[int]] | None = None,
) -> Resident | Streamed:
    """Batches of a data set: decoded once and held on `device` if `cache_bytes` suffice, else streamed.

    Args:
        dataset, batch_size, cache_bytes, order, only: as for `Streamed`.
        device: device of the images that are held.
    """
    n_samples = dataset.n_samples if only is None else sum(map(len, only.values()))
    if n_samples * torch.Size(dataset.image_shape).numel() > cache_bytes:
        return Streamed(dataset, batch_size, cache_bytes, order, only)
    images_NCHW, labels_N = dataset.images() if only is None else _read(dataset, only)
    device = device or torch.device("cpu")
    return Resident(images_NCHW.to(device), labels_N.to(device), batch_size, order)


def _among(batch: ImageBatch, only: Mapping[str, set[int]] | None) -> list[int]:
    """Indices of the samples of a batch that are to be read."""
    if only is None:
        return list(range(len(batch.keys)))
    return [i for i, position in enumerate(batch.positions_B.tolist()) if position in only[batch.shard]]


def _read(dataset: Dataset, only: Mapping[str, set[int]]) -> tuple[Tensor, Tensor]:
    """Images and labels of the samples at these positions, in the order of shards and positions."""
    found = ((batch, _among(batch, only)) for batch in dataset.batches(256, sorted(only)))
    images, labels = zip(*((batch.images_BCHW[at], batch.labels_B[at]) for batch, at in found), strict=True)
    return torch.cat(images), torch.cat(labels)


def buffer_bytes(dataset: Dataset, cache_bytes: int) -> int | None:
    """Size of the buffer that a data set is streamed through, None if it is held whole. The size is part of a recipe,
    because the drawn batches depend on it."""
    return cache_bytes if dataset.n_samples * torch.Size(dataset.image_shape).numel() > cache_bytes else None


def first_rows(dataset: Dataset) -> dict[str, int]:
    """Row of the first usable sample of each shard; rows count the usable samples of all shards, in order."""
    n_usable = [dataset.counts(shard)[1] for shard in dataset.shards]
    return dict(zip(dataset.shards, accumulate(n_usable, initial=0), strict=False))


def usable_rows(dataset: Dataset, shard: str) -> pa.Table:
    """Columns position, key and label of the usable samples of a shard."""
    rows = dataset.rows(shard, ["position", "key", "label", "status"])
    return rows.filter(pc.equal(rows["status"], "ok")).drop(["status"])
