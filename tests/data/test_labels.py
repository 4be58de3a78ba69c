import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from flows.cli import app
from sanitize.compute import Compute
from sanitize.data import labels as module
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.labels import BadLabel, LabelReader, json_value, label_fields, notes_on, read_label
from sanitize.data.samples import Sample
from sanitize.data.stated_hashes import StatedHashes
from sanitize.errors import ConfigError, DataError

Make = Callable[..., Any]
NAMES = ["cat", "dog", "horse", "ship", "truck"]


def sample(key: str = "k", **members: bytes) -> Sample:
    return Sample(0, key, [(f"{key}.{name}", data) for name, data in members.items()], None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[0 0 1 0]", 2),
        ("[1, 0, 0]", 0),
        ("[0., 1., 0.]", 1),
        ("[\n 0 0\n 0 1]", 3),
        ("[0.9, 0.05, 0.05]", "3 soft labels"),
        ("[0, 1, 1, 0]", "4 numbers with 2 ones"),
        ("[0, 0, 0]", "3 numbers with 0 ones"),
        ("[0, 1]", "2 numbers with 1 ones"),  # or the classes 0 and 1
        ("[1]", "1 numbers with 1 ones"),
        ("[3]", "is not one class"),
        ("[[0, 1, 0]]", "is not one class"),
        ("[]", "is not one class"),
        ("[nan, 0, 1]", "not an integer"),
        ("3.0", "write 3"),
        ("3.5", "not an integer"),
        ("\ufeff3", "byte order mark"),
        ("cat", "set index.classes=names"),
        ("", "it is empty"),
    ],
)
def test_vectors_are_read_only_if_they_are_exactly_one_hot(text: str, wanted: int | str) -> None:
    for read in (
        lambda: read_label(sample(cls=text.encode()), "cls", 1000 if isinstance(wanted, str) else len(text.split())),
        lambda: LabelReader("cls").read(sample(cls=text.encode())),
    ):
        if isinstance(wanted, str):
            with pytest.raises(BadLabel, match=wanted):
                read()
    if isinstance(wanted, int):
        assert LabelReader("cls").read(sample(cls=text.encode())) == wanted


def test_a_vector_of_two_is_one_hot_only_where_there_are_two_classes() -> None:
    assert read_label(sample(cls=b"[0, 1]"), "cls", 2) == 1
    with pytest.raises(BadLabel, match=r"index.n_classes is 5"):
        read_label(sample(cls=b"[0, 0, 1]"), "cls", 5)
    with pytest.raises(BadLabel):
        LabelReader("cls").read(sample(cls=b"[" + b"0," * 2**18 + b"1]"))


def test_a_path_leads_through_nested_objects() -> None:
    record = {"a": {"b": {"c": 3}}, "x.y": 4}
    assert json_value(json.dumps(record).encode(), "a.b.c") == b"3"
    assert json_value(json.dumps(record).encode(), "x.y") == b"4"
    for text, field, reason in [
        ('{"a": {"b": 1}, "a.b": 2}', "a.b", "both a field and a path"),
        ('{"a": {"b": 1, "b": 2}}', "a.b", "has field 'b' twice"),
        ('{"a": {"b": 1}, "a": {"b": 2}}', "a.b", "has field 'a' twice"),
        ('{"a": [1]}', "a.0", "no field"),
        ("[1]", "a", "no field"),
        ('{"a": 1', "a", "not valid JSON"),
    ]:
        with pytest.raises(BadLabel, match=reason):
            json_value(text.encode(), field)


def test_likely_fields_are_found() -> None:
    record = {"url": "x", "width": 3, "annotation": {"class": {"id": 3, "name": "cat"}}, "label": 2, "a b": 1}
    assert label_fields(json.dumps(record).encode()) == [
        (False, "annotation.class.id"),
        (False, "label"),
        (True, "annotation.class.name"),
    ]
    assert label_fields(b"[" * 10_000) == label_fields(b"no") == label_fields(b"3") == []


# --- class names --------------------------------------------------------------------------------------------------


def named_shards(folder: Path, make_tar: Make, make_png: Make, of_shard: list[list[str]]) -> list[str]:
    return [
        make_tar(
            folder / f"{s}.tar",
            [
                member
                for i, name in enumerate(names)
                for member in ((f"{s}{i}.png", make_png(i)), (f"{s}{i}.txt", f" {name}\n".encode()))
            ],
        )
        for s, names in enumerate(of_shard)
    ]


