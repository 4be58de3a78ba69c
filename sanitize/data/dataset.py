"""An indexed data set: its samples, and a stream of their images in batches of one size."""

import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sanitize.artifacts import first_problem
from sanitize.data.class_names import ClassNames
from sanitize.data.decode import BadImage, ImageConfig, decode_pixels
from sanitize.data.image_facts import facts_name
from sanitize.data.pieces import Moved, Piece, as_indexed, read_pieces
from sanitize.data.samples import ALL, Sample, SampleLimits, SampleReader, ShardFile, find_images
from sanitize.data.tables import ShardTables, rows_name, rows_of, sample_starts
from sanitize.errors import ArtifactError, ConfigError, DataError, ShardError
from sanitize.storage import fingerprint, open_read

T = TypeVar("T")

_BYTES_AHEAD = 256 << 20
_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 8  # one reading interpreter cannot supply more


class ImageBatch(NamedTuple):
    """Usable samples of one shard, in its order.

    Attributes:
        shard: name of the shard.
        positions_B: positions in the shard, int64.
        keys: keys of the samples.
        labels_B: labels, int64.
        images_BCHW: images, uint8.
    """

    shard: str
    positions_B: Tensor
    keys: list[str]
    labels_B: Tensor
    images_BCHW: Tensor


class Dataset(ShardTables):
    """Artifact of `index_shards`; the shards themselves stay in their place."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """dataset.json: n_classes, classes (names or None), class_names (where integers have names), labels (count of
        each), notes, image_size, image, shards,
        unreadable."""
        return self.read_object("dataset.json", "n_classes", "labels", "image_size", "image", "shards", "limits")

    @cached_property
    def urls(self) -> dict[str, str]:
        """Place of each shard, by name, in sorted order."""
        return {shard: str(source["url"]) for shard, source in sorted(self.manifest().sources.items())}

    @property
    def n_classes(self) -> int:
        """Number of classes K."""
        return int(self.info["n_classes"])

    @property
    def n_samples(self) -> int:
        """Number of usable samples; of usable pictures where a sample may have several rows."""
        return sum(self.info["labels"].values())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image in a batch. Raises ConfigError if the size was neither set nor read from images."""
        if self.info["image_size"] is None:
            raise ConfigError(f"set index.image.size: with index.check={self.info['check']} no image was decoded")
        height, width = self.info["image_size"]
        return int(self.info["image"]["channels"]), height, width

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, if labels are names."""
        names = self.info.get("classes")
        return None if names is None else tuple(names)

    @cached_property
    def class_names(self) -> dict[int, str]:
        """Names of the classes by number, to show to people; empty where they have none."""
        stored = self.info.get("class_names")
        if stored is None:
            return dict(enumerate(self.classes or ()))
        try:
            return TypeAdapter(ClassNames).validate_python(stored)
        except ValidationError as error:
            raise ArtifactError(f"{self.url('dataset.json')} is damaged: {first_problem(error)}") from error

    def rows(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of one shard, as in ShardTables; labels are classes of the data set."""
        table = super().rows(shard, columns)
        names, at = (table.schema.metadata or {}).get(b"names"), table.schema.get_field_index("label")
        if names is None or at < 0:
            return table
        # A shard numbers the names that it has; a name that only unreadable samples have is no class.
        try:
            class_of = {name: label for label, name in enumerate(self.classes or ())}
            classes = pa.array([class_of.get(name) for name in json.loads(names)], pa.int64())
            return table.set_column(at, "label", classes.take(table["label"].combine_chunks()))
        except (pa.ArrowException, ValueError, TypeError, IndexError) as error:
            raise ArtifactError(f"the class names of {self.url(rows_name(shard))} are damaged: {error}") from error

    @cached_property
    def has_several(self) -> bool:
        """As in ShardTables."""
        return bool(self.info["image"].get("member") == ALL)

    def counts(self, shard: str) -> tuple[int, int]:
        """Number of usable samples of a shard, and of their rows; the same except with several pictures a sample."""
        counts = self.info["shards"][shard]["counts"]
        n = counts["samples"] - counts["unreadable"]
        return n, counts.get("pictures", n)

    @property
    def image_member(self) -> str | None:
        """`ImageConfig.member` of the index, for `find_image`. Raises ConfigError for "all"."""
        if self.has_several:
            raise ConfigError(
                f"{self.path} has several pictures a sample (index.image.member=all), and this needs one; set "
                "index.image.member to its suffix, or to first"
            )
        member: str | None = self.info["image"].get("member")
        return member

    @property
    def has_facts(self) -> bool:
        """True where the index took facts about images, for some shard."""
        return bool(self._facts)

    @cached_property
    def _facts(self) -> frozenset[str]:
        """Files with facts; a manifest of many shards takes long to read."""
        return frozenset(name for name in self.manifest().files if name.startswith("facts/"))

    def facts(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Facts about the images of a shard (image_facts.SCHEMA); None where the index took none."""
        name = facts_name(shard)
        if name not in self._facts:
            return None
        return rows_of(self, name, columns)

    def samples(self, shard: str) -> Iterator[tuple[Sample, dict[str, Any]]]:
        """Every sample of a shard, usable or not, with its index row.

        Raises:
            ConfigError: a sample may have several rows.
            DataError: the shard has changed since it was indexed.
        """
        _ = self.image_member  # one row a sample
        rows = self.rows(shard)
        return zip(self._read(shard, rows), rows.to_pylist(), strict=True)

    def _read(self, shard: str, rows: pa.Table) -> Iterator[Sample]:
        for piece in self.pieces(shard, rows):
            if isinstance(piece, Sample):
                yield piece
            else:
                yield from piece.samples()

    def pieces(self, shard: str, rows: pa.Table) -> Iterator[Piece | Sample]:
        """All samples, many ordinary ones at once; the positions are those of samples, not of rows.

        Args:
            shard: name of the shard.
            rows: all its index rows.

        Raises:
            DataError: as `samples` does; the final check follows the last sample.
        """
        url, limits = self.urls[shard], SampleLimits.model_validate(self.info["limits"])
        digest = self.info["shards"][shard]["sha256"] is not None
        rows = rows.take(sample_starts(rows)) if self.has_several else rows
        try:
            with open_read(url) as stream:
                file = ShardFile(stream, url, digest)
                if file.compression and len(rows):
                    with file.archive() as archive:
                        yield from as_indexed(SampleReader(archive, limits), rows)
                else:
                    yield from read_pieces(file, rows, limits)
                self._confirm(shard, *file.finish())
        except Moved as moved:
            raise self._changed(shard, f"sample {moved.position}") from moved

    def _confirm(self, shard: str, sha256: str, size: int) -> None:
        """Raise DataError if the shard has changed since it was indexed."""
        indexed = self.info["shards"][shard]["sha256"]
        if indexed is None:
            source, now = self.manifest().sources[shard], fingerprint(self.urls[shard])
            same = all(source[name] == now[name] for name in ("size", "modified"))
        else:
            same = sha256 == indexed
        if not same:
            raise self._changed(shard, f"byte {size}")

    def _changed(self, shard: str, where: str) -> ShardError:
        message = f"shard {self.urls[shard]} has changed since it was indexed (at {where}); index it again"
        return ShardError(message, shard)

    def batches(
        self,
        size: int,
        shards: Sequence[str] | None = None,
        positions: Mapping[str, Collection[int]] | None = None,
    ) -> Iterator[ImageBatch]:
        """Stream usable samples in batches of at most `size`; a batch never spans two shards.

        With `positions` (by shard), only these samples are decoded.

        A few threads decode while the next batches are read. Memory holds as many batches ahead as there are threads,
        and 256 MiB of samples that wait for a thread (one larger sample waits alone).

        Raises:
            DataError: a shard has changed since it was indexed, or an image that the index did not decode is damaged;
                the batches before that place are yielded first.
        """
        threads = _Threads()
        started = (
            self._start(shard, rows, images, threads)
            for shard in (self.shards if shards is None else shards)
            for rows, images in self._usable(shard, size, None if positions is None else positions[shard])
        )
        try:
            for batch, chunks in ahead(started, threads.count):
                while chunks:
                    chunks.popleft().result()  # not by a name: a call refers to its error, and that to this frame
                yield batch
        finally:
            started.close()
            threads.stop()

    def _usable(
        self, shard: str, size: int, positions: Collection[int] | None
    ) -> Iterator[tuple[pa.Table, Iterator[bytes]]]:
        """Rows of each batch, and its images as stored, to be read before the next batch."""
        rows = self.rows(shard)
        is_read = pc.equal(rows["status"], "ok")
        if positions is not None:
            is_read = pc.and_(is_read, pc.is_in(rows["position"], pa.array(sorted(positions), pa.int64())))
        usable, images = rows.filter(is_read), self._images(shard, rows, is_read.to_pylist())
        for start in range(0, len(usable), size):
            yield usable.slice(start, size), islice(images, size)
        next(images, None)  # none is left; the reader goes to the end and checks the shard

    def _images(self, shard: str, rows: pa.Table, is_read: list[bool]) -> Iterator[bytes]:
        """Payload of each image to read."""
        names, member = rows["image"].to_pylist(), self.info["image"].get("member")
        bounds = [*sample_starts(rows).tolist(), len(rows)]
        for piece in self.pieces(shard, rows):
            at = piece.positions if isinstance(piece, Piece) else range(piece.position, piece.position + 1)
            read = [i for i in range(bounds[at.start], bounds[at.stop]) if is_read[i]]
            if isinstance(piece, Piece):
                yield from piece.payloads([names[i] for i in read])
            elif read:
                images = find_images(piece, member)
                yield from (images[i - bounds[at.start]][1] for i in read)

    def _start(
        self, shard: str, rows: pa.Table, images: Iterator[bytes], threads: "_Threads"
    ) -> tuple[ImageBatch, deque[Future[None]]]:
        """A batch, and the calls that fill in its images, each for a chunk of about 1 MiB."""
        keys, config = rows["key"].to_pylist(), ImageConfig.model_validate(self.info["image"])
        positions_B, labels_B = (torch.from_numpy(rows[name].to_numpy().copy()) for name in ("position", "label"))
        images_BCHW = torch.empty(len(keys), *self.image_shape, dtype=torch.uint8)
        calls: deque[Future[None]] = deque()
        chunk: list[bytes] = []
        start = n_bytes = 0
        for stop, data in enumerate(images, 1):
            chunk.append(data)
            n_bytes += len(data)
            if n_bytes >= _CHUNK_BYTES or stop == len(keys):
                part = slice(start, stop)
                calls.append(threads.submit(n_bytes, self._decode, shard, keys[part], chunk, config, images_BCHW[part]))
                start, n_bytes, chunk = stop, 0, []
        return ImageBatch(shard, positions_B, keys, labels_B, images_BCHW), calls

    def _decode(
        self, shard: str, keys: list[str], chunk: list[bytes], config: ImageConfig, images_NCHW: Tensor
    ) -> None:
        channels, height, width = images_NCHW.shape[1:]
        pixels_NHWC = np.empty((len(chunk), height, width, channels), np.uint8)
        for key, data, pixels_HWC in zip(keys, chunk, pixels_NHWC, strict=True):
            try:
                pixels_HWC[:] = decode_pixels(data, config, (height, width))
            except BadImage as error:
                raise self.bad_image(shard, key, error) from error
        images_NCHW.copy_(
            torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2)
        )  # once for all: a single image costs as much

    def bad_image(self, shard: str, key: str, error: Exception) -> DataError:
        """Error for an image of a usable sample that cannot be decoded."""
        if self.info["check"] == "decode":
            return self._changed(shard, key)
        return ShardError(
            f"sample {key} of shard {self.urls[shard]} cannot be used: {error}. The index did not decode "
            f"images (index.check={self.info['check']}); index with check=decode",
            shard,
        )

    def images(self) -> tuple[Tensor, Tensor]:
        """All usable images, uint8 (N, C, H, W), and labels, int64 (N,), in memory."""
        images_NCHW = torch.empty(self.n_samples, *self.image_shape, dtype=torch.uint8)
        labels_N = torch.empty(self.n_samples, dtype=torch.int64)
        start = 0
        for batch in self.batches(1024):
            stop = start + len(batch.keys)
            images_NCHW[start:stop], labels_N[start:stop] = batch.images_BCHW, batch.labels_B
            start = stop
        return images_NCHW, labels_N


class _Threads:
    """Threads that run calls; unfinished calls hold at most `_BYTES_AHEAD` of payload, unless there is only one."""

    def __init__(self) -> None:
        self.count = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="sanitize-decode")
        self._calls: deque[tuple[Future[None], int]] = deque()
        self._room = _BYTES_AHEAD

    def submit(self, n_bytes: int, call: Callable[..., None], *args: Any) -> Future[None]:
        """Start a call that holds `n_bytes`, once there is room."""
        while self._calls and (n_bytes > self._room or self._calls[0][0].done()):
            oldest, freed = self._calls.popleft()
            wait([oldest])
            self._room += freed
        self._room -= n_bytes
        self._calls.append((self._pool.submit(call, *args), n_bytes))
        return self._calls[-1][0]

    def stop(self) -> None:
        """Cancel the calls that have not begun, and wait for the others."""
        self._pool.shutdown(cancel_futures=True)
        self._calls.clear()


def ahead(items: Iterable[T], n: int) -> Iterator[T]:
    """The same items, with up to `n` of them fetched in advance; an error is raised behind the last item."""
    taken: deque[T] = deque()
    failure: Exception | None = None
    try:
        for item in items:
            taken.append(item)
            if len(taken) > n:
                yield taken.popleft()
    except Exception as error:
        failure = error
    try:
        yield from taken
        if failure is not None:
            raise failure
    finally:
        del failure  # an error refers to this frame
