"""An indexed data set: which samples there are, and a stream of their images in batches of one size."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sanitize.data.decode import BadImage, ImageConfig, decode
from sanitize.data.samples import Sample, SampleLimits, ShardReader, find_image
from sanitize.data.tables import ShardTables
from sanitize.errors import ConfigError, DataError
from sanitize.storage import fingerprint


class Batch(NamedTuple):
    """Usable samples of one shard, in its order.

    Attributes:
        shard: name of the shard.
        positions_B: their positions in it, int64.
        keys: their keys.
        labels_B: int64.
        images_BCHW: uint8.
    """

    shard: str
    positions_B: Tensor
    keys: list[str]
    labels_B: Tensor
    images_BCHW: Tensor


class Dataset(ShardTables):
    """What `index_shards` made; the shards themselves stay where they are."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """dataset.json: n_classes, labels (count of each), image_size, image, shards, unreadable."""
        info: dict[str, Any] = self.read_json("dataset.json")
        return info

    @cached_property
    def urls(self) -> dict[str, str]:
        """Where each shard is, by name, in sorted order."""
        return {shard: str(source["url"]) for shard, source in sorted(self.manifest().sources.items())}

    @property
    def n_classes(self) -> int:
        """K."""
        return int(self.info["n_classes"])

    @property
    def n_samples(self) -> int:
        """Usable samples."""
        return sum(self.info["labels"].values())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image in a batch. Raises ConfigError where it was neither set nor looked at."""
        if self.info["image_size"] is None:
            raise ConfigError(f"set index.image.size: with index.check={self.info['check']} no image was decoded")
        height, width = self.info["image_size"]
        return int(self.info["image"]["channels"]), height, width

    def samples(self, shard: str) -> Iterator[tuple[Sample, dict[str, Any]]]:
        """Every sample of a shard, usable or not, beside its index row.

        Raises:
            DataError: the shard is not what it was when it was indexed.
        """
        rows = self.rows(shard).to_pylist()
        digest = self.info["shards"][shard]["sha256"] is not None
        reader = ShardReader(self.urls[shard], SampleLimits.model_validate(self.info["limits"]), digest=digest)
        n = 0
        for sample in reader:
            sizes = [len(data) for _, data in sample.members]
            if n == len(rows) or sizes != [member["size"] for member in rows[n]["members"]]:
                raise self.changed(shard, f"sample {n}")
            yield sample, rows[n]
            n += 1
        if n != len(rows):
            raise self.changed(shard, f"byte {reader.size}")
        self.confirm(shard, reader.sha256, reader.size)

    def confirm(self, shard: str, sha256: str, size: int) -> None:
        """Raise DataError unless this is what was indexed.

        Args:
            shard: its name.
            sha256: found now; where the index took none, size and modification time have to do.
            size: bytes read.
        """
        indexed = self.info["shards"][shard]["sha256"]
        if indexed is None:
            source, now = self.manifest().sources[shard], fingerprint(self.urls[shard])
            same = all(source[name] == now[name] for name in ("size", "modified"))
        else:
            same = sha256 == indexed
        if not same:
            raise self.changed(shard, f"byte {size}")

    def changed(self, shard: str, where: str) -> DataError:
        """The error that says so."""
        return DataError(f"shard {self.urls[shard]} has changed since it was indexed (at {where}); index it again")

    def _bad_image(self, shard: str, key: str, error: Exception) -> DataError:
        if self.info["check"] == "decode":
            return self.changed(shard, key)
        return DataError(
            f"sample {key} of shard {self.urls[shard]} cannot be used: {error}. The index did not decode "
            f"images (index.check={self.info['check']}); index with check=decode"
        )

    def batches(self, size: int, shards: Sequence[str] | None = None) -> Iterator[Batch]:
        """Stream usable samples in batches of at most `size`; a batch never spans two shards."""
        for shard in self.shards if shards is None else shards:
            pending: list[tuple[Sample, dict[str, Any]]] = []
            for pair in self.samples(shard):
                if pair[1]["status"] == "ok":
                    pending.append(pair)
                if len(pending) == size:
                    yield self._batch(shard, pending)
                    pending = []
            if pending:
                yield self._batch(shard, pending)

    def images(self) -> tuple[Tensor, Tensor]:
        """All usable images, uint8 (N, C, H, W), and labels (N,), int64. For data sets that fit into memory."""
        images_NCHW = torch.empty(self.n_samples, *self.image_shape, dtype=torch.uint8)
        labels_N = torch.empty(self.n_samples, dtype=torch.int64)
        start = 0
        for batch in self.batches(1024):
            stop = start + len(batch.keys)
            images_NCHW[start:stop], labels_N[start:stop] = batch.images_BCHW, batch.labels_B
            start = stop
        return images_NCHW, labels_N

    def _batch(self, shard: str, pairs: list[tuple[Sample, dict[str, Any]]]) -> Batch:
        config = ImageConfig.model_validate(self.info["image"])
        images = []
        for sample, row in pairs:
            try:
                images.append(decode(find_image(sample)[1], config, self.image_shape[1:]))
            except (BadImage, LookupError) as error:
                raise self._bad_image(shard, row["key"], error) from error
        return Batch(
            shard,
            torch.tensor([sample.position for sample, _ in pairs]),
            [row["key"] for _, row in pairs],
            torch.tensor([row["label"] for _, row in pairs]),
            torch.stack(images),
        )