def test_names_become_classes_whatever_the_order_of_the_shards(
    tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute
) -> None:
    of_shard = [["ship", "cat"], ["dog", "cat", "dog"], ["truck", "horse"], []]
    shards = named_shards(tmp_path / "in", make_tar, make_png, of_shard)
    config = IndexConfig(label="txt", classes="names")
    dataset = index_shards(config, shards, str(tmp_path / "a"), compute)
    assert dataset.info["classes"] == NAMES
    assert dataset.info["labels"] == {"0": 2, "1": 2, "2": 1, "3": 1, "4": 1}
    assert dataset.n_classes == 5
    found = [dataset.rows(f"{s}.tar", ["label"])["label"].to_pylist() for s in range(4)]
    assert found == [[NAMES.index(name) for name in names] for names in of_shard]
    assert [dataset.rows(f"{s}.tar")["label"].to_pylist() for s in range(4)] == found
    assert dataset.images()[1].tolist() == [label for labels in found for label in labels]
    for one in reversed([f"{s}.tar" for s in range(4)]):  # as workers do, in another order
        index_shards(config, shards[::-1], str(tmp_path / "b"), compute, shards=[one])
    assert index_shards(config, shards[::-1], str(tmp_path / "b"), compute).digest == dataset.digest
    assert Dataset.load(dataset.path).rows("1.tar").equals(dataset.rows("1.tar"))


def test_a_list_of_names_gives_their_order_and_refuses_others(
    tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute
) -> None:
    shards = named_shards(tmp_path / "in", make_tar, make_png, [["dog", "cat", "cow"]])
    for check in ("decode", "headers"):
        config = IndexConfig(label="txt", classes=("dog", "cat", "ship"), max_bad_fraction=1, check=check)
        dataset = index_shards(config, shards, str(tmp_path / check), compute)
        rows = dataset.rows("0.tar").to_pylist()
        assert [row["label"] for row in rows] == [0, 1, None]
        assert rows[2]["reason"] == "class name 'cow' is not in index.classes"
        assert (dataset.n_classes, dataset.info["classes"]) == (3, ["dog", "cat", "ship"])


def test_a_name_that_only_unreadable_samples_have_is_no_class(
    tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute
) -> None:
    members = [("a.png", b"no image"), ("a.txt", b"aaa"), ("b.png", make_png()), ("b.txt", b"bbb")]
    config = IndexConfig(label="txt", classes="names", max_bad_fraction=1)
    dataset = index_shards(config, make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    assert dataset.info["classes"] == ["bbb"]
    assert dataset.rows("x.tar")["label"].to_pylist() == [None, 0]


@pytest.mark.hostile
@pytest.mark.parametrize("name", [b"", b"\xff", b"x" * 201, b"a\x1b[2Jb", "a\u202eb".encode()])
def test_names_that_cannot_be_shown_are_refused(name: bytes) -> None:
    with pytest.raises(BadLabel, match="class name") as error:
        LabelReader("txt", classes="names").read(sample(txt=name))
    assert str(error.value).isprintable()


@pytest.mark.hostile
def test_captions_are_no_classes(
    tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sanitize.data.dataset_info.MAX_NAMES", 5)
    for i, of_shard in enumerate(([[f"caption {i}" for i in range(6)]], [["a", "b", "c"], ["d", "e", "f"]])):
        shards = named_shards(tmp_path / f"in{i}", make_tar, make_png, of_shard)
        with pytest.raises(DataError, match=r"more than 5 class names.*a caption or an id"):
            index_shards(IndexConfig(label="txt", classes="names"), shards, str(tmp_path / f"out{i}"), compute)


@pytest.mark.hostile
def test_more_names_than_classes_are_an_error_that_lists_them(
    tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute
) -> None:
    shards = named_shards(tmp_path / "in", make_tar, make_png, [["cat", "dog"], ["dgo"]])
    config = IndexConfig(label="txt", classes="names", n_classes=2)
    with pytest.raises(DataError, match=r"3 class names, more than index.n_classes=2: cat, dgo, dog"):
        index_shards(config, shards, str(tmp_path / "out"), compute)


@pytest.mark.parametrize("value", [None, float("nan"), 1.0, ["cat"], {"id": 1}, [0.1, 0.9]])
def test_what_is_no_name_in_json_is_no_class(value: object) -> None:
    reader = LabelReader("json:a", classes="names")
    with pytest.raises(BadLabel, match=r"label '.*' is no class name"):
        reader.read(sample(json=json.dumps({"a": value}).encode()))
    for name, wanted in (("null", "null"), (7, "7"), (True, "true"), ("1.0", "1.0")):
        assert reader.read(sample(json=json.dumps({"a": name}).encode())) == wanted


@pytest.mark.parametrize("text", ["[0.1 0.9]", "[0, 1, 1]", "[0 0 1]"])
def test_a_vector_is_no_class_name(text: str) -> None:
    with pytest.raises(BadLabel, match=r"is a vector, and index.classes is for class names"):
        LabelReader("cls", classes="names").read(sample(cls=text.encode()))


def test_names_that_may_mean_one_class_are_noted() -> None:
    assert notes_on({0: 5, 1: 5}, None, ["a b", "ab c", "-2", "2", "none"]) == []
    (note,) = notes_on({0: 5, 1: 5}, None, ["Cat", "cat", "caf\xe9", "cafe", "1.0", "01", "dog"])
    assert "'Cat', 'cat'; 'caf\xe9', 'cafe'; '1.0', '01'; each name" in note
    (note,) = notes_on({0: 5, 1: 5}, None, ["NaN", "dog", "-1"])
    assert "'NaN', '-1' looks like a missing label" in note


@pytest.mark.parametrize("classes", [[], ["a", "a"], "name"])
def test_wrong_lists_of_names_are_refused(classes: Any) -> None:
    with pytest.raises((ValidationError, ConfigError)):
        IndexConfig(classes=classes)
    with pytest.raises((ValidationError, ConfigError)):
        IndexConfig(classes=("a", "b"), n_classes=3)


# --- tables -------------------------------------------------------------------------------------------------------


def write_table(path: Path, rows: list[tuple[str, Any]], kind: str) -> str:
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("key", "note", "class"), *((key, "x", label) for key, label in rows)])
    else:
        pq.write_table(pa.table({"key": [k for k, _ in rows], "class": [label for _, label in rows]}), path)
    return f"table:{path}#class"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("check", ["decode", "headers"])
