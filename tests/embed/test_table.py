from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sanitize.compute import Compute
from sanitize.embed import TableConfig, import_table
from sanitize.errors import ArtifactError, ConfigError, DataError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4))
Y = RNG.integers(0, 3, 20)


def npz(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def parquet(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_a_table_becomes_embeddings(tmp_path: Path, compute: Compute, format: str) -> None:
    keys = [f"row {i}" for i in range(20)]
    if format == "npz":
        source = npz(tmp_path / "my.table.npz", X=X, label=Y, name=np.array(keys))
    else:
        columns = {f"f{i}": X[:, i] for i in range(4)}
        source = parquet(tmp_path / "my.table.parquet", label=Y, name=keys, text=keys, **columns)
    embeddings = import_table(TableConfig(key="name"), source, str(tmp_path / "out"), compute)
    assert embeddings.shards == ["my.table"]
    assert embeddings.names == ["features"]
    (batch,) = embeddings.batches("features")
    np.testing.assert_array_equal(batch.z_BD.numpy(), X.astype(np.float32))
    assert batch.labels_B.tolist() == Y.tolist()
    assert batch.keys == keys
    assert batch.positions_B.tolist() == list(range(20))
    assert embeddings.manifest().counts == {"samples": 20}


def test_without_labels_and_keys_rows_are_numbered_in_one_class(tmp_path: Path, compute: Compute) -> None:
    config = TableConfig(label=None)
    for i, source in enumerate(
        [npz(tmp_path / "a.npz", X=X), parquet(tmp_path / "b.parquet", **{f"f{i}": X[:, i] for i in range(4)})]
    ):
        (batch,) = import_table(config, source, str(tmp_path / f"{i}"), compute).batches("features")
        assert set(batch.labels_B.tolist()) == {0}
        assert batch.keys[:2] == ["00000000", "00000001"]
        np.testing.assert_array_equal(batch.z_BD.numpy(), X.astype(np.float32))


@pytest.mark.parametrize("name", ["_all", "..", "a b"])
def test_a_table_of_any_name(tmp_path: Path, compute: Compute, name: str) -> None:
    source = npz(tmp_path / f"{name}.npz", X=X, label=Y)
    embeddings = import_table(TableConfig(), source, str(tmp_path / "out"), compute)
    assert sum(len(batch.keys) for batch in embeddings.batches("features")) == 20


@pytest.mark.parametrize("labels", [Y.astype(float), Y.astype(np.uint8), Y[:, None], Y > 1], ids=str)
def test_labels_of_other_types_that_are_integers_all_the_same(
    tmp_path: Path, compute: Compute, labels: np.ndarray
) -> None:
    source = npz(tmp_path / "a.npz", X=X.astype(np.float64), label=labels)
    (batch,) = import_table(TableConfig(), source, str(tmp_path / "out"), compute).batches("features")
    assert batch.labels_B.tolist() == labels.ravel().astype(int).tolist()


@pytest.mark.hostile
@pytest.mark.parametrize("name", ["X", "label", "extra"])
def test_arrays_of_objects_are_refused_and_nothing_is_unpickled(tmp_path: Path, compute: Compute, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    source = npz(tmp_path / "a.npz", **({"X": X, "label": Y} | {name: np.array([Bomb()], dtype=object)}))
    with pytest.raises(DataError, match=r"a\.npz"):
        import_table(TableConfig(), source, str(tmp_path / "out"), compute)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("format", ["npz", "parquet"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_values_that_are_not_finite_name_the_row(tmp_path: Path, compute: Compute, value: float, format: str) -> None:
    bad = X.copy()
    bad[7, 2] = value
    source = (
        npz(tmp_path / "a.npz", X=bad, label=Y)
        if format == "npz"
        else parquet(tmp_path / "a.parquet", label=Y, **{f"f{i}": bad[:, i] for i in range(4)})
    )
    with pytest.raises(DataError, match=r"row 7 of .*not finite"):
        import_table(TableConfig(), source, str(tmp_path / "out"), compute)


BAD_LABELS = {
    "not integers": Y + 0.5,
    "not a number": np.where(Y == 1, np.nan, Y),
    "text": np.array(["cat"] * 20),
    "too few": Y[:5],
    "too large": np.full(20, 1e30),
}


@pytest.mark.parametrize("case", BAD_LABELS)
@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, compute: Compute, case: str, format: str) -> None:
    labels = BAD_LABELS[case]
    if format == "npz":
        source = npz(tmp_path / "a.npz", X=X, label=labels)
    elif len(labels) < 20:
        pytest.skip("columns of a table have one length")
    else:
        source = parquet(tmp_path / "a.parquet", label=labels, f=X[:, 0])
    with pytest.raises(DataError, match="label"):
        import_table(TableConfig(), source, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_a_null_label_is_refused(tmp_path: Path, compute: Compute) -> None:
    source = parquet(tmp_path / "a.parquet", label=[1, None, 2], f=[1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="label"):
        import_table(TableConfig(), source, str(tmp_path / "out"), compute)


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path, compute: Compute) -> None:
    tables = [npz(tmp_path / "a.npz", X=X, label=Y), parquet(tmp_path / "a.parquet", X=X[:, 0], label=Y)]
    for config in (TableConfig(label="class"), TableConfig(key="id")):
        for source in tables:
            with pytest.raises(ConfigError, match="it has X, label"):
                import_table(config, source, str(tmp_path / "out"), compute)
    with pytest.raises(ConfigError, match="no column 'Z'"):
        import_table(TableConfig(features="Z"), tables[0], str(tmp_path / "out"), compute)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no table at all"])
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_what_is_no_table_is_a_data_error(tmp_path: Path, compute: Compute, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.{suffix}"):
        import_table(TableConfig(), str(path), str(tmp_path / "out"), compute)


def test_other_things_that_are_no_features(tmp_path: Path, compute: Compute) -> None:
    out = str(tmp_path / "out")
    for source in (
        npz(tmp_path / "flat.npz", X=X[:, 0], label=Y),
        npz(tmp_path / "text.npz", X=np.full((20, 2), "a"), label=Y),
        npz(tmp_path / "empty.npz", X=X[:0], label=Y[:0]),
        parquet(tmp_path / "words.parquet", label=Y, word=["a"] * 20),
        str(tmp_path / "missing.npz"),
    ):
        with pytest.raises(DataError, match=Path(source).stem):
            import_table(TableConfig(), source, out, compute)


def test_the_digest_depends_on_the_content_and_not_on_the_place(tmp_path: Path, compute: Compute) -> None:
    source = npz(tmp_path / "a.npz", X=X, label=Y)
    first = import_table(TableConfig(), source, str(tmp_path / "1"), compute)
    (tmp_path / "deep").mkdir()
    moved = Path(source).rename(tmp_path / "deep" / "a.npz")
    assert import_table(TableConfig(), str(moved), str(tmp_path / "2"), compute).digest == first.digest
    npz(moved, X=X + 1, label=Y)
    with pytest.raises(ArtifactError):
        import_table(TableConfig(), str(moved), str(tmp_path / "2"), compute)
