"""Rows of a Parquet file from outside, with what pyarrow does not check while it reads.

`validate(full=True)` checks indices too, but also every value of a dictionary, with every batch that shares it: 1,250
batches of 100,000 values take 1.3 s, and one text that is not UTF-8 makes all rows of its batch invalid.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

_LISTS = (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray, pa.ListViewArray, pa.LargeListViewArray)  # and maps


def checked(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same batches.

    Raises:
        pa.ArrowInvalid: an index into a dictionary of values lies outside it, as in a damaged or made-up file.
    """
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            _check(name, column)
        yield batch


def checked_table(table: pa.Table) -> pa.Table:
    """The same table; see `checked`."""
    for _ in checked(table.to_batches()):
        pass
    return table


def _check(name: str, column: pa.Array) -> None:
    """Check all dictionaries in a column; also what lies under a null, which some functions of pyarrow look up."""
    if isinstance(column, pa.ExtensionArray):
        _check(name, column.storage)
    elif isinstance(column, pa.DictionaryArray):
        if len(column.indices) > column.indices.null_count:
            ends = pc.min_max(column.indices).as_py()
            if ends["min"] < 0 or ends["max"] >= len(column.dictionary):
                raise pa.ArrowInvalid(
                    f"column {name!r} points outside of its dictionary of {len(column.dictionary)} values"
                )
        _check(name, column.dictionary)
    elif isinstance(column, pa.StructArray):
        for i, field in enumerate(column.type):
            _check(f"{name}.{field.name}", column.field(i))
    elif isinstance(column, _LISTS):
        _check(name, column.values)
    elif column.type.num_fields:
        raise pa.ArrowInvalid(f"column {name!r} holds {str(column.type)[:60]}, which is not read from a Parquet file")
