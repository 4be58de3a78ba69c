"""Rows of damaged Parquet files: indices into dictionaries are checked before anything is looked up."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.artifacts import Artifact, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.labels import LabelReader
from sanitize.data.parquet_batches import checked
from sanitize.data.stated_hashes import StatedHashes
from sanitize.data.tables import Embeddings
from sanitize.embed.table import TableConfig, import_table
from sanitize.errors import ArtifactError, DataError
from sanitize.measure.robustness import Robustness
from sanitize.redteaming.sample import Samples
from sanitize.training.stage import RobustModel

INDICES = st.lists(st.none() | st.integers(-3, 6), max_size=12)


def dictionary(indices: list[int | None], n: int) -> pa.DictionaryArray:
    """`n` values, and indices as they are."""
    values = pa.array([f"v{i}" for i in range(n)], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), values, safe=False)


class Texts(pa.ExtensionType):
    """A type of a program."""

    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, "tests.texts")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, _data: bytes) -> "Texts":
        return cls(storage)


def extension(inner: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(Texts(inner.type), inner)


def ends(inner: pa.Array) -> list[int]:
    """Offsets of lists of 0, 1, 2, 0, 1, 2, ... values."""
    offsets = [0]
    while offsets[-1] < len(inner):
        offsets.append(min(len(inner), offsets[-1] + (len(offsets) - 1) % 3))
    return offsets


def masked(inner: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays(
        [inner], ["q"], mask=pa.array([i % 2 == 0 for i in range(len(inner))], pa.bool_())
    )


# One more level around a column, by its name.
LEVELS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "struct": lambda inner: pa.StructArray.from_arrays([pa.nulls(len(inner)), inner], ["p", "q"]),
    "struct of nulls": masked,
    "list": lambda inner: pa.ListArray.from_arrays(pa.array(ends(inner), pa.int32()), inner),
    "large list": lambda inner: pa.LargeListArray.from_arrays(pa.array(ends(inner), pa.int64()), inner),
    "list of fixed size": lambda inner: pa.FixedSizeListArray.from_arrays(inner, 1),
    "list view": lambda inner: pa.ListViewArray.from_arrays(
        pa.array(range(len(inner)), pa.int32()), pa.array([1] * len(inner), pa.int32()), inner
    ),
    "map": lambda inner: pa.MapArray.from_arrays(
        pa.array(ends(inner), pa.int32()), pa.array([f"k{i}" for i in range(len(inner))]), inner
    ),
    "extension": extension,
    "values of a dictionary": lambda inner: pa.DictionaryArray.from_arrays(
        pa.array([0] * min(1, len(inner)), pa.int8()), inner
    ),
}


@given(INDICES, st.integers(0, 4), st.lists(st.sampled_from(sorted(LEVELS)), max_size=3))
def test_a_batch_is_given_only_if_every_index_is_in_its_dictionary(
    indices: list[int | None], n: int, levels: list[str]
) -> None:
    column = dictionary(indices, n)
    for level in levels:
        column = LEVELS[level](column)
    batch = pa.record_batch([pa.array(range(len(column))), column], names=["row", "label"])
    is_good = all(i is None or 0 <= i < n for i in indices)
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        assert not is_good
    else:
        assert is_good
    if is_good:
        assert list(checked([batch])) == [batch]
    else:
        with pytest.raises(pa.ArrowInvalid, match=rf"'label.*' points outside of its dictionary of {n} values"):
            list(checked([batch]))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data(), st.sampled_from(["struct", "struct of nulls"]))
def test_rows_that_are_left_out_do_not_count(indices: list[int], data: st.DataObject, level: str) -> None:
    start = data.draw(st.integers(0, len(indices)))
    batch = pa.record_batch([LEVELS[level](dictionary([*indices], 3))], names=["label"])[start:]
    if max(indices[start:], default=0) < 3:
        assert list(checked([batch])) == [batch]
    else:
        with pytest.raises(pa.ArrowInvalid, match=r"'label\.q' points outside"):
            list(checked([batch]))


def test_types_that_no_parquet_file_has_are_refused_rather_than_passed_unchecked() -> None:
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [dictionary([5], 3)])
    with pytest.raises(pa.ArrowInvalid, match=r"'x' holds sparse_union.* which is not read from a Parquet file"):
        list(checked([pa.record_batch([union], names=["x"])]))


def with_index_outside(table: pa.Table, column: str) -> bytes:
    """A Parquet file of a table, in which the last index of a column is 3 of 0 to 2. The column holds three values, the
    last of them in the last 100 rows: its pages end with a run, and the run with its index."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="none", write_statistics=False)
    group = pq.ParquetFile(file).metadata.row_group(0)
    (chunk,) = (c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema == column)
    data = bytearray(file.getvalue())
    last = chunk.dictionary_page_offset + chunk.total_compressed_size - 1
    assert data[last] == 2
    data[last] = 3
    return bytes(data)


