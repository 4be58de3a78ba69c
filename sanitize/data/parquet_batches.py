"""Batches of a Parquet file from outside, with what pyarrow does not check while it reads."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc


def checked(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same batches.

    Raises:
        pa.ArrowInvalid: an index into a dictionary of values lies outside it, as in a damaged or made-up file.
    """
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if isinstance(column, pa.DictionaryArray) and len(column.indices) > column.indices.null_count:
                ends = pc.min_max(column.indices).as_py()
                if ends["min"] < 0 or ends["max"] >= len(column.dictionary):
                    raise pa.ArrowInvalid(
                        f"column {name!r} points outside of its dictionary of {len(column.dictionary)} values"
                    )
        yield batch
