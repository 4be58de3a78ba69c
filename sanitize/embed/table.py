"""A table of features as Embeddings, for the same scorers without a network."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.parquet_batches import checked_table
from sanitize.data.tables import Embeddings, fixed_size_list, write_rows
from sanitize.errors import ConfigError, DataError
from sanitize.stage import Advance, Work, stage
from sanitize.storage import fingerprint, sha256_file


class TableConfig(BaseModel):
    """The meaning of the columns of a table.

    Attributes:
        label: column of a Parquet file, or array of an .npz file, with integer labels; None puts all rows in class 0.
        key: column with keys; None numbers the rows.
        features: array of an .npz file with the features (N, D). In a Parquet file, all other numeric columns are
            features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str | None = "label"
    key: str | None = None
    features: str = "X"


@stage(Embeddings, gpu=False, draws="nothing")
def import_table(config: TableConfig, source: str, out: str, compute: Compute) -> Work:
    """Read features from a .parquet or .npz file as an embedding named `features`.

    Args:
        config: columns of labels, keys and features.
        source: path of the table. Arrays of objects in .npz files are refused, because they are pickled.
        out: folder of the artifact; it has one shard, named after the file.
        compute: unused; every stage takes it.

    Raises:
        DataError: the file cannot be read, or holds values that are not numbers.
        ConfigError: a column is missing.
    """
    path = Path(source)
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error}") from error

    def write_part(shard: str, part: Part, _advance: Advance) -> None:
        x_ND, labels_N, keys = _read_npz(path, config) if path.suffix == ".npz" else _read_parquet(path, config)
        columns = {
            "position": pa.array(np.arange(len(x_ND))),
            "key": pa.array(keys),
            "shard": pa.array([shard] * len(x_ND)),
            "label": pa.array(_as_labels(labels_N, len(x_ND), path)),
            "features": fixed_size_list(torch.from_numpy(x_ND)),
        }
        write_rows(part, shard, pa.table(columns))
        part.counts["samples"] = len(x_ND)

    sources = {path.stem: fingerprint(source)}
    return Work(parts=[path.stem], write_part=write_part, sources=sources, inputs={"source": digest})


Table = tuple[np.ndarray, np.ndarray, list[str]]


def _read_npz(path: Path, config: TableConfig) -> Table:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zip and npy raise many kinds
        raise DataError(f"cannot read {path}: {error}") from error
    x_ND = _column(loaded, config.features, path)
    if x_ND.ndim != 2:
        raise DataError(f"{config.features} in {path} has shape {x_ND.shape}; features are a matrix (N, D)")
    labels_N = np.zeros(len(x_ND)) if config.label is None else _column(loaded, config.label, path)
    keys = _numbered(len(x_ND)) if config.key is None else [str(key) for key in _column(loaded, config.key, path)]
    return _as_float32(x_ND, path), labels_N, keys


def _read_parquet(path: Path, config: TableConfig) -> Table:
    try:
        table = checked_table(pq.read_table(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    columns = {name: table[name] for name in table.column_names}
    labels_N = np.zeros(len(table)) if config.label is None else _column(columns, config.label, path).to_numpy()
    keys = (
        _numbered(len(table))
        if config.key is None
        else [str(k) for k in _column(columns, config.key, path).to_pylist()]
    )
    features = [
        column.to_numpy()
        for name, column in columns.items()
        if name not in (config.label, config.key)
        and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type))
    ]
    if not features:
        raise DataError(f"{path} has no numeric column beside label and key")
    return _as_float32(np.stack(features, 1), path), labels_N, keys


def _as_float32(x_ND: np.ndarray, path: Path) -> np.ndarray:
    if x_ND.dtype.kind not in "biuf" or not len(x_ND):
        raise DataError(f"features in {path} are a table of {len(x_ND)} rows of {x_ND.dtype}, not of numbers")
    with np.errstate(over="ignore"):  # becomes infinite, which the next line refuses
        x_ND = x_ND.astype(np.float32)
    if not (finite_N := np.isfinite(x_ND).all(1)).all():
        raise DataError(f"row {int(np.argmin(finite_N))} of {path} holds a value that is not finite")
    return x_ND


def _as_labels(labels_N: np.ndarray, n: int, path: Path) -> np.ndarray:
    """Labels as int64; a column (N, 1) and whole numbers of other types are accepted."""
    labels_N = labels_N.ravel()
    if labels_N.dtype.kind == "f" and (np.abs(labels_N) < 2**53).all() and (labels_N == labels_N.round()).all():
        labels_N = labels_N.astype(np.int64)
    if labels_N.dtype.kind not in "biu" or len(labels_N) != n:
        raise DataError(f"{path} has no integer label for each of its {n} rows: {len(labels_N)} of {labels_N.dtype}")
    return labels_N.astype(np.int64)


def _column(columns: dict, name: str, path: Path):  # type: ignore[no-untyped-def, type-arg]
    if name not in columns:
        raise ConfigError(f"{path} has no column {name!r}; it has {', '.join(columns)}")
    return columns[name]


def _numbered(n: int) -> list[str]:
    return [f"{i:08d}" for i in range(n)]
