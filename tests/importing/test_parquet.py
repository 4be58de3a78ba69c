"""Parquet files, and folders that `datasets` saved."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sanitize.errors import ConfigError, DataError
from sanitize.importing import parquet as module
from tests.importing.imported import by_file, reasons, run, samples

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def metadata(names: list[str] | None) -> dict[str, str]:
    label = {"_type": "Value", "dtype": "int64"} if names is None else {"_type": "ClassLabel", "names": names}
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}


def table(images: list[Any], labels: list[Any], names: list[str] | None = None, as_struct: bool = True) -> pa.Table:
    cells = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    column = pa.array(cells, STRUCT) if as_struct else pa.array(images, pa.binary())
    made = pa.table({"other": [0] * len(images), "image": column, "label": labels})
    return made.replace_schema_metadata(metadata(names)) if names else made


@pytest.fixture
def images(make_png: Callable[..., bytes]) -> list[bytes]:
    return [make_png(i) for i in range(30)]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("as_struct", [True, False])
def test_class_names_are_those_of_the_metadata(
    as_struct: bool, compression: str, images: list[bytes], tmp_path: Path
) -> None:
    labels = [i % 3 for i in range(30)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        table(images, labels, ["zebra", "ant", "bee"], as_struct), path, row_group_size=7, compression=compression
    )
    made = run(path, tmp_path / "out", samples_per_shard=8)
    assert made.classes() == {"zebra": 0, "ant": 1, "bee": 2}
    found = samples(made)
    assert [found[f"{i:08d}"]["png"] for i in range(30)] == images
    assert [int(found[f"{i:08d}"]["cls"]) for i in range(30)] == labels
    assert list(found) != sorted(found)
    record = json.loads(found["00000008"]["json"])
    assert record == {"file": "a.parquet:8" + ":8.png" * as_struct, "label": 2, "class_name": "bee"}
    assert list(samples(run(path, tmp_path / "sorted", shuffle=False))) == sorted(found)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array(["b", "a", "b"]), {"a": 0, "b": 1}),
        (pa.array(["b", "a", "b"]).dictionary_encode(), {"a": 0, "b": 1}),
        (pa.array(["b", "a", "b"], pa.large_string()), {"a": 0, "b": 1}),
        (pa.array([10, 9, 10]), {"9": 0, "10": 1}),
        (pa.array([10, 9, 10], pa.uint8()), {"9": 0, "10": 1}),
        (pa.array([True, False, True]), {"False": 0, "True": 1}),
    ],
)
def test_labels_without_names(labels: pa.Array, classes: dict[str, int], images: list[bytes], tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": pa.array(images[:3], pa.large_binary()), "label": labels}), tmp_path / "a.parquet")
    made = run(tmp_path / "a.parquet", tmp_path / "out")
    assert made.classes() == classes
    assert [int(samples(made)[f"{i:08d}"]["cls"]) for i in range(3)] == [1, 0, 1]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (pa.array(["a", None]), [":a", ""]),
        (pa.array(["a", "b"], pa.large_string()), [":a", ":b"]),
        (pa.array(["a", "b"], pa.string_view()), [":a", ":b"]),
        (pa.array([b"a", b"\xff"]), [":a", ":\\xff"]),
        (pa.array([1, 2]), ["", ""]),
        (pa.array([True, None]), ["", ""]),
        (pa.array([["a"], ["b"]]), ["", ""]),
        (pa.array([{"x": "a"}, None]), ["", ""]),
        (pa.nulls(2), ["", ""]),
    ],
)
def test_paths_of_any_type(path: pa.Array, shown: list[str], suffix: str, images: list[bytes], tmp_path: Path) -> None:
    column = pa.StructArray.from_arrays([pa.array(images[:2]), path], ["bytes", "path"])
    write = stream if suffix == "arrow" else lambda path, rows: pq.write_table(rows, path)
    write(tmp_path / f"a.{suffix}", pa.table({"image": column, "label": [0, 1]}))
    found = samples(run(tmp_path / f"a.{suffix}", tmp_path / "out"))
    assert [json.loads(found[f"{i:08d}"]["json"])["file"] for i in range(2)] == [
        f"a.{suffix}:{i}{shown[i]}" for i in range(2)
    ]


def test_rows_that_cannot_be_used_are_counted(images: list[bytes], tmp_path: Path) -> None:
    given = [*images[:5], None, b"", b"no image", images[0] + bytes(9000), *images[5:8]]
    rows = table(given, [0, 1, 0, 1, 2, 0, 0, 0, 0, -1, None, 1], ["a", "b"])
    lone = pa.array([{"bytes": None, "path": "/etc/passwd"}], STRUCT)
    rows = pa.concat_tables(
        [rows, pa.table({"other": [0], "image": lone, "label": [0]}).replace_schema_metadata(metadata(["a", "b"]))]
    )
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=4)
    made = run(tmp_path / "a.parquet", tmp_path / "out", max_refused_fraction=1, max_image_bytes=9000)
    assert (made.summary()["offered"], made.summary()["imported"]) == (13, 5)
    assert reasons(made) == {
        "the row has no image": 1,
        "the row has a path and no bytes": 1,
        "image is empty": 1,
        "not a jpeg, png, webp, ppm, bmp, gif, tiff or avif image": 1,
        "an image of more than max_image_bytes 9000": 1,
        "label 2 is not in 0..1": 1,
        "label -1 is not in 0..1": 1,
        "no label": 1,
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a-0", "a-1", "dev-1"], r"files of splits \(dev\) and others \(a-0.parquet, a-1.parquet\)"),
        (["Train-0", "Test-0"], "several splits: test, train"),
        (["train0", "test0"], "several splits: test, train"),
    ],
)
def test_no_file_is_left_out_or_mixed_in_for_its_name(
    names: list[str], message: str, images: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for i, name in enumerate(names):
        pq.write_table(table(images[2 * i : 2 * i + 2], [0, 1], ["a", "b"]), tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "in", tmp_path / "out")
    assert run(tmp_path / "in", tmp_path / "all", split="all").summary()["imported"] == 2 * len(names)


def test_several_files_and_splits(images: list[bytes], tmp_path: Path) -> None:
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        pq.write_table(
            table(images[10 * i : 10 * i + 10], list(range(10)), list("abcdefghij")), data / f"{name}.parquet"
        )
    (tmp_path / "hub" / "README.md").write_text("x")
    (tmp_path / "hub" / "script.py").write_text("raise SystemExit('run')")
    with pytest.raises(ConfigError, match="several splits: test, train"):
        run(tmp_path / "hub", tmp_path / "out")
    made = run(tmp_path / "hub", tmp_path / "out", split="train")
    given = [str(path) for path in sorted(data.glob("train*"), reverse=True)]
    again = run(given, tmp_path / "again")
    star = run(data / "train-*.parquet", tmp_path / "star", split=None)
    assert [samples(made)[f"{i:08d}"]["png"] for i in range(20)] == images[:20]
    assert samples(made) == samples(again) == samples(star)
    pq.write_table(table(images[:2], [0, 1], ["x", "y"]), data / "train-2.parquet")
    with pytest.raises(ConfigError, match="has other class names than in"):
        run(tmp_path / "hub", tmp_path / "other", split="train")


def test_rows_are_mixed_although_they_are_sorted_and_lie_in_groups(
    images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POOL_BYTES", 8 * (len(images[0]) + 64) + 1000)
    pq.write_table(table(images, [i // 10 for i in range(30)], list("abc")), tmp_path / "a.parquet", row_group_size=2)
    made = run(tmp_path / "a.parquet", tmp_path / "out", samples_per_shard=10)
    found = list(samples(made).values())
    assert len(found) == 30
    assert all(len({one["cls"] for one in found[start : start + 10]}) > 1 for start in (0, 10, 20))


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"text": ["a"]}, {}, r"has no column of encoded images.*columns: text \(string\)"),
        (
            {"a": [b"x"], "b": [b"y"], "label": [0]},
            {},
            "several columns that may hold images; choose with --image-column: a, b",
        ),
        ({"image": [b"x"], "fine": [0], "coarse": [1]}, {}, "choose with --label-column: fine, coarse"),
        ({"image": [b"x"], "label": [0], "class": [1]}, {}, "several columns of labels; .*: label, class"),
        ({"image": [b"x"], "label": [0.5]}, {}, "has no column of labels"),
        ({"image": [b"x"], "label": [0]}, {"label_column": "y"}, "may hold labels: label"),
        ({"image": [b"x"], "label": [0]}, {"image_column": "label"}, "may hold images: image"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, {}, "has no rows"),
    ],
)
def test_columns_that_cannot_be_told_apart(
    columns: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises((ConfigError, DataError), match=message):
        run(tmp_path / "a.parquet", tmp_path / "out", **settings)


def test_one_value_for_many_rows_does_not_grow(make_png: Callable[..., bytes], tmp_path: Path) -> None:
    """300 rows share an image of 3 MB and a label of 1 MB: a file of kilobytes, a gigabyte if each row had a copy."""
    large = make_png(0) + bytes(3_000_000)
    rows = pa.table({"image": pa.array([{"bytes": large, "path": "x"}], STRUCT), "label": ["y" * 1_000_000]})
    rows = pa.concat_tables([rows] * 300)
    schema = rows.schema
    with pq.ParquetWriter(
        tmp_path / "a.parquet", schema, compression="zstd", dictionary_pagesize_limit=1 << 30
    ) as writer:
        writer.write_table(rows, row_group_size=300)
    assert (tmp_path / "a.parquet").stat().st_size < 30_000
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(
        DataError, match=r"300 of 300 images were refused, nothing to import\. 300 x a label of more than 1000"
    ):
        run(tmp_path / "a.parquet", tmp_path / "out")
    assert pa.default_memory_pool().max_memory() - before < 100_000_000


def test_damage_costs_the_rows_of_its_group(images: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        table(images, [0] * 30, ["a"]),
        path,
        row_group_size=10,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = place.data_page_offset
    data[start + 40 : start + 400] = b"\xff" * 360
    path.write_bytes(data)
    made = run(path, tmp_path / "out", max_refused_fraction=1)
    assert made.summary()["offered"] == 30
    assert {*samples(made)} >= {f"{i:08d}" for i in (*range(10), *range(20, 30))}
    assert made.summary()["imported"] < 30
    assert made.summary()["imported"] + made.summary()["refused"] == 30


def test_what_is_no_parquet_file_is_an_error(images: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(images, [0] * 30), path)
    good = path.read_bytes()
    for data in (b"", b"PAR1", good[:-10], b"PAR1" + b"\xff" * 1000 + b"PAR1", good[:100] + good[-2000:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.parquet"):
            run(path, tmp_path / "out")
    path.write_bytes(good)
    with pytest.raises(DataError, match="more than max_row_group_bytes 1,000; write it again with fewer rows"):
        run(path, tmp_path / "out", max_row_group_bytes=1000)
    with pytest.raises(ConfigError, match="raise max_samples"):
        run(path, tmp_path / "out", max_samples=29)


def test_flipped_bytes_never_crash_an_import(images: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(images[:10], [0, 1] * 5, ["a", "b"]), path, row_group_size=5)
    good = path.read_bytes()
    n_done = 0
    for i in range(150):
        place = (i * 7919) % len(good) if i % 2 else len(good) - 8 - (i * 37) % 1500
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << i % 8)]) + good[place + 1 :])
        try:
            summary = run(path, tmp_path / f"out{i}", max_refused_fraction=1, max_samples=1000).summary()
        except (ConfigError, DataError):
            continue
        n_done += 1
        assert summary["imported"] + summary["refused"] == summary["offered"]
    assert n_done > 30


def test_names_of_columns_that_are_no_text_are_an_error(images: list[bytes], tmp_path: Path) -> None:
    for path, write in (
        (tmp_path / "a.arrow", stream),
        (tmp_path / "a.parquet", lambda path, rows: pq.write_table(rows, path, store_schema=False)),
    ):
        for name in (b"image", b"bytes", b"label"):
            write(path, table(images[:3], [0] * 3))
            path.write_bytes(path.read_bytes().replace(name, name[:2] + b"\xff" + name[3:]))
            with pytest.raises((ConfigError, DataError), match=path.name):
                run(path, tmp_path / "out")


@pytest.mark.parametrize("more", ["image.bytes", "label.x", "label"])
def test_columns_with_names_like_others_are_not_mixed_up(more: str, images: list[bytes], tmp_path: Path) -> None:
    rows = table(images[:3], [0, 1, 0]).append_column(more, pa.array([5, 6, 7]))
    pq.write_table(rows, tmp_path / "a.parquet")
    if more == "label":
        with pytest.raises(ConfigError, match="several columns of labels"):
            run(tmp_path / "a.parquet", tmp_path / "out")
        return
    found = samples(run(tmp_path / "a.parquet", tmp_path / "out"))
    assert [(one["png"], one["cls"]) for one in found.values()] == [
        (images[int(key)], b"010"[int(key) : int(key) + 1]) for key, one in found.items()
    ]


def test_a_disk_that_fails_is_no_damage(images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(images, [0] * 30), tmp_path / "a.parquet", row_group_size=10)
    batches = module.ParquetGroups.batches

    def failing(file: Any, group: int, *more: Any) -> Any:
        if group == 1:
            raise OSError(5, "Input/output error")
        return batches(file, group, *more)

    monkeypatch.setattr(module.ParquetGroups, "batches", failing)
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: .*Input/output error"):
        run(tmp_path / "a.parquet", tmp_path / "out")


# --- folders by `datasets` -----------------------------------------------------------------------------------------


def test_what_datasets_writes_is_read(images: list[bytes], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    pictures = [Image.open(io.BytesIO(data)) for data in images]
    made = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(30)]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    datasets.DatasetDict({"train": made, "test": made.select(range(4))}).save_to_disk(str(tmp_path / "both"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    one = run(tmp_path / "saved", tmp_path / "1")
    two = run(tmp_path / "both", tmp_path / "2", split="train")
    three = run(tmp_path / "a.parquet", tmp_path / "3")
    for result in (one, two, three):
        assert result.classes() == {"no": 0, "yes": 1}
        found = samples(result)
        assert [int(found[f"{i:08d}"]["cls"]) for i in range(30)] == [i % 2 for i in range(30)]
        for i, picture in enumerate(pictures):
            assert Image.open(io.BytesIO(found[f"{i:08d}"]["png"])).tobytes() == picture.tobytes()
    with pytest.raises(ConfigError, match="several splits: test, train"):
        run(tmp_path / "both", tmp_path / "4")


def stream(path: Path, rows: pa.Table, compression: str | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=10)


def test_arrow_files_that_could_expand_or_lie_are_refused(images: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    for compression in ("lz4", "zstd"):
        stream(path, table(images, [0] * 30), compression)
        with pytest.raises(ConfigError, match="is compressed"):
            run(path, tmp_path / "out")
    stream(path, table(images, ["a"] * 30).set_column(2, "label", pa.array(["a"] * 30).dictionary_encode()))
    with pytest.raises(ConfigError, match="has dictionaries"):
        run(path, tmp_path / "out")
    stream(path, table(images, [0] * 30))
    good = path.read_bytes()
    n_done = 0
    for i in range(200):
        place = (i * 7919) % len(good)
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << i % 8)]) + good[place + 1 :])
        try:
            summary = run(path, tmp_path / f"out{i}", max_refused_fraction=1, max_samples=1000).summary()
        except (ConfigError, DataError):
            continue
        n_done += 1
        assert summary["imported"] + summary["refused"] == summary["offered"]
    assert n_done > 30
    path.write_bytes(b"ARROW1\0\0" + good)
    with pytest.raises(DataError, match="is no stream of Arrow batches"):
        run(path, tmp_path / "out")


def test_names_of_samples_do_not_depend_on_the_place(images: list[bytes], tmp_path: Path) -> None:
    for folder in ("x", "y/z"):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(table(images, [0] * 30), tmp_path / folder / "a.parquet")
    one, two = run(tmp_path / "x/a.parquet", tmp_path / "1"), run(tmp_path / "y/z", tmp_path / "2")
    assert by_file(one) == by_file(two)
    assert one.digest == two.digest


@pytest.mark.parametrize("declared", [["zebra", "ant", "bee"], None])
def test_given_classes_go_by_name_whatever_the_metadata_number(
    declared: list[str] | None, images: list[bytes], tmp_path: Path
) -> None:
    names = ["zebra", "ant", "bee"]
    labels = [i % 3 if declared else names[i % 3] for i in range(30)]
    path = tmp_path / "a.parquet"
    pq.write_table(table(images, labels, declared, True), path)
    made = run(path, tmp_path / "out", classes=("bee", "owl", "zebra"), max_refused_fraction=0.5)
    assert made.classes() == {"bee": 0, "owl": 1, "zebra": 2}
    assert reasons(made) == {"class 'ant' is not in `classes`": 10}
    found = samples(made)
    assert {int(found[f"{i:08d}"]["cls"]) for i in range(0, 30, 3)} == {2}
    assert {int(found[f"{i:08d}"]["cls"]) for i in range(2, 30, 3)} == {0}