class Shuffler:
    """Shuffled mini-batches for training, epoch after epoch, with bounded memory.

    A data set whose decoded images fit into `cache_bytes` is decoded once and shuffled as a whole. A larger one is
    streamed: shards in random order through a buffer of that size, from which samples are drawn at random.

    Args:
        dataset: what to stream.
        batch_size: B; the last incomplete batch of an epoch is dropped unless it is the only one.
        cache_bytes: bound on the decoded images held.
        generator: source of every shuffle, on the CPU.
    """

    def __init__(self, dataset: Dataset, batch_size: int, cache_bytes: int, generator: torch.Generator) -> None:
        self.dataset = dataset
        self.batch_size = min(batch_size, dataset.n_samples)
        self.generator = generator
        image_bytes = torch.Size(dataset.image_shape).numel()
        self._capacity = max(2 * self.batch_size, cache_bytes // image_bytes)
        self._cache: tuple[Tensor, Tensor] | None = None
        if dataset.n_samples <= self._capacity:
            self._cache = dataset.images()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self.dataset.n_samples // self.batch_size

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in a new random order: (images_BCHW uint8, labels_B int64)."""
        if self._cache is not None:
            images_NCHW, labels_N = self._cache
            order_N = torch.randperm(len(labels_N), generator=self.generator)
            for rows_B in order_N.split(self.batch_size)[: self.steps_per_epoch]:
                yield images_NCHW[rows_B], labels_N[rows_B]
            return
        yield from self._streamed()

    def _streamed(self) -> Iterator[tuple[Tensor, Tensor]]:
        names = self.dataset.shards
        order = [names[i] for i in torch.randperm(len(names), generator=self.generator).tolist()]
        images: list[Tensor] = []
        labels: list[int] = []
        n_steps = 0
        for batch in self.dataset.batches(self.batch_size, order):
            while len(images) + len(batch.keys) > self._capacity:
                yield self._draw(images, labels)
                n_steps += 1
            images += [image_CHW.clone() for image_CHW in batch.images_BCHW]  # a view would keep the whole batch
            labels += batch.labels_B.tolist()
        while len(images) >= self.batch_size and n_steps < self.steps_per_epoch:
            yield self._draw(images, labels)
            n_steps += 1

    def _draw(self, images: list[Tensor], labels: list[int]) -> tuple[Tensor, Tensor]:
        chosen_B, taken_B = [], []
        for _ in range(self.batch_size):
            i = int(torch.randint(len(images), (), generator=self.generator))
            images[i], images[-1] = images[-1], images[i]
            labels[i], labels[-1] = labels[-1], labels[i]
            chosen_B.append(images.pop())
            taken_B.append(labels.pop())
        return torch.stack(chosen_B), torch.tensor(taken_B)
