"""Batches of damaged Parquet files: indices into dictionaries are checked before anything is looked up."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.data.parquet_batches import checked

INDICES = st.lists(st.none() | st.integers(-3, 6), max_size=12)


@given(INDICES, st.integers(0, 4))
def test_a_batch_is_given_only_if_every_index_is_in_its_dictionary(indices: list[int | None], n: int) -> None:
    column = pa.DictionaryArray.from_arrays(
        pa.array(indices, pa.int32()), pa.array([f"v{i}" for i in range(n)], pa.string()), safe=False
    )
    batch = pa.record_batch([pa.array(range(len(indices))), column], names=["row", "label"])
    if all(i is None or 0 <= i < n for i in indices):
        assert [one.num_rows for one in checked([batch])] == [len(indices)]
    else:
        with pytest.raises(pa.ArrowInvalid, match=f"'label' points outside of its dictionary of {n} values"):
            list(checked([batch]))
