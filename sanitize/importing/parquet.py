"""Rows of Parquet files, and of the Arrow files that `datasets` saves: a column of images and, if there is one, a
column of labels. Names of classes (ClassLabel) are read from the metadata of `datasets`.

Rows lie in groups, which are read as a whole. Groups are therefore put into a random order and made into pools of a few
hundred megabytes; the rows of a pool are mixed, and a shard takes neighbours from a pool. So each group is read once,
and classes are mixed even where the rows are sorted by class.

Columns are read as dictionaries: a file in which a million rows share one large value stays small in memory.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from sanitize.errors import ConfigError, DataError
from sanitize.importing.arrow import ArrowFile, GroupFile, ParquetGroups
from sanitize.importing.config import ImportConfig
from sanitize.importing.source import (
    MAX_CLASS_NAME,
    MAX_CLASSES,
    Offered,
    class_numbers,
    not_listed,
    shown_names,
    stamp_of,
)
from sanitize.importing.table import LABELS
from sanitize.storage import fingerprints
from sanitize.tar.names import printable

IMAGES = ("image", "img", "picture", "jpg", "png")
POOL_BYTES = 256 << 20  # of images that are mixed with each other
_ROWS, _LABEL_ROWS = 16, 1024  # read at once
_SLACK = 1 << 20  # bytes of a group beyond what its header states
_MAX_METADATA = 16 << 20  # bytes of the JSON of `datasets`


class _Group(NamedTuple):
    """A group of rows: its file and place there, the number of its first row among all, rows, bytes of its images."""

    file: int
    place: int
    first: int
    n: int
    n_bytes: int


class _Row(NamedTuple):
    data: bytes
    path: str
    problem: str | None


class Rows:
    """A source of rows, in the order of files and rows; see `source.Source`.

    Args:
        urls: paths or URLs of .parquet and .arrow files, sorted.
        config: settings.

    Raises:
        ConfigError: the columns cannot be told apart, files have different columns, or there are too many rows.
        DataError: a file is not of its format, or claims what cannot be.
    """

    def __init__(self, urls: Sequence[str], config: ImportConfig) -> None:
        self._urls, self._config = list(urls), config
        self.notes: dict[str, int] = {}
        stamps = fingerprints(self._urls)
        self._open: tuple[int, GroupFile] | None = None
        schema = self._file(0).schema
        self._image = _image_column(schema, config, self._urls[0])
        self._label = _label_column(schema, config, self._image, self._urls[0])
        self._groups: list[_Group] = []
        first = 0
        for i, url in enumerate(self._urls):
            file = self._file(i)
            _check_same(schema, file.schema, [self._image, self._label], url, self._urls[0])
            for place, (n, n_bytes) in enumerate(file.groups(self._image)):
                if n_bytes > config.max_row_group_bytes:
                    raise DataError(
                        f"{url}: row group {place} has {n_bytes:,} bytes of images, more than max_row_group_bytes "
                        f"{config.max_row_group_bytes:,}; write it again with fewer rows in a group"
                    )
                self._groups.append(_Group(i, place, first, n, n_bytes))
                first += n
            if first > config.max_samples:
                raise ConfigError(f"{url}: more than {config.max_samples:,} rows; raise max_samples")
        if not first:
            raise DataError(f"{self._urls[0]} has no rows")
        self._firsts = np.array([group.first for group in self._groups] + [first])
        self._first_of_file = {group.file: group.first for group in reversed(self._groups)}
        self._labels_N = np.full(first, -1, np.int32)
        self._problems: dict[int, str] = {}
        self.classes: list[str] | None = self._read_labels(schema)
        self.sizes_N = np.concatenate(
            [np.full(group.n, -(-group.n_bytes // group.n)) for group in self._groups if group.n]
        )
        self.stamp = stamp_of(
            [*((stamp["size"], stamp["modified"]) for stamp in stamps), (self._image, self._label, self.classes)],
            sum(int(stamp["size"]) for stamp in stamps),
        )
        self._pools: list[list[int]] = []
        self._pool_of: dict[int, int] = {}
        self._loaded: tuple[int, dict[int, list[_Row]]] | None = None

    def _file(self, i: int) -> GroupFile:
        if self._open is None or self._open[0] != i:
            if self._open is not None:
                self._open[1].close()
                self._open = None  # two footers at once would take twice the memory
            url = self._urls[i]
            kind = ArrowFile if url.lower().endswith(".arrow") else ParquetGroups
            self._open = i, kind(url)
        return self._open[1]

    # --- labels --------------------------------------------------------------------------------------------------

    def _read_labels(self, schema: pa.Schema) -> list[str]:
        """Fill in the labels and their problems; returns the class names by number."""
        label = self._label
        declared = _declared_names(schema, label)
        values: dict[Any, int] = {}  # every value, by the order in which it was met
        for group in self._groups:
            row, end, problem = group.first, group.first + group.n, "the row is missing in its group"
            try:
                for batch in self._file(group.file).batches(group.place, [label], _LABEL_ROWS):
                    for value in _plain_values(batch.column(label))[: end - row]:
                        if (reason := _label_problem(value)) is not None:
                            self._problems[row] = reason
                        else:
                            self._labels_N[row] = values.setdefault(value, len(values))
                            if len(values) > MAX_CLASSES:
                                class_numbers(map(str, values))  # raises
                        row += 1
            except (pa.ArrowException, OSError, ValueError) as error:
                _raise_if_disk(error, self._urls[group.file])
                problem = f"its row group cannot be read: {_line(error)}"
            self._problems |= dict.fromkeys(range(row, end), problem)
        listed = self._config.classes
        if listed is not None:
            by_name = class_numbers((), listed)
            named = {value: _name_of(value, declared) for value in values}
            numbers, names = {value: by_name[name] for value, name in named.items() if name in by_name}, list(listed)
        elif declared is not None:
            numbers = {value: value for value in values if isinstance(value, int) and 0 <= value < len(declared)}
            names = declared
        else:
            by_name = class_numbers(map(str, values))
            numbers, names = {value: by_name[str(value)] for value in values}, list(by_name)
        outside = {place: value for value, place in values.items() if value not in numbers}
        if outside:
            for row in np.isin(self._labels_N, list(outside)).nonzero()[0].tolist():
                value = outside[int(self._labels_N[row])]
                inside = f"label {printable(str(value))} is not in 0..{len(names) - 1}"
                self._problems[row] = inside if listed is None else not_listed(_name_of(value, declared))
        translated = np.array([numbers.get(value, -1) for value in values] + [-1], np.int32)
        self._labels_N = translated[self._labels_N]  # -1 takes the last entry
        return shown_names(names)

    # --- images --------------------------------------------------------------------------------------------------

    def order(self, generator: torch.Generator | None) -> np.ndarray:
        """All rows: pool after pool, mixed within each."""
        if generator is None:
            self._pools = [[i] for i in range(len(self._groups))]
        else:
            self._pools = self._make_pools(torch.randperm(len(self._groups), generator=generator).tolist())
        self._pool_of = {group: pool for pool, groups in enumerate(self._pools) for group in groups}
        ordered = []
        for pool in self._pools:
            rows = np.concatenate([np.arange(self._firsts[i], self._firsts[i + 1]) for i in pool])
            mixed = slice(None) if generator is None else torch.randperm(len(rows), generator=generator).numpy()
            ordered.append(rows[mixed])
        return np.concatenate(ordered)

    def _make_pools(self, order: Sequence[int]) -> list[list[int]]:
        pools: list[list[int]] = [[]]
        held = 0
        for i in order:
            n_bytes = self._groups[i].n_bytes + 64 * self._groups[i].n
            if pools[-1] and held + n_bytes > POOL_BYTES:
                pools.append([])
                held = 0
            pools[-1].append(i)
            held += n_bytes
        return pools

    def read(self, numbers: Sequence[int]) -> Iterator[Offered]:
        """The rows of these numbers."""
        groups = (np.searchsorted(self._firsts, numbers, side="right") - 1).tolist()
        for number, i in zip(numbers, groups, strict=True):
            group = self._groups[i]
            row = self._pool(self._pool_of[i])[i][number - group.first]
            problem = self._problems.get(number) or row.problem
            where = f"{self._urls[group.file].rpartition('/')[2]}:{number - self._first_of_file[group.file]}"
            name = f"{where}:{row.path}" if row.path else where
            yield Offered(number, name, b"" if problem else row.data, int(self._labels_N[number]), (), problem)

    def _pool(self, pool: int) -> dict[int, list[_Row]]:
        if self._loaded is None or self._loaded[0] != pool:
            self._loaded = None  # before the next one is read
            in_order = sorted(self._pools[pool])  # file after file
            self._loaded = pool, {i: self._rows(self._groups[i]) for i in in_order}
        return self._loaded[1]

    def _rows(self, group: _Group) -> list[_Row]:
        """All rows of a group."""
        rows: list[_Row] = []
        shared: dict[bytes, bytes] = {}  # equal images are held once
        left, problem = group.n_bytes + _SLACK, "the row is missing in its group"
        try:
            file = self._file(group.file)
            for batch in file.batches(group.place, file.leaves(self._image), _ROWS):
                for data, path in _cells(batch.column(self._image), self._config.max_image_bytes):
                    if isinstance(data, str):
                        rows.append(_Row(b"", path, data))
                        continue
                    if data not in shared:
                        left -= len(data)
                        if left >= 0:
                            shared[data] = data
                    known = shared.get(data)
                    bomb = None if known is not None else "its row group holds more bytes than its header states"
                    rows.append(_Row(known or b"", path, bomb))
                if len(rows) >= group.n:
                    break
        except (pa.ArrowException, OSError, ValueError) as error:
            _raise_if_disk(error, self._urls[group.file])
            problem = f"its row group cannot be read: {_line(error)}"
        return rows[: group.n] + [_Row(b"", "", problem)] * (group.n - len(rows))


def _cells(column: pa.Array, max_bytes: int) -> Iterator[tuple[bytes | str, str]]:
    """Bytes of each image, or the reason why there are none; and the path that the row names."""
    paths: pa.Array | None = None
    missing = column.is_null().to_pylist()
    if pa.types.is_struct(column.type):
        fields = {column.type.field(i).name: i for i in range(column.type.num_fields)}
        paths = column.field(fields["path"]) if "path" in fields else None
        paths = paths if paths is not None and _is_text(paths.type) else None  # others may put numbers there
        column = column.field(fields["bytes"])
    for i in range(len(column)):
        path = _path(paths[i]) if paths is not None else ""
        scalar = column[i]
        value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        buffer = None if missing[i] or not value.is_valid else value.as_buffer()
        if buffer is None:
            yield "the row has a path and no bytes" if path else "the row has no image", path
        elif buffer.size > max_bytes:
            yield f"an image of more than max_image_bytes {max_bytes}", path
        else:
            yield buffer.to_pybytes(), path


def _path(scalar: pa.Scalar) -> str:
    value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    if not value.is_valid:
        return ""
    return bytes(value.as_buffer()[:1024]).decode("utf-8", "backslashreplace")


def _plain_values(column: pa.Array) -> list[Any]:
    """Values of labels; a text that is too long is cut before it is copied for each row."""
    if not isinstance(column, pa.DictionaryArray):
        return list(column.to_pylist())
    values = [_text(value) for value in column.dictionary]
    return [None if i is None else values[i] for i in column.indices.to_pylist()]


def _text(scalar: pa.Scalar) -> str | None:
    return (
        bytes(scalar.as_buffer()[: 5 * MAX_CLASS_NAME]).decode("utf-8", "backslashreplace") if scalar.is_valid else None
    )


def _name_of(value: Any, declared: Sequence[str] | None) -> str:
    """Class name of a label, by the metadata where they have names."""
    known = declared is not None and isinstance(value, int) and 0 <= value < len(declared)
    return declared[value] if known and declared is not None else str(value)


def _label_problem(value: Any) -> str | None:
    if value is None or value == "":
        return "no label"
    if isinstance(value, str) and len(value) > MAX_CLASS_NAME:
        return f"a label of more than {MAX_CLASS_NAME} characters"
    return None


# --- columns ---------------------------------------------------------------------------------------------------------


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Features by column, as `datasets` writes them; empty without."""
    data = (schema.metadata or {}).get(b"huggingface", b"")
    if not data or len(data) > _MAX_METADATA:
        return {}
    try:
        features = json.loads(data)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: one for name, one in features.items() if isinstance(one, dict)} if isinstance(features, dict) else {}


