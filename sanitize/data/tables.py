"""Artifacts of one Parquet file a shard: index, embeddings, scores, verdicts.

With one file a shard, the bytes do not depend on the groups of shards.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sanitize.artifacts import Artifact, Part, first_line
from sanitize.data.parquet_batches import checked, checked_table
from sanitize.errors import ArtifactError, ConfigError
from sanitize.storage import is_local

N_ORIENTATIONS = 9  # orientations a cell in the embedding `gradients`; Dalal & Triggs (2005): more do not help


def sample_starts(rows: pa.Table) -> np.ndarray:
    """Numbers of the rows with which the K samples of a shard begin, int64 (K,).

    Args:
        rows: rows of one shard; a column `sample` says which rows belong together, and without it each is a sample.
    """
    if "sample" not in rows.column_names:
        return np.arange(len(rows))
    return np.flatnonzero(np.diff(rows["sample"].to_numpy(), prepend=-1))


def rows_name(shard: str) -> str:
    """Name of the file with the rows of `shard` in an artifact."""
    return f"rows/{shard}.parquet"


def write_rows(part: Part, shard: str, table: pa.Table) -> None:
    """Write the rows of one shard; embeddings compress best as byte streams, strings as dictionaries."""
    sink = io.BytesIO()
    floats = [f"{field.name}.list.element" for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    strings = [field.name for field in table.schema if pa.types.is_string(field.type)]
    pq.write_table(
        table, sink, compression="zstd", use_byte_stream_split=floats or False, use_dictionary=strings or False
    )
    part.write(rows_name(shard), sink.getvalue())


def read_table(source: Path | pa.BufferReader, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of one Parquet file, as by `pq.read_table` in half the time of a small file: a file is no data set.

    Raises:
        pa.ArrowException, OSError: the file is damaged.
        pa.ArrowInvalid: the file has no such column, or an index outside of a dictionary.
    """
    with pq.ParquetFile(source) as file:
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise pa.ArrowInvalid(f"there is no column {sorted(missing)[0]!r}")
        table = checked_table(file.read(columns and list(columns), use_threads=False))
    return table if columns is None else table.select(list(columns))


@contextmanager
def _damage(url: str) -> Iterator[None]:
    """Raise ArtifactError where pyarrow finds no Parquet file, or other columns."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file cannot be opened; for bad content, pyarrow raises OSError without a number
        raise ArtifactError(f"{url} is damaged: {first_line(error)}") from error


def rows_of(artifact: Artifact, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a Parquet file of an artifact. Raises ArtifactError where the file is damaged."""
    with _damage(artifact.url(name)):
        return read_table(_source(artifact, name), columns)


def verified_rows(artifact: Artifact, name: str) -> pa.Table:
    """The same, of a file that is compared with the manifest first, wherever it lies."""
    with _damage(artifact.url(name)):
        return read_table(pa.BufferReader(artifact.read(name)))


def _source(artifact: Artifact, name: str) -> Path | pa.BufferReader:
    """Source of a file for pyarrow: the local file, or its checked content."""
    return artifact.file(name) if is_local(artifact.path) else pa.BufferReader(artifact.read(name))


