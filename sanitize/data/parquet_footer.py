"""The footer of a Parquet file, which pyarrow reads as a whole: columns, and their places in each row group.

In memory, a footer may take 230 times its bytes: three bytes can state a column of a row group, which takes 700. Other
footers are large for a good reason, as the smallest and largest image of each row group are in it. So what the footer
holds is counted before pyarrow reads it.
"""

from typing import BinaryIO

from sanitize.errors import DataError

MAX_FOOTER = 16 << 20  # bytes
_MAX_MEMORY = 256 << 20
LIMITS = {"thrift_string_size_limit": MAX_FOOTER, "thrift_container_size_limit": 100_000}  # of pq.ParquetFile

# Bytes that are counted. Columns, row groups and their columns take up to 1 KiB; what lists further down hold is small.
_LARGE, _SMALL, _TEXT, _VALUE = 1024, 128, 64, 64
# The path of a column has the names of all groups around it, and there are 4 copies of it: a long name counts for each.
_SCHEMA = 2  # number of the field
_MAX_SCHEMA, _LONG_NAME = 4_000, 128
_MAX_DEPTH = 16  # lists and structures one inside the other; 6 in ordinary files
# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MEMORY = {_BINARY: _TEXT, _LIST: _SMALL, _SET: _SMALL, _MAP: _SMALL}


def check_footer(file: BinaryIO, name: str, remedy: str) -> None:
    """Check the footer of a file before pyarrow reads it; the file is then at its start.

    Args:
        file: the file.
        name: what it is called in errors.
        remedy: what to do about too many columns or row groups.

    Raises:
        DataError: the footer is too large, or there is none that could be read.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    end = file.read(8)
    n = int.from_bytes(end[:4], "little")
    if end[4:] == b"PARE":
        raise DataError(f"{name} is encrypted; write it again without")
    if end[4:] != b"PAR1" or n > size - 12:
        raise DataError(f"{name} cannot be read as a Parquet file: it does not end with a footer")
    large = f"{name} has a footer of {n:,} bytes"
    if n > MAX_FOOTER:
        raise DataError(f"{large}, more than {MAX_FOOTER:,}: {remedy}")
    file.seek(size - 8 - n)
    footer = _Footer(file.read(n))
    try:
        footer.read(_STRUCT, 0, 0)
    except _TooLarge:
        raise DataError(f"{large} that needs more than {_MAX_MEMORY >> 20} MiB of memory: {remedy}") from None
    except (IndexError, ValueError):
        raise DataError(f"{name} cannot be read as a Parquet file: its footer is damaged") from None
    file.seek(0)


class _TooLarge(Exception):
    pass


class _Footer:
    """Structures in Thrift's compact protocol, which are stepped over.

    Raises:
        IndexError: a value goes on behind the end.
        ValueError: there is no such type or number.
        _TooLarge: the values take more memory than they may.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._left = data, 0, _MAX_MEMORY
        self._field = self._n_schema = 0  # where this is, at the top; columns and groups, while they are read

    def read(self, kind: int, depth: int, n_lists: int) -> None:
        """Step over one value.

        Args:
            kind: type of the value.
            depth: number of lists and structures around it.
            n_lists: number of lists around it.
        """
        if depth > _MAX_DEPTH:
            raise ValueError
        if kind in (_I16, _I32, _I64):
            self._number()
        elif kind == _BINARY:
            n = self._number()
            if n_lists and n > _LONG_NAME:
                self._take(4 * n * self._n_schema)
            self._skip(n)
        elif kind in (_TRUE, _FALSE, _BYTE):  # in a list; a field of a structure has its boolean in its type
            self._skip(1)
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _STRUCT:
            self._fields(depth, n_lists)
        elif kind in (_LIST, _SET):
            head = self._byte()
            n = head >> 4 if head < 0xF0 else self._number()
            self._items((head & 15,), n, depth, n_lists)
        elif kind == _MAP:
            n = self._number()
            head = self._byte() if n else 0
            self._items((head >> 4, head & 15), n, depth, n_lists)
        else:
            raise ValueError

    def _fields(self, depth: int, n_lists: int) -> None:
        field = 0
        while head := self._byte():
            self._take(_VALUE)
            field = field + (head >> 4) if head > 15 else self._number() >> 1
            if depth == 0:
                self._field = field
            if (kind := head & 15) not in (_TRUE, _FALSE):
                self.read(kind, depth + 1, n_lists)

    def _items(self, kinds: tuple[int, ...], n: int, depth: int, n_lists: int) -> None:
        if n > len(self._data) - self._at:  # each has a byte or more
            raise IndexError
        if n_lists == 0:
            self._n_schema = n if self._field == _SCHEMA else 0
            if self._n_schema > _MAX_SCHEMA:
                raise _TooLarge
        for kind in kinds:
            struct = _LARGE if n_lists < 2 else _SMALL
            self._take(n * (struct if kind == _STRUCT else _MEMORY.get(kind, _VALUE)))
        for _ in range(n):
            for kind in kinds:
                self.read(kind, depth + 1, n_lists + 1)

    def _take(self, n_bytes: int) -> None:
        self._left -= n_bytes
        if self._left < 0:
            raise _TooLarge

    def _skip(self, n: int) -> None:
        self._at += n
        if self._at > len(self._data):
            raise IndexError

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _number(self) -> int:
        """Without its sign, which no size has."""
        number = shift = 0
        while (byte := self._byte()) > 127:
            number |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError
        return number | byte << shift
