"""A sample of a data set, split into training and test samples.

Training samples are those with the largest hashes of their images, keyed by the seed, and test samples those with the
smallest. So the split does not depend on the division into shards, and copies of an image are on the same side. Keys in
the new shards are running numbers; `origins.parquet` has the original ones.
"""

import hashlib
import heapq
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.samples import Sample
from sanitize.data.tables import verified_rows
from sanitize.data.writer import shard_writer
from sanitize.errors import ConfigError, DataError
from sanitize.plural import counted
from sanitize.progress import track
from sanitize.stage import Work, stage
from sanitize.tar.names import split_name

_PER_SHARD = 1000  # samples in a new shard

Side = Literal["train", "test"]


class SampleConfig(BaseModel):
    """Size of the sample; a smaller data set is split in the same proportion.

    Attributes:
        n_train: samples to poison, clean and train on. Rules judge class by class: with fewer than about 500 a class
            they find less than on all the data.
        n_test: samples to measure accuracy and attack success rate on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_train: int = Field(default=6000, ge=2)
    n_test: int = Field(default=2000, ge=1)

    def sizes(self, n_samples: int) -> tuple[int, int]:
        """Numbers of training and test samples for a data set of `n_samples`."""
        wanted = self.n_train + self.n_test
        if n_samples >= wanted:
            return self.n_train, self.n_test
        n_test = max(1, round(n_samples * self.n_test / wanted))
        return n_samples - n_test, n_test


class Samples(Artifact):
    """`train/part-NNNN.tar`, `train/trusted-NNNN.tar` (samples of trusted shards) and `test/part-NNNN.tar`.

    `origins.parquet`: key, side, and the shard, position and key of each sample in the source.
    """

    def paths(self, side: Side) -> list[str]:
        """Paths of the shards of one side, sorted."""
        return [self.url(name) for name in sorted(self.manifest().files) if name.startswith(f"{side}/")]

    def trusted(self) -> tuple[str, ...]:
        """Names of the training shards with samples of trusted shards, sorted."""
        names = (name.removeprefix("train/") for name in self.manifest().files)
        return tuple(sorted(name for name in names if name.startswith("trusted-")))

    def origins(self) -> pa.Table:
        """Source of each sample, one row each."""
        return verified_rows(self, "origins.parquet")


@stage(Samples, gpu=False, draws="seed")
def sample_shards(
    config: SampleConfig, dataset: Dataset, out: str, compute: Compute, trusted: Sequence[str] = ()
) -> Work:
    """Copy a sample of a data set; the bytes of every member stay as they are.

    Args:
        config: size of the sample.
        dataset: data set indexed with check=digest or decode; unreadable samples are left out.
        out: folder of the artifact.
        compute: seed of the choice.
        trusted: names of trusted shards; their training samples get shards of their own.

    Raises:
        ConfigError: the index has no hashes of images.
        DataError: there are fewer than three usable samples.
    """

    def write(part: Part) -> None:
        sides = divide(config, dataset, compute)
        origins: list[dict[str, Any]] = []
        with (
            _Rolling(part, "train/part") as train,
            _Rolling(part, "train/trusted") as trusted_train,
            _Rolling(part, "test/part") as test,
            track("sample", sum(map(len, sides.values()))) as advance,
        ):
            for shard in sorted(sides):
                shard_train = trusted_train if shard in trusted else train
                for sample, row in dataset.samples(shard):
                    if (side := sides[shard].get(sample.position)) is None:
                        continue
                    key = f"{len(origins):08d}"
                    (shard_train if side == "train" else test).add(sample, key)
                    origin = {"shard": shard, "position": sample.position, "original_key": row["key"]}
                    origins.append({"key": key, "side": side} | origin)
                    part.counts[side] += 1
                    advance(1)
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(origins), sink, compression="zstd")
        part.write("origins.parquet", sink.getvalue())

    return Work(write=write, config=config.model_dump(mode="json") | {"trusted": sorted(trusted)})


def divide(config: SampleConfig, dataset: Dataset, compute: Compute) -> dict[str, dict[int, Side]]:
    """Side of the chosen samples: {shard: {position: side}}; every shard in the result has some."""
    if dataset.n_samples < 3:
        raise DataError(
            f"{dataset.path} has {counted(dataset.n_samples, 'usable sample')}: too few for training and test"
        )
    n_train, n_test = config.sizes(dataset.n_samples)
    sides: dict[str, dict[int, Side]] = {}
    for *_, shard, position in heapq.nlargest(n_train, _hashed(dataset, compute)):
        sides.setdefault(shard, {})[position] = "train"
    for *_, shard, position in heapq.nsmallest(n_test, _hashed(dataset, compute)):
        sides.setdefault(shard, {})[position] = "test"
    return sides


def _hashed(dataset: Dataset, compute: Compute) -> Iterator[tuple[bytes, str, str, int]]:
    """Keyed hash of the image, key, shard and position of every usable sample."""
    for shard in dataset.shards:
        rows = dataset.rows(shard, ["position", "key", "status", "sha256"])
        columns = rows.filter(pc.equal(rows["status"], "ok")).to_pydict()
        for position, key, sha256 in zip(columns["position"], columns["key"], columns["sha256"], strict=True):
            if sha256 is None:
                raise ConfigError(f"{dataset.path} has no hashes of images: index with check=digest")
            hashed = hashlib.blake2b(f"{compute.seed}/{sha256}".encode(), digest_size=8).digest()
            yield hashed, key, shard, position


class _Rolling:
    """Writes samples into one shard after another."""

    def __init__(self, part: Part, stem: str) -> None:
        self._part, self._stem, self._n, self._open = part, stem, 0, ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def add(self, sample: Sample, key: str) -> None:
        if self._n % _PER_SHARD == 0:
            self._open.close()
            name = f"{self._stem}-{self._n // _PER_SHARD:04d}.tar"
            self._tar = self._open.enter_context(shard_writer(self._part, name))
        for name, data in sample.members:
            self._tar.add(f"{key}.{split_name(name)[1]}", data)
        self._n += 1
