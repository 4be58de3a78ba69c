"""Files of rows in groups: Parquet, and the streams of Arrow batches that `datasets` saves."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from sanitize.data.parquet_batches import checked
from sanitize.data.parquet_footer import LIMITS, check_footer
from sanitize.errors import ConfigError, DataError
from sanitize.storage import is_local, local_path, open_read

_MAX_COLUMNS, _MAX_BATCHES = 1_000, 1_000_000


class GroupFile(Protocol):
    """A file of rows in groups.

    Attributes:
        schema: columns.
    """

    schema: pa.Schema

    def groups(self, image: str) -> Iterator[tuple[int, int]]:
        """Rows, and bytes of the column of images, of each group. Raises DataError where they cannot be."""
        ...

    def leaves(self, image: str) -> list[str]:
        """What is to be read of the column of images."""
        ...

    def batches(self, group: int, columns: Sequence[str], n: int) -> Iterator[pa.RecordBatch]:
        """Rows of a group, about `n` at once. Raises ArrowException or OSError where it is damaged."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class ParquetGroups:
    """A Parquet file; columns of texts and bytes are read as dictionaries.

    Raises:
        DataError: it is no Parquet file, or claims what cannot be.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._stream = open_read(url)
        try:
            check_footer(self._stream, url, "write it again with fewer columns or larger row groups")
            plain = pq.ParquetFile(self._stream, pre_buffer=False, **LIMITS)
            self._metadata = plain.metadata
            if self._metadata.num_columns > _MAX_COLUMNS:
                raise DataError(f"{url} has more than {_MAX_COLUMNS} columns")
            self.schema: pa.Schema = plain.schema_arrow
            _read_names(self.schema)
            self._leaves = [plain.schema.column(i) for i in range(self._metadata.num_columns)]
            texts = [leaf.path for leaf in self._leaves if leaf.physical_type == "BYTE_ARRAY"]
            self._file = pq.ParquetFile(
                self._stream, metadata=self._metadata, read_dictionary=texts, pre_buffer=False, **LIMITS
            )
        except DataError:
            self._stream.close()
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            self._stream.close()
            raise DataError(f"{url} is no Parquet file that can be read: {_line(error)}") from error
        self._size = self._stream.seek(0, 2)

    def groups(self, image: str) -> Iterator[tuple[int, int]]:
        """Rows, and bytes of the column of images, of each group."""
        total = 0
        for i in range(self._metadata.num_row_groups):
            group = self._metadata.row_group(i)
            total += group.num_rows
            if group.num_rows < 0 or total > self._size:
                raise DataError(f"{self._url} claims more rows than it has bytes; it is damaged or made up")
            sizes = [
                group.column(k).total_uncompressed_size
                for k, leaf in enumerate(self._leaves)
                if leaf.path == image or leaf.path.startswith(f"{image}.")
            ]
            yield group.num_rows, max(0, sum(sizes))

    def leaves(self, image: str) -> list[str]:
        """The column itself, or `bytes` and `path` of a struct."""
        return [leaf.path for leaf in self._leaves if leaf.path in (image, f"{image}.bytes", f"{image}.path")]

    def batches(self, group: int, columns: Sequence[str], n: int) -> Iterator[pa.RecordBatch]:
        """Rows of a group, at most `n` at once."""
        return checked(self._file.iter_batches(n, row_groups=[group], columns=list(columns), use_threads=False))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class ArrowFile:
    """A stream of record batches, mapped into memory: nothing is allocated for what it claims.

    Raises:
        ConfigError: the file is not on this machine, or is compressed.
        DataError: it is no such stream.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        if not is_local(url):
            raise ConfigError(f"{url}: Arrow files are read from a disk only; copy them, or give Parquet files")
        open_read(url).close()  # a regular file
        try:
            self._map = pa.memory_map(str(local_path(url)))
            reader = pa.ipc.MessageReader.open_stream(self._map)
            self.schema: pa.Schema = pa.ipc.read_schema(reader.read_next_message())
            _read_names(self.schema)
            self._messages: list[pa.Message] = []
            with suppress(StopIteration):
                while len(self._messages) <= _MAX_BATCHES:
                    self._messages.append(reader.read_next_message())
        except (pa.ArrowException, OSError, ValueError, StopIteration, MemoryError) as error:
            raise DataError(f"{url} is no stream of Arrow batches: {_line(error)}") from error
        if len(self.schema) > _MAX_COLUMNS or len(self._messages) > _MAX_BATCHES:
            raise DataError(f"{url} has more than {_MAX_COLUMNS} columns or {_MAX_BATCHES:,} batches")
        for message in self._messages:
            if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
                raise ConfigError(f"{url} is compressed, or has dictionaries; save it without, or give Parquet files")

    def _batch(self, group: int) -> pa.RecordBatch:
        batch = pa.ipc.read_record_batch(self._messages[group], self.schema)
        batch.validate(full=True)
        return batch

    def groups(self, image: str) -> Iterator[tuple[int, int]]:
        """Rows, and bytes, of each batch; a damaged one has no rows that could be counted."""
        for i, message in enumerate(self._messages):
            try:
                batch = self._batch(i)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DataError(f"{self._url}: batch {i} is damaged: {_line(error)}") from error
            if batch.num_rows > max(64, message.body.size):
                raise DataError(f"{self._url} claims more rows than it has bytes; it is damaged or made up")
            yield batch.num_rows, message.body.size

    def leaves(self, image: str) -> list[str]:
        """The column itself: mapped, the rest costs nothing."""
        return [image]

    def batches(self, group: int, columns: Sequence[str], n: int) -> Iterator[pa.RecordBatch]:
        """Rows of a batch."""
        batch = self._batch(group).select(list(columns))
        return (batch.slice(start, n) for start in range(0, batch.num_rows, n))

    def close(self) -> None:
        """Close the file."""
        self._messages = []


def _read_names(fields: Iterable[pa.Field]) -> None:
    """Raise UnicodeDecodeError where a name is not UTF-8: later, each use of it would."""
    for field in fields:
        if field.name and pa.types.is_struct(field.type):
            _read_names(field.type)


def _is_compressed(message: bytes) -> bool:
    """True if the header of a record batch (a flatbuffer `Message`) says that its buffers are compressed, or is odd.

    A table begins with the distance to its list of fields (vtable): sizes, then the place of each field, 0 if absent.
    `header` is field 2 of a message, `compression` field 3 of a record batch.
    """

    def field(table: int, number: int) -> int:
        (back,) = struct.unpack_from("<i", message, table)
        (size,) = struct.unpack_from("<H", message, table - back)
        if 4 + 2 * number >= size:
            return 0
        (offset,) = struct.unpack_from("<H", message, table - back + 4 + 2 * number)
        return table + offset if offset else 0

    try:
        (root,) = struct.unpack_from("<I", message, 0)
        header = field(root, 2)
        (distance,) = struct.unpack_from("<I", message, header)
        return header == 0 or field(header + distance, 3) != 0
    except struct.error:
        return True


def _line(error: Exception) -> str:
    return " ".join(str(error)[:200].split())