def _declared_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Names of a ClassLabel by number."""
    feature = _features(schema).get(label, {})
    names = feature.get("names")
    if (
        feature.get("_type") != "ClassLabel"
        or not isinstance(names, list)
        or not pa.types.is_integer(schema.field(label).type)
    ):
        return None
    is_fit = 0 < len(names) <= MAX_CLASSES and len(set(map(str, names))) == len(names)
    return names if is_fit and all(isinstance(name, str) and len(name) <= MAX_CLASS_NAME for name in names) else None


def _is_text(type_: pa.DataType) -> bool:
    """True for texts, and for bytes, which may be one."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return _is_bytes(type_) or any(is_kind(type_) for is_kind in kinds)


def _is_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _is_image(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        return "bytes" in fields and _is_bytes(fields["bytes"])
    return _is_bytes(type_)


def _is_label(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(
        pa.types.is_integer(type_)
        or pa.types.is_boolean(type_)
        or pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
    )


def _image_column(schema: pa.Schema, config: ImportConfig, url: str) -> str:
    fit = [field.name for field in schema if _is_image(field.type)]
    wanted = config.image_column
    if wanted is not None:
        if wanted not in fit:
            raise ConfigError(f"--image-column {wanted}: columns of {url} that may hold images: {_shown(fit)}")
        return wanted
    images = [name for name, one in _features(schema).items() if one.get("_type") == "Image" and name in fit]
    for found in (images, fit, [name for name in fit if name.lower() in IMAGES]):
        if len(found) == 1:
            return found[0]
    if not fit:
        raise ConfigError(
            f"{url} has no column of encoded images (binary, or a struct with `bytes`); columns: {_typed(schema)}"
        )
    raise ConfigError(f"{url} has several columns that may hold images; choose with --image-column: {_shown(fit)}")


def _label_column(schema: pa.Schema, config: ImportConfig, image: str, url: str) -> str:
    fit = [field.name for field in schema if _is_label(field.type) and field.name != image]
    wanted = config.label_column
    if wanted is not None:
        if wanted not in fit:
            raise ConfigError(
                f"--label-column {wanted}: columns of {url} that may hold labels: {_shown(fit)} (integers, texts or "
                f"booleans; all columns: {_typed(schema)})"
            )
        return wanted
    declared = [name for name, one in _features(schema).items() if one.get("_type") == "ClassLabel" and name in fit]
    for found in (declared, [name for name in fit if name.lower() in LABELS]):
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{url} has several columns of labels; choose with --label-column: {_shown(found)}")
    if not fit:
        raise ConfigError(f"{url} has no column of labels (integers, texts or booleans); columns: {_typed(schema)}")
    raise ConfigError(f"{url} has no column that is known to hold labels; choose with --label-column: {_shown(fit)}")


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(printable(name[:80]) for name in names[:20]) or "none") + more


def _typed(schema: pa.Schema) -> str:
    return _shown([f"{field.name} ({str(field.type)[:60]})" for field in schema])


def _check_same(first: pa.Schema, other: pa.Schema, columns: Sequence[str], url: str, first_url: str) -> None:
    for column in columns:
        there = other.get_all_field_indices(column)
        if len(there) != 1 or other.field(column).type != first.field(column).type:
            raise ConfigError(f"column {column} of {url} is missing or of another type than in {first_url}")
        if _declared_names(first, column) != _declared_names(other, column):
            raise ConfigError(f"column {column} of {url} has other class names than in {first_url}")


def _raise_if_disk(error: Exception, url: str) -> None:
    """Raise DataError where the disk failed, which may pass; damage of the file has no error number."""
    if getattr(error, "errno", None) is not None:
        raise DataError(f"cannot read {url}: {error}") from error


def _line(error: Exception) -> str:
    return " ".join(printable(str(error)[:200]).split())