TEXTS = [f"t{min(i, 2)}" for i in range(103)]
NESTED = {
    "label": pa.array(TEXTS),
    "label.q": pa.array([{"q": text} for text in TEXTS]),
    "label.list.element": pa.array([[text] for text in TEXTS]),
    "label.list.element.q.list.element": pa.array(
        [[{"q": [text]}] for text in TEXTS], pa.large_list(pa.struct({"q": pa.large_list(pa.string())}))
    ),
    "label.key_value.value": pa.array([[(text, text)] for text in TEXTS], pa.map_(pa.string(), pa.string())),
    "label.key_value.key": pa.array([[(text, text)] for text in TEXTS], pa.map_(pa.string(), pa.string())),
    "label.list.element.q": pa.array([[{"q": text}] for text in TEXTS], pa.list_(pa.struct({"q": pa.string()}), 1)),
}


@pytest.mark.parametrize("column", NESTED)
def test_an_index_outside_in_a_file_is_found_however_deep_it_lies(column: str) -> None:
    table = pa.table({"row": range(len(TEXTS)), "label": NESTED[column]})
    good = io.BytesIO()
    pq.write_table(table, good)
    for data, is_good in ((good.getvalue(), True), (with_index_outside(table, column), False)):
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=[column])
        assert "dictionary" in str(file.schema_arrow.field("label").type)
        batches = checked(file.iter_batches(50))
        if is_good:
            assert sum(batch.num_rows for batch in batches) == len(TEXTS)
        else:
            with pytest.raises(pa.ArrowInvalid, match=r"'label.*' points outside of its dictionary of 3 values"):
                list(batches)


# --- who reads files from outside ------------------------------------------------------------------------------------


def table_of(name: str) -> pa.Table:
    """103 rows, in which a column is a dictionary."""
    columns = {
        "key": pa.array([f"k{i}" for i in range(103)]),
        "position": pa.array(range(103)),
        "label": pa.array([0] * 103),
        "features": pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 206, pa.float32()), 2),
        "x": pa.array([0.0] * 103),
    }
    return pa.table(columns | {name: pa.array(TEXTS).dictionary_encode()})


@pytest.mark.hostile
@pytest.mark.parametrize("reader", [LabelReader, StatedHashes])
@pytest.mark.parametrize("column", ["key", "class"])
def test_a_table_of_labels_or_hashes_with_an_index_outside_is_refused(
    reader: Callable[[str], object], column: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.parquet"
    wanted = "class2" if column == "key" else "class"
    path.write_bytes(with_index_outside(table_of(column).append_column("class2", pa.array([0] * 103)), column))
    with pytest.raises(DataError, match=f"column '{column}' points outside of its dictionary of 3 values"):
        reader(f"table:{path}#{wanted}")


@pytest.mark.hostile
def test_a_table_of_embeddings_with_an_index_outside_is_refused(compute: Compute, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(with_index_outside(table_of("key"), "key"))
    with pytest.raises(DataError, match="column 'key' points outside of its dictionary of 3 values"):
        import_table(TableConfig(key="key"), str(path), str(tmp_path / "out"), compute)


def artifact(kind: type[Artifact], name: str, data: bytes, out: Path) -> Any:
    return make(kind, str(out), Recipe(stage="made-up"), lambda part: part.write(name, data))


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("kind", "name", "use"),
    [
        (Embeddings, "rows/a.tar.parquet", lambda made: made.rows("a.tar")),
        (Embeddings, "rows/a.tar.parquet", lambda made: list(made.batches("features"))),
        (Dataset, "facts/a.tar.parquet", lambda made: made.facts("a.tar")),
        (RobustModel, "history.parquet", lambda made: made.history),
        (Samples, "origins.parquet", lambda made: made.origins()),
        (Robustness, "perturbations.parquet", lambda made: made.table()),
    ],
)
def test_a_damaged_table_of_an_artifact_is_an_error_that_names_it(
    kind: type[Artifact], name: str, use: Callable[[Any], object], tmp_path: Path
) -> None:
    outside = with_index_outside(table_of("key"), "key")
    with pytest.raises(ArtifactError, match=f"{name} is damaged: column 'key' points outside"):
        use(artifact(kind, name, outside, tmp_path / "outside"))
    good = io.BytesIO()
    pq.write_table(table_of("key"), good, compression="zstd")
    chunk = pq.ParquetFile(good).metadata.row_group(0).column(0)
    data = bytearray(good.getvalue())
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    with pytest.raises(ArtifactError, match=f"{name} is damaged: "):
        use(artifact(kind, name, bytes(data), tmp_path / "damaged"))
    assert use(artifact(kind, name, good.getvalue(), tmp_path / "good"))
