"""The footer of a Parquet file, which pyarrow reads as a whole: columns, and their places in each row group."""

from typing import BinaryIO

MAX_CONTAINER = 100_000  # columns, row groups, columns of a row group


def footer_bytes(file: BinaryIO) -> int:
    """Bytes of the footer, as the end of the file states them; 0 for what is no Parquet file.

    In memory, a footer takes up to 230 times its bytes: each column of each row group may be stated in three bytes.
    """
    size = file.seek(0, 2)
    if size < 12:
        return 0
    file.seek(size - 8)
    end = file.read(8)
    return int.from_bytes(end[:4], "little") if end[4:] in (b"PAR1", b"PARE") else 0  # PARE: encrypted
