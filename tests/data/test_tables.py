import contextlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanitize.artifacts import Part, Recipe, make
from sanitize.data.tables import Embeddings, ShardTables, fixed_size_list, read_table, rows_name, write_rows
from sanitize.errors import ArtifactError, ConfigError


def table(n: int, seed: int = 0, d: int = 3) -> pa.Table:
    z_ND = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    columns = {"position": pa.array(range(n), pa.int64()), "key": [f"k{i}" for i in range(n)]}
    columns |= {"label": pa.array([i % 2 for i in range(n)], pa.int64()), "logits": fixed_size_list(z_ND[:, :2])}
    return pa.table(columns | {"penultimate": fixed_size_list(z_ND), "pooled": fixed_size_list(z_ND.repeat(1, 2))})


def write(out: Path, tables: dict[str, pa.Table], kind: type[ShardTables] = Embeddings) -> ShardTables:
    def write_part(shard: str, part: Part) -> None:
        write_rows(part, shard, tables[shard])

    return make(kind, out, Recipe(stage="made-up"), parts=list(tables), write_part=write_part)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardTables, Path, bytes]:
    """A table of one shard, to be damaged: the artifact, the path of the file, its content."""
    artifact = write(tmp_path_factory.mktemp("damaged") / "a", {"x.tar": table(50)})
    path = artifact.file(rows_name("x.tar"))
    return artifact, path, path.read_bytes()


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    tables = {"b/x.tar": table(5), "a.tar": table(300, 1)}
    artifact = write(tmp_path / "a", tables)
    assert artifact.shards == ["a.tar", "b/x.tar"]
    for shard, wanted in tables.items():
        assert artifact.rows(shard).to_pylist() == wanted.to_pylist()
    assert artifact.rows("a.tar", ["key"]).column_names == ["key"]
    assert rows_name("b/x.tar") == "rows/b/x.tar.parquet"


@pytest.mark.parametrize("columns", [None, [], ["key"], ["pooled", "position"], ["label", "key", "logits"]])
def test_columns_are_read_in_the_order_in_which_they_are_asked_for(tmp_path: Path, columns: list[str] | None) -> None:
    artifact = write(tmp_path / "a", {"x.tar": table(30)})
    path = artifact.file(rows_name("x.tar"))
    wanted = table(30) if columns is None else table(30).select(columns)
    for source in (path, pa.BufferReader(path.read_bytes())):
        found = read_table(source, columns)
        assert found.column_names == wanted.column_names
        assert found.num_rows == 30
        assert found.to_pylist() == wanted.to_pylist() == pq.read_table(path, columns=columns).to_pylist()
    assert artifact.rows("x.tar", columns).equals(wanted)


@pytest.mark.parametrize("column", ["features", "pooled.list", "pooled.list.element", "", "Key"])
def test_a_missing_column_is_an_error_that_names_it_and_the_file(tmp_path: Path, column: str) -> None:
    artifact = write(tmp_path / "a", {"x.tar": table(5)})
    with pytest.raises(ArtifactError, match=rf"x\.tar\.parquet is damaged: there is no column '{column}'"):
        artifact.rows("x.tar", ["key", column])


@pytest.mark.hostile
@given(data=st.data())
@settings(max_examples=150)
def test_a_damaged_file_is_an_error_of_ours_or_a_table(
    damaged: tuple[ShardTables, Path, bytes], data: st.DataObject
) -> None:
    artifact, path, good = damaged
    bad = bytearray(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    for at in data.draw(st.lists(st.integers(0, max(0, len(bad) - 1)), max_size=4)) if bad else []:
        bad[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bad)
    with contextlib.suppress(ArtifactError):
        for columns in (None, ["label", "key"]):
            assert artifact.rows("x.tar", columns).num_columns == (6 if columns is None else 2)


@pytest.mark.hostile
def test_a_file_that_was_cut_anywhere_is_an_error_that_names_it(damaged: tuple[ShardTables, Path, bytes]) -> None:
    artifact, path, good = damaged
    for size in [*range(0, 60), *range(60, len(good), 97), *range(len(good) - 60, len(good))]:
        path.write_bytes(good[:size])
        with pytest.raises(ArtifactError, match=r"rows/x\.tar\.parquet is damaged"):
            artifact.rows("x.tar", ["key"])


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"x.tar": table(100)})
    chunked = pa.concat_tables([table(100).slice(0, 30), table(100).slice(30)]).combine_chunks()
    assert write(tmp_path / "b", {"x.tar": chunked}).digest == first.digest
    assert write(tmp_path / "c", {"x.tar": table(100, 1)}).digest != first.digest


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_embeddings_are_streamed_in_order_and_to_the_last_bit(tmp_path: Path, size: int) -> None:
    tables = {"a.tar": table(20), "b.tar": table(9, 1)}
    artifact = write(tmp_path / "a", tables)
    assert isinstance(artifact, Embeddings)
    assert artifact.names == ["penultimate", "pooled"]
    for name in artifact.names:
        batches = list(artifact.batches(name, size))
        assert all(len(batch.keys) <= size for batch in batches)
        for shard, wanted in tables.items():
            z_ND = torch.cat([batch.z_BD for batch in batches if batch.shard == shard])
            assert z_ND.dtype == torch.float32
            assert z_ND.tolist() == wanted[name].to_pylist()
            keys = [key for batch in batches if batch.shard == shard for key in batch.keys]
            assert keys == wanted["key"].to_pylist()
            labels = torch.cat([batch.labels_B for batch in batches if batch.shard == shard])
            assert labels.tolist() == wanted["label"].to_pylist()
            positions = torch.cat([batch.positions_B for batch in batches if batch.shard == shard])
            assert positions.tolist() == wanted["position"].to_pylist()
    assert [batch.shard for batch in artifact.batches("pooled", 100, ["b.tar"])] == ["b.tar"]


def test_an_embedding_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    artifact = write(tmp_path / "a", {"x.tar": table(5)})
    assert isinstance(artifact, Embeddings)
    for name in ("logits", "key", "features"):
        with pytest.raises(ConfigError, match="penultimate, pooled"):
            list(artifact.batches(name))


def test_fixed_size_list_takes_any_tensor() -> None:
    x_BD = torch.arange(6.0, dtype=torch.float64, requires_grad=True).reshape(2, 3)
    assert fixed_size_list(x_BD).to_pylist() == [[0, 1, 2], [3, 4, 5]]
    assert fixed_size_list(x_BD.T).to_pylist() == [[0, 3], [1, 4], [2, 5]]