def test_labels_of_a_table_are_joined_by_key(
    kind: str, check: str, tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute
) -> None:
    keys = [f"d/{i:04d}" for i in range(8)]
    shard = make_tar(tmp_path / "x.tar", [(f"{key}.png", make_png(i)) for i, key in enumerate(keys)])
    rows = [(key, i % 3) for i, key in enumerate(keys[:6])] + [(keys[5], 1)]
    label = write_table(tmp_path / f"labels.{kind}", rows, kind)
    dataset = index_shards(
        IndexConfig(label=label, max_bad_fraction=1, check=check), shard, str(tmp_path / "out"), compute
    )
    found = dataset.rows("x.tar").to_pylist()
    assert [row["label"] for row in found[:5]] == [0, 1, 2, 0, 1]
    assert [row["reason"] for row in found[5:]] == [
        "key 'd/0005' has several rows in the table of labels",
        "key 'd/0006' is not in the table of labels",
        "key 'd/0007' is not in the table of labels",
    ]
    write_table(tmp_path / f"labels.{kind}", [*rows, ("other", 1)], kind)
    config = IndexConfig(label=label, max_bad_fraction=1, check=check)
    assert index_shards(config, shard, str(tmp_path / "again"), compute).digest != dataset.digest


def test_names_may_be_in_a_table(tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute) -> None:
    shard = make_tar(tmp_path / "x.tar", [(f"{i:04d}.png", make_png(i)) for i in range(4)])
    label = write_table(tmp_path / "l.csv", [(f"{i:04d}", NAMES[i % 2]) for i in range(4)], "csv")
    dataset = index_shards(IndexConfig(label=label, classes="names"), shard, str(tmp_path / "out"), compute)
    assert dataset.images()[1].tolist() == [0, 1, 0, 1]
    assert dataset.info["classes"] == ["cat", "dog"]


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"key,other\na,1\n", "one column 'key' and one column 'class'; it has key, other"),
        (b"key,class,class\na,1,1\n", "one column"),
        (b"", "it has"),
        (b"key,class\na\n", "1 cells in row 2"),
        (b"key,class\n\xff,1\n", "is not UTF-8 .byte 10.: save it as UTF-8"),
        (b'key,class\n"a,1\n', "cannot be read"),
        (b"PAR1 and so on", "cannot be read"),
        (b"key,class," + b"x," * 1_000 + b"\n", "columns, more than 1000"),
        (b"key,class\n" + b"a,1\n" * 60, "more than 50 rows"),
        (b"key,class\n" + b"a" * 200_000 + b",1\n", "cannot be read"),
        (b"key,class\n" + b"a,1\n" * 300_000, "bytes, more than"),
    ],
)
@pytest.mark.parametrize("reader", [LabelReader, StatedHashes])
def test_hostile_tables_are_refused_in_one_line(
    reader: Callable[[str], object], data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_ROWS", 50)
    monkeypatch.setattr(module, "_MAX_TABLE_BYTES", 1_000_000)
    (tmp_path / "t").write_bytes(data)
    with pytest.raises((ConfigError, DataError), match=message) as error:
        reader(f"table:{tmp_path}/t#class")
    assert "\n" not in str(error.value)


@pytest.mark.hostile
@pytest.mark.parametrize("reader", [LabelReader, StatedHashes])
def test_a_parquet_table_does_not_unpack_without_limit(
    reader: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": ["a" * 1000] * 20_000, "class": [1] * 20_000}), sink, compression="zstd")
    (tmp_path / "t").write_bytes(sink.getvalue())
    assert len(sink.getvalue()) < 100_000
    monkeypatch.setattr(module, "_MAX_UNPACKED_BYTES", 10_000_000)
    with pytest.raises(ConfigError, match="unpacks to more than"):
        reader(f"table:{tmp_path}/t#class")
    pq.write_table(pa.table({"key": [["a"]], "class": [1]}), tmp_path / "t")
    with pytest.raises(ConfigError, match="not integers or texts"):
        reader(f"table:{tmp_path}/t#class")


# --- what is odd --------------------------------------------------------------------------------------------------


def test_one_based_labels_and_gaps_are_said_once() -> None:
    assert notes_on({0: 5, 1: 5}, None, None) == []
    (note,) = notes_on(dict.fromkeys(range(1, 11), 5), None, None)
    assert note.startswith("class 0 has no samples")
    (note,) = notes_on({0: 5, 7: 5}, 10, None)
    assert note.startswith("8 of 10 classes have no samples")
    assert notes_on({0: 5}, None, ["cat", "dog"]) == []


def test_too_many_classes_name_the_setting_and_not_the_limit_on_bad_samples(
    tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute
) -> None:
    labels = np.random.default_rng(0).integers(0, 21_841, 40)
    members = [m for i, c in enumerate(labels) for m in ((f"{i}.png", make_png(i)), (f"{i}.cls", b"%d" % c))]
    shard = make_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError) as error:
        index_shards(IndexConfig(), shard, str(tmp_path / "out"), compute)
    assert f"set index.n_classes={labels.max() + 1}" in str(error.value)
    assert "raise max_bad_fraction" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_json_member_may_have_a_compound_suffix() -> None:
    reader = LabelReader(IndexConfig(label="meta.json:a.b").label)
    assert reader.read(sample(**{"meta.json": b'{"a": {"b": 3}}', "json": b'{"a": {"b": 4}}'})) == 3
    with pytest.raises(BadLabel, match=r"no .json member, but 'meta.json': set index.label"):
        LabelReader("json:a.b").read(sample(**{"png": b"", "meta.json": b'{"a": {"b": 3}}'}))
    with pytest.raises(ValidationError, match="no place of a label"):
        IndexConfig(label="cls:a")


def test_a_table_of_excel_is_read_like_others(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\ufeffkey;class\r\na;3\r\n".encode())
    assert LabelReader(f"table:{tmp_path}/t.csv#class").read(sample("a")) == 3


def test_a_row_without_a_label_counts_as_a_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a", "b", "b"], "class": [None, None, 3]}), tmp_path / "t.parquet")
    reader = LabelReader(f"table:{tmp_path}/t.parquet#class")
    with pytest.raises(BadLabel, match="it is empty"):
        reader.read(sample("a"))
    with pytest.raises(BadLabel, match="has several rows"):
        reader.read(sample("b"))


def test_a_table_labels_no_key_that_is_in_two_shards(
    tmp_path: Path, make_tar: Make, make_png: Make, compute: Compute
) -> None:
    """Keys that begin again in each shard would get the labels of the first."""
    (tmp_path / "t.csv").write_text("key,class\n0,0\n1,1\n2,0\n3,1\n")
    config = IndexConfig(label=f"table:{tmp_path}/t.csv#class")

    def shard(name: str, *numbers: int) -> str:
        return make_tar(tmp_path / name, [(f"{i}.png", make_png(len(name) + i)) for i in numbers])

    apart = [shard("a.tar", 0, 1), shard("b.tar", 2, 3)]
    assert index_shards(config, apart, str(tmp_path / "apart"), compute).n_samples == 4
    with pytest.raises(DataError, match=r"2 keys are in several shards, such as a.tar and c.tar: the table of labels"):
        index_shards(config, [*apart, shard("c.tar", 0, 1)], str(tmp_path / "shared"), compute)
    result = CliRunner().invoke(app, ["inspect", *apart, str(tmp_path / "c.tar"), "--label", str(config.label)])
    assert result.exit_code == 1
    assert "2 keys are in several shards" in result.output
