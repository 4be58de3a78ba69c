"""Labels of samples: integers, class names, one-hot vectors; in a member of the sample, or in a table of its own.

Nothing is guessed: a value that trainers read in different ways is refused, with the remedy.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sanitize.data.class_names import MAX_NAME, notes_on_names
from sanitize.data.layout import dots
from sanitize.data.parquet_batches import checked
from sanitize.data.parquet_footer import LIMITS, check_footer
from sanitize.data.samples import Sample, beside
from sanitize.errors import ConfigError, DataError
from sanitize.plural import counted, have
from sanitize.storage import fingerprint, read_bytes
from sanitize.tar.names import printable, split_name

MAX_CLASSES = 1000  # limit without n_classes: one hostile label must not set the size of a model
_INTEGER = re.compile(rb"[+-]?\d{1,18}")
_DECIMAL = re.compile(rb"[+-]?\d{1,18}\.0*")
_VECTOR = re.compile(rb"\[[\s\d.,eE+-]*\]")
_MAX_VECTOR_BYTES = 2**18
_MAX_JSON_BYTES = 2**20  # parsed, it takes up to 35 times its bytes
_MAX_PATH = 8  # steps of a path in JSON
_MAX_TABLE_BYTES, _MAX_ROWS, _MAX_COLUMNS = 2**28, 10_000_000, 1_000
_MAX_UNPACKED_BYTES = 2**31  # of the two columns of a Parquet file
_KEY_COLUMNS = ("key", "__key__")
TWICE = object()


class BadLabel(ValueError):
    """The label is unusable; the message is the reason."""


class LabelReader:
    """Read the label of a sample.

    Args:
        label: `IndexConfig.label`; None gives class 0 to all samples.
        n_classes: number of classes; None allows labels below 1,000.
        classes: `IndexConfig.classes`.

    Attributes:
        suffix: lower-case suffix of the member with the label; "" where no member is read.
        field: field of the JSON member, or "".
        reads_members: True if labels are in members of the samples.
        is_plain: True if labels are integers in members of their own.
        names: "names" where the names are still to be gathered, a map from name to class, or None for integers.
        sha256: digest of the table; None without one.

    Raises:
        ConfigError: the table has no such column, or is larger than the limits.
        DataError: the table cannot be read.
    """

    def __init__(
        self, label: str | None, n_classes: int | None = None, classes: Sequence[str] | str | None = None
    ) -> None:
        self._table: Mapping[str, Any] | None = None
        self.sha256: str | None = None
        kind, _, rest = (label or "").partition(":")
        self._has_labels = label is not None
        self.suffix, self.field = ("", "") if kind == "table" and rest else (kind.lower(), rest)
        if kind == "table" and rest:
            self._table, self.sha256 = read_table(*rest.rpartition("#")[::2], "labels")
        self.names: Mapping[str, int] | str | None = None
        if isinstance(classes, str):
            self.names = classes
        elif classes is not None:
            self.names = {name: i for i, name in enumerate(classes)}
        self._n_classes = n_classes
        self.reads_members = label is not None and self._table is None
        self.is_plain = self.reads_members and not self.field and self.names is None

    @property
    def n_classes(self) -> int:
        """Number of classes; labels at or above it are refused."""
        return self._n_classes or (len(self.names) if isinstance(self.names, Mapping) else MAX_CLASSES)

    def read(self, sample: Sample) -> int | str:
        """Class of a sample, 0 <= class < n_classes, or its name where names are gathered. Raises BadLabel."""
        if not self._has_labels:
            return 0
        return self._parsed(self._value(sample).strip())

    def _value(self, sample: Sample) -> bytes:
        if self._table is not None:
            return _of_table(self._table, printable(sample.key))
        found = [data for name, data in sample.members if split_name(name)[1] == self.suffix]
        if len(found) != 1:
            names = [name for name, _ in sample.sizes or sample.members]
            missing = f"no .{self.suffix} member{beside(names)}"
            raise BadLabel(f"{len(found)} .{self.suffix} members" if found else dots(names, self.suffix) or missing)
        return json_value(found[0], self.field, self.names is not None) if self.field else found[0]

    def _parsed(self, data: bytes) -> int | str:
        if self.names is not None:
            return self._named(data)
        if _INTEGER.fullmatch(data):
            label = int(data)
        elif data.startswith(b"[") and len(data) <= _MAX_VECTOR_BYTES and _VECTOR.fullmatch(data):
            label = self._one_hot(data)
        else:
            raise BadLabel(f"label '{_shown(data)}' is not an integer{_remedy(data)}")
        if not 0 <= label < self.n_classes:
            unlimited = self._n_classes is None and label >= self.n_classes
            remedy = ": set index.n_classes if there are more classes" if unlimited else ""
            raise BadLabel(f"label {label} is not in 0..{self.n_classes - 1}{remedy}")
        return label

    def _one_hot(self, data: bytes) -> int:
        """Class of an exact one-hot vector."""
        try:
            values = [float(value) for value in re.split(rb"[\s,]+", data.strip(b"[] \t\r\n,")) if value]
        except ValueError:
            raise BadLabel(f"label '{_shown(data)}' is not an integer") from None
        n = len(values)
        if not values or not all(0 <= value <= 1 for value in values):
            raise BadLabel(f"label '{_shown(data)}' is not an integer{_remedy(data)}")
        if any(value not in (0, 1) for value in values):
            raise BadLabel(
                f"label '{_shown(data)}' is a vector of {n} soft labels, and one class is needed: choose it, and give "
                "the classes in a table (index.label=table:FILE#COLUMN)"
            )
        if sum(values) != 1 or (n < 3 and n != self._n_classes):
            raise BadLabel(
                f"label '{_shown(data)}' is a list of {n} numbers with {int(sum(values))} ones, and not one class: "
                "choose it, and give the classes in a table (index.label=table:FILE#COLUMN)"
            )
        if n > self.n_classes or (self._n_classes is not None and n != self._n_classes):
            raise BadLabel(f"label is a one-hot vector of {n} classes, and index.n_classes is {self.n_classes}")
        return values.index(1)

    def _named(self, data: bytes) -> int | str:
        if data.startswith(b"[") and _VECTOR.fullmatch(data):
            raise BadLabel(f"label '{_shown(data)}' is a vector, and index.classes is for class names: leave it out")
        try:
            name = data.decode()
        except UnicodeDecodeError:
            raise BadLabel(f"class name '{_shown(data)}' is not UTF-8") from None
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise BadLabel(f"class name '{_shown(data)}' is empty, longer than {MAX_NAME} characters or not printable")
        if not isinstance(self.names, Mapping):
            return name
        if name not in self.names:
            raise BadLabel(f"class name '{_shown(data)}' is not in index.classes")
        return self.names[name]


def _shown(data: bytes) -> str:
    return printable(data[:40].decode("utf-8", "surrogateescape")) + (" …" if len(data) > 40 else "")


def _remedy(data: bytes) -> str:
    """What to do about a label that is no integer, or ""."""
    if not data:
        return ": it is empty"
    if data.startswith(b"\xef\xbb\xbf"):
        return ": it begins with a byte order mark; write labels as ASCII"
    if _DECIMAL.fullmatch(data):
        return f": write {int(data.partition(b'.')[0])}"
    if data.startswith((b"[", b"{")):
        return ": it is not one class"
    if re.match(rb"[A-Za-z]", data) and data not in (b"true", b"false", b"null", b"NaN", b"Infinity"):
        return ": set index.classes=names if these are class names"
    return ""


def read_label(sample: Sample, source: str, n_classes: int) -> int:
    """Class of a sample, an integer 0 <= label < n_classes. Raises BadLabel as `LabelReader.read` does.

    Args:
        sample: sample with the payload of its label.
        source: suffix of the member with the label ("cls"), or "json:FIELD".
        n_classes: number of classes.
    """
    return int(LabelReader(source, n_classes).read(sample))


def json_value(data: bytes, field: str, is_name: bool = False) -> bytes:
    """Text of a field of a JSON object, `a`, or of a path through nested objects, `a.b.c`. Raises BadLabel.

    Args:
        data: the JSON member.
        field: name, or path.
        is_name: True where the value is to be a class name: null, lists, objects and fractions are none.
    """
    if len(data) > _MAX_JSON_BYTES:
        raise BadLabel(f"the json member is larger than {_MAX_JSON_BYTES} bytes")
    path = field.split(".")
    watched = {field, *path}

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # parsers differ in which one they take
            for name in watched:
                if sum(other == name for other, _ in pairs) > 1:
                    raise BadLabel(f"the json member has field {name!r} twice")
        return found

    try:
        record = json.loads(data, object_pairs_hook=once)
        found = [value for value in (_at(record, [field]), _at(record, path) if len(path) > 1 else None) if value]
        if len(found) != 1:
            why = "no field" if not found else "both a field and a path"
            raise BadLabel(f"the json member has {why} {field!r}")
        value = found[0][0]
        text = value if isinstance(value, str) else json.dumps(value)
        if is_name and not isinstance(value, str | int):
            raise BadLabel(f"label '{_shown(text.encode())}' is no class name: write a text, an integer, true or false")
    except BadLabel:
        raise
    except (ValueError, RecursionError) as error:
        raise BadLabel("the json member is not valid JSON") from error
    return text.encode("utf-8", "surrogatepass")


def _at(record: Any, path: Sequence[str]) -> tuple[Any] | None:
    """The value at a path, in a tuple; None if there is none."""
    for name in path[: _MAX_PATH + 1]:
        if not isinstance(record, dict) or name not in record:
            return None
        record = record[name]
    return (record,)


def label_fields(data: bytes) -> list[tuple[bool, str]]:
    """Fields of a JSON member that may be labels: (is a text, path), integers first, at most ten."""
    try:
        record = json.loads(data) if len(data) <= _MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        return []
    found: list[tuple[bool, str]] = []

    def look(value: Any, path: list[str]) -> None:
        if isinstance(value, dict) and len(path) < 4:
            for name, inner in list(value.items())[:50]:
                if re.fullmatch(r"[\w-]{1,40}", name):
                    look(inner, [*path, name])
        elif path and isinstance(value, int | str) and not isinstance(value, bool) and len(str(value)) <= 40:
            words = ("label", "class", "cls", "category", "target")
            if any(word in ".".join(path).lower() for word in words):
                found.append((isinstance(value, str) and not value.isdecimal(), ".".join(path)))

    look(record, [])
    return sorted(found)[:10]


def _of_table(table: Mapping[str, Any], key: str) -> bytes:
    value = table.get(key)
    if value is None:
        raise BadLabel(f"key '{key}' is not in the table of labels")
    if value is TWICE:
        raise BadLabel(f"key '{key}' has several rows in the table of labels")
    return value if isinstance(value, bytes) else b"%d" % value


def read_table(url: str, column: str, what: str) -> tuple[dict[str, Any], str]:
    """Value by key, and the sha256 of the file.

    Args:
        url: CSV or Parquet file with a column `key`.
        column: column with the values.
        what: what the values are, for messages.

    Returns:
        Integers, or texts as bytes; TWICE for a key with several rows.

    Raises:
        ConfigError: the table has no such column, or is larger than the limits.
        DataError: the table cannot be read.
    """
    name = f"the table of {what} {url}"
    size = fingerprint(url)["size"]
    if isinstance(size, int) and size > _MAX_TABLE_BYTES:
        raise ConfigError(f"{name} has {size} bytes, more than {_MAX_TABLE_BYTES}")
    data = read_bytes(url)
    read: Callable[[bytes, str, str], list[tuple[Any, Any]]] = _read_parquet if data.startswith(b"PAR1") else _read_csv
    try:
        rows = read(data, name, column)
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise DataError(f"{name} cannot be read: {str(error).splitlines()[0][:200]}") from error
    found: dict[str, Any] = {}
    for key, value in rows:
        if key is not None:
            found[str(key)] = TWICE if str(key) in found else b"" if value is None else value
    return found, hashlib.sha256(data).hexdigest()


def _key_column(names: Sequence[str], name: str, column: str) -> str:
    if len(names) > _MAX_COLUMNS:
        raise ConfigError(f"{name} has {len(names)} columns, more than {_MAX_COLUMNS}")
    for key in _KEY_COLUMNS:
        if names.count(key) == names.count(column) == 1 and key != column:
            return key
    shown = ", ".join(printable(other[:40]) for other in names[:20])
    raise ConfigError(f"{name} needs one column 'key' and one column {column!r}; it has {shown}")


def _check_rows(n: int, name: str) -> None:
    if n > _MAX_ROWS:
        raise ConfigError(f"{name} has more than {_MAX_ROWS} rows")


def delimiter_of(first_line: str) -> str:
    """What separates the cells of a table: comma, semicolon or tab, whichever is most frequent in its first line."""
    return max(",;\t", key=first_line.count)  # of equals the first


def _read_csv(data: bytes, name: str, column: str) -> list[tuple[str, bytes]]:
    text = data.decode("utf-8-sig")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text.partition("\n")[0]), strict=True)
    names = next(lines, [])
    at = names.index(_key_column(names, name, column)), names.index(column)
    found: list[tuple[str, bytes]] = []
    for number, line in enumerate(lines, 2):
        if line:
            if len(line) != len(names):
                raise DataError(f"{name} has {len(line)} cells in row {number}, and {len(names)} columns")
            found.append((line[at[0]], line[at[1]].encode()))
            _check_rows(len(found), name)
    return found


def _read_parquet(data: bytes, name: str, column: str) -> list[tuple[Any, Any]]:
    check_footer(io.BytesIO(data), name, f"write it again with its columns key and {column} alone")
    file = pq.ParquetFile(pa.BufferReader(data), **LIMITS)
    _check_rows(file.metadata.num_rows, name)
    wanted = [_key_column(file.schema_arrow.names, name, column), column]
    for wanted_name in wanted:
        kind = file.schema_arrow.field(wanted_name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(f"column {wanted_name!r} of {name} holds {kind}, not integers or texts")
    n_bytes = n_rows = 0
    found: list[tuple[Any, Any]] = []
    for batch in checked(file.iter_batches(4096, columns=wanted)):
        n_bytes, n_rows = n_bytes + batch.nbytes, n_rows + len(batch)
        if n_bytes > _MAX_UNPACKED_BYTES:
            raise ConfigError(f"{name} unpacks to more than {_MAX_UNPACKED_BYTES} bytes")
        _check_rows(n_rows, name)
        keys, values = (batch[one].to_pylist() for one in wanted)
        found += [
            (key, value.encode() if isinstance(value, str) else value) for key, value in zip(keys, values, strict=True)
        ]
    return found


def notes_on(labels: Mapping[int, int], n_classes: int | None, classes: Sequence[str] | None) -> list[str]:
    """What is odd about the classes, with the remedy.

    Args:
        labels: class -> number of samples, 1 or more.
        n_classes: `IndexConfig.n_classes`.
        classes: names of the classes.
    """
    if not labels:
        return []
    if classes is not None:
        return notes_on_names(classes)
    top, present = max(labels), len([label for label in labels if labels[label]])
    if min(labels) == 1 and present == top:
        more = f", and class {n_classes - 1} too" if n_classes and n_classes > top + 1 else ""
        return [
            f"class 0 has no samples{more}: if labels count from 1, this is harmless, but the model gets a class that "
            "nothing has; subtract 1 for labels from 0"
        ]
    n = n_classes or top + 1
    if present < n:
        gaps = "its number is a gap" if n - present == 1 else "these are gaps in the numbers"
        return [f"{n - present:,} of {counted(n, 'class')} {have(n - present)} no samples; harmless if {gaps}"]
    return []