class ShardTables(Artifact):
    """One Parquet file a shard."""

    @cached_property
    def shards(self) -> list[str]:
        """Names of the shards, sorted."""
        names = (name for name in self.manifest().files if name.startswith("rows/"))
        return sorted(name.removeprefix("rows/").removesuffix(".parquet") for name in names)

    def rows(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of one shard, in the order of its samples. Raises ArtifactError where the file is damaged."""
        return rows_of(self, rows_name(shard), columns)

    @cached_property
    def has_several(self) -> bool:
        """True where a sample may have several rows, one for each of its pictures (`index.image.member: all`)."""
        if not self.shards:
            return False
        return "sample" in self._schema(self.shards[0]).names

    def sample_rows(self, shard: str, columns: Sequence[str]) -> pa.Table:
        """The first row of each sample of one shard; see `rows`."""
        rows = self.rows(shard, [*columns, "sample"] if self.has_several else columns)
        return rows.take(sample_starts(rows)) if self.has_several else rows

    def _schema(self, shard: str) -> pa.Schema:
        with _damage(self.url(rows_name(shard))):
            return pq.read_schema(_source(self, rows_name(shard)))


class EmbeddingBatch(NamedTuple):
    """Embeddings of samples of one shard, in its order.

    Attributes:
        shard: name of the shard.
        positions_B: positions in the shard, int64.
        keys: keys of the samples.
        labels_B: given labels, int64.
        z_BD: embeddings, float32; of several embeddings, the columns side by side.
        widths: number of columns of each embedding; empty for one.
    """

    shard: str
    positions_B: Tensor
    keys: list[str]
    labels_B: Tensor
    z_BD: Tensor
    widths: tuple[int, ...] = ()

    def take(self, rows: Sequence[int]) -> Self:
        """The batch with only these rows."""
        at = torch.tensor(rows, dtype=torch.int64)
        keys = [self.keys[i] for i in rows]
        return self._replace(
            positions_B=self.positions_B[at], keys=keys, labels_B=self.labels_B[at], z_BD=self.z_BD[at]
        )


class Embeddings(ShardTables):
    """Columns position, key, shard, label, logits, and one or more embeddings as fixed-size lists of float32."""

    @property
    def names(self) -> list[str]:
        """Names of the embeddings."""
        return [name for name in self.columns if name != "logits"]

    @cached_property
    def columns(self) -> list[str]:
        """Names of the embeddings, and `logits`."""
        if not self.shards:
            raise ArtifactError(f"{self.path} has no rows")
        return [field.name for field in self._schema(self.shards[0]) if pa.types.is_fixed_size_list(field.type)]

    def batches(
        self, name: str | Sequence[str], size: int = 8192, shards: Sequence[str] | None = None
    ) -> Iterator[EmbeddingBatch]:
        """Stream one or more embeddings in batches of at most `size` rows.

        Args:
            name: name of the embedding; or several names, `logits` among them, for their columns side by side.
            size: most rows of a batch.
            shards: names of the shards; None reads all.

        Raises:
            ConfigError: there is no embedding of that name.
        """
        wanted = [name] if isinstance(name, str) else list(name)
        for one in wanted:
            if one not in (self.names if isinstance(name, str) else self.columns):
                raise ConfigError(f"there is no embedding {one!r} in {self.path}; it has {', '.join(self.names)}")
        for shard in self.shards if shards is None else shards:
            for rows in self._batches(shard, ["position", "key", "label", *wanted], size):
                matrices = [torch.from_numpy(_matrix(rows[one])) for one in wanted]
                yield EmbeddingBatch(
                    shard,
                    torch.from_numpy(rows["position"].to_numpy().copy()),
                    rows["key"].to_pylist(),
                    torch.from_numpy(rows["label"].to_numpy().copy()),
                    torch.cat(matrices, 1) if len(matrices) > 1 else matrices[0],
                    tuple(z_BD.shape[1] for z_BD in matrices) if len(matrices) > 1 else (),
                )

    def _batches(self, shard: str, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        with _damage(self.url(rows_name(shard))):
            file = pq.ParquetFile(_source(self, rows_name(shard)))
            yield from checked(file.iter_batches(size, columns=list(columns)))


class Scores(ShardTables):
    """Columns position, key, label, score: finite, higher = more suspicious. `scorer.json` names the scorer."""


class Selection(ShardTables):
    """One verdict a sample, in the order of the index: columns position, key, label, keep, status, reasons.

    With `index.image.member: all` one row a picture, and two more columns: `sample` (its number in the shard) and
    `member` (name of the picture). The rows of a sample have one verdict.
    """


HygieneKind = Literal[
    "exact_duplicate",
    "near_duplicate",
    "label_conflict",
    "test_leak",
    "wrong_hash",
    "dark",
    "bright",
    "blank",
    "blurred",
    "low_entropy",
    "odd_aspect",
    "odd_size",
    "grey",
    "torn",
]
HYGIENE_KINDS: tuple[HygieneKind, ...] = get_args(HygieneKind)


class Hygiene(ShardTables):
    """One row a finding: columns position, key, label, kind, value, group, other_shard, other_position, reason.

    A sample may have several rows, or none. `hygiene.json` has counts, the largest groups of copies, and examples.
    """


def fixed_size_list(x_BD: Tensor) -> pa.FixedSizeListArray:
    """A float32 matrix as an Arrow column of fixed-size lists."""
    values = np.ascontiguousarray(x_BD.detach().to("cpu", torch.float32).numpy())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).copy()
