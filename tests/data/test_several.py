"""Several pictures a sample (`index.image.member: all`): one row a picture in the index, whole samples in what counts
them, and a reason for each sample of which not every picture can be looked at."""

import hashlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import decode_pixels
from sanitize.data.index import IndexConfig, index_shard, index_shards
from sanitize.data.shuffle import first_rows
from sanitize.data.tables import sample_starts
from sanitize.errors import ConfigError, DataError

Members = list[tuple[str, bytes]]
Make = Callable[..., Any]


def config(**settings: Any) -> IndexConfig:
    given = {"image": {"member": "all"}, "max_bad_fraction": 1.0, "image_facts": True}
    return IndexConfig.model_validate(given | settings)


def sample(key: str, pictures: dict[str, bytes], label: bytes = b"0") -> Members:
    return [*((f"{key}.{suffix}", data) for suffix, data in pictures.items()), (f"{key}.cls", label)]


@pytest.fixture
def members(make_png: Make) -> Members:
    """Two pictures; one; three with a mask and other formats; a cut second one; none; no label; two equal ones."""
    jpeg = make_png(5, format="JPEG", size=(40, 40))
    return [
        *sample("a", {"left.png": make_png(0), "right.png": make_png(1)}),
        *sample("b", {"png": make_png(2)}, b"1"),
        *sample("c", {"0.jpg": make_png(3, format="JPEG"), "1.JPG": jpeg, "mask.png": make_png(4)}, b"2"),
        *sample("d", {"left.png": make_png(6), "right.jpg": jpeg[: len(jpeg) // 2]}),
        *sample("e", {"txt": b"no picture"}),
        *sample("f", {"left.png": make_png(7), "right.png": make_png(8)}, b"x"),
        *sample("g", {"left.png": make_png(9), "right.png": make_png(9)}, b"1"),
    ]


@pytest.fixture
def shard(members: Members, tmp_path: Path, make_tar: Make) -> str:
    return str(make_tar(tmp_path / "in/x.tar", members))


def indexed(places: Any, out: Path, **settings: Any) -> Dataset:
    return index_shards(config(**settings), places, str(out), Compute(device="cpu"))


WANTED = [
    (0, "a.left.png", "ok"),
    (0, "a.right.png", "ok"),
    (1, "b.png", "ok"),
    (2, "c.0.jpg", "ok"),
    (2, "c.1.JPG", "ok"),
    (2, "c.mask.png", "ok"),
    (3, "d.right.jpg", "unreadable"),
    (4, None, "unreadable"),
    (5, "f.left.png", "unreadable"),
    (6, "g.left.png", "ok"),
    (6, "g.right.png", "ok"),
]


def test_one_row_a_picture_and_one_for_an_unreadable_sample(shard: str, members: Members) -> None:
    table, summary = index_shard(shard, config())
    rows = table.to_pylist()
    assert [(row["sample"], row["image"], row["status"]) for row in rows] == WANTED
    assert [row["position"] for row in rows] == list(range(11))
    assert [row["label"] for row in rows] == [0, 0, 1, 2, 2, 2, 0, None, None, 1, 1]
    payloads = dict(members)
    for row in rows:
        if row["image"] is not None:
            assert row["sha256"] == hashlib.sha256(payloads[row["image"]]).hexdigest()
    assert summary["counts"] == {"samples": 7, "unreadable": 3, "pictures": 8}
    assert summary["formats"] == {"png": 8, "jpeg": 3}
    assert [row["reason"] for row in rows if row["status"] != "ok"] == [
        "'d.right.jpg': image data is damaged",
        "no image member beside 'txt, cls'",
        "label 'x' is not an integer: set index.classes=names if these are class names",
    ]


def test_the_members_of_a_sample_are_listed_once(shard: str, members: Members) -> None:
    table, _ = index_shard(shard, config())
    listed = table["members"].to_pylist()
    assert [(one["name"], one["size"]) for some in listed for one in some] == [(n, len(d)) for n, d in members]
    starts = sample_starts(table)
    assert starts.tolist() == [0, 2, 3, 6, 7, 8, 9]
    assert all(listed[i] for i in starts)


@pytest.mark.parametrize("check", ["digest", "headers"])
def test_less_deep_checks_list_the_same_pictures(shard: str, check: str) -> None:
    """They do not decode the cut picture, and the reader by columns is not used."""
    rows = index_shard(shard, config(check=check))[0].to_pylist()
    cut = [(3, "d.left.png", "ok"), (3, "d.right.jpg", "ok")]
    assert [(row["sample"], row["image"], row["status"]) for row in rows] == [*WANTED[:6], *cut, *WANTED[7:]]
    assert all((row["sha256"] is None) == (check == "headers" or row["image"] is None) for row in rows)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("odd", [False, True])
def test_batches_hold_every_picture_in_order(
    mode: str, odd: bool, members: Members, tmp_path: Path, make_tar: Make
) -> None:
    """By pieces of a plain archive, and sample by sample where the archive is compressed or has odd names."""
    name = "x.tar.gz" if mode == "w:gz" else "x.tar"
    place = make_tar(tmp_path / "in" / name, [("é" + n if odd else n, data) for n, data in members], mode)
    dataset = indexed(place, tmp_path / "index")
    assert (dataset.n_samples, dataset.counts(name), first_rows(dataset)) == (8, (4, 8), {name: 0})
    image, payloads = config().image, dict(members)
    for wanted in (None, {0, 4, 10}, {1}):
        rows = [i for i, (*_, status) in enumerate(WANTED) if status == "ok" and (wanted is None or i in wanted)]
        batches = list(dataset.batches(3, positions=None if wanted is None else {name: wanted}))
        assert [p for batch in batches for p in batch.positions_B.tolist()] == rows
        found = torch.cat([batch.images_BCHW for batch in batches])
        for i, image_CHW in zip(rows, found, strict=True):
            stored_HWC = decode_pixels(payloads[str(WANTED[i][1])], image, (6, 6))
            assert torch.equal(image_CHW.permute(1, 2, 0), torch.from_numpy(stored_HWC))


def test_facts_are_about_the_pictures_of_usable_samples(shard: str, tmp_path: Path) -> None:
    facts = indexed(shard, tmp_path / "index").facts("x.tar")
    assert facts is not None
    assert facts["position"].to_pylist() == [i for i, (*_, status) in enumerate(WANTED) if status == "ok"]


def test_what_reads_one_picture_a_sample_refuses_the_data_set(shard: str, tmp_path: Path) -> None:
    dataset = indexed(shard, tmp_path / "index")
    with pytest.raises(ConfigError, match=r"set index\.image\.member to its suffix, or to first"):
        dataset.samples("x.tar")
    with pytest.raises(ConfigError, match=r"index\.verify names the hash of one image"):
        config(verify="json:sha256")


def test_parts_made_apart_are_the_same_artifact(
    members: Members, tmp_path: Path, make_tar: Make, make_png: Make
) -> None:
    places = [make_tar(tmp_path / f"in/{name}.tar", members) for name in "ab"]
    places.append(make_tar(tmp_path / "in/c.tar", sample("z", {"png": make_png(3)})))
    whole, apart = indexed(places, tmp_path / "whole"), str(tmp_path / "apart")
    for shards in (["c.tar"], ["a.tar"], None):
        index_shards(config(), places[::-1], apart, Compute(device="cpu"), shards=shards)
    assert Dataset.load(apart).digest == whole.digest
    assert whole.manifest().counts == {"samples": 15, "unreadable": 6, "pictures": 17}
    assert first_rows(whole) == {"a.tar": 0, "b.tar": 8, "c.tar": 16}


def test_other_settings_leave_the_index_as_it_was(shard: str, tmp_path: Path) -> None:
    """`max_pictures` is in the recipe only where it counts."""
    out = str(tmp_path / "index")
    first = index_shards(
        IndexConfig.model_validate({"image": {"member": "first"}, "max_bad_fraction": 1}), shard, out, Compute()
    )
    assert "max_pictures" not in first.manifest().recipe.config
    assert "sample" not in first.rows("x.tar").column_names
    assert config(max_pictures=5).recipe()["max_pictures"] == 5


# --- hostile -----------------------------------------------------------------------------------------------------

N_MANY = 10_000
LARGE = {"max_members": 2 * N_MANY}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, make_tar: Make, make_png: Make) -> str:
    """A sample of ten thousand pictures between two ordinary ones."""
    pictures = {f"{i}.png": make_png(i % 7) for i in range(N_MANY)}
    two = {"left.png": make_png(0), "right.png": make_png(1)}
    members = [*sample("a", two), *sample("b", pictures), *sample("c", two, b"1")]
    return str(make_tar(tmp_path_factory.mktemp("many") / "x.tar", members))


def test_one_cut_picture_of_ten_thousand_makes_the_sample_unreadable(
    tmp_path: Path, make_tar: Make, make_png: Make
) -> None:
    """It is the last one: nothing that was learned of the others is kept."""
    pictures = {f"{i}.png": make_png(i % 7) for i in range(N_MANY)}
    pictures |= {f"{N_MANY}.jpg": make_png(1, format="JPEG", size=(40, 40))[:300]}
    place = make_tar(tmp_path / "in/x.tar", [*sample("a", pictures), *sample("b", {"png": make_png(8)})])
    dataset = indexed(place, tmp_path / "index", limits=LARGE, max_pictures=N_MANY + 1)
    rows = dataset.rows("x.tar").to_pylist()
    assert [(row["image"], row["status"]) for row in rows] == [(f"a.{N_MANY}.jpg", "unreadable"), ("b.png", "ok")]
    facts = dataset.facts("x.tar")
    assert facts is not None
    assert facts["position"].to_pylist() == [1]
    assert [batch.keys for batch in dataset.batches(8)] == [["b"]]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "more than max_members 100"),
        ({"limits": LARGE}, "10000 pictures, more than index.max_pictures=32"),
        ({"limits": LARGE, "max_pictures": N_MANY - 1}, "10000 pictures, more than index.max_pictures=9999"),
    ],
)
def test_a_sample_of_too_many_pictures_costs_one_row(many: str, settings: dict[str, Any], reason: str) -> None:
    rows = index_shard(many, config(**settings))[0].to_pylist()
    assert [(row["key"], row["status"]) for row in rows] == [
        ("a", "ok"),
        ("a", "ok"),
        ("b", "unreadable"),
        ("c", "ok"),
        ("c", "ok"),
    ]
    assert reason in rows[2]["reason"]


def test_ten_thousand_pictures_are_read_where_the_limits_say_so(many: str, tmp_path: Path) -> None:
    """In time and memory that grow with their number, not its square."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    dataset = indexed(many, tmp_path / "index", limits=LARGE, max_pictures=N_MANY)
    n = sum(len(batch.keys) for batch in dataset.batches(512))
    assert time.process_time() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
    assert n == N_MANY + 4
    assert dataset.manifest().counts == {"samples": 3, "unreadable": 0, "pictures": N_MANY + 4}


def test_too_many_unreadable_samples_are_counted_as_samples(make_png: Make, tmp_path: Path, make_tar: Make) -> None:
    """One bad sample of four is a quarter, though it is one row of ten."""
    good = {f"{i}.png": make_png(i) for i in range(3)}
    shards = make_tar(
        tmp_path / "in/x.tar",
        [member for key in "abc" for member in sample(key, good)] + sample("d", {"0.png": make_png(0), "1.png": b"no"}),
    )
    with pytest.raises(DataError, match="1 of 4 samples is unreadable"):
        indexed(shards, tmp_path / "index", max_bad_fraction=0.2)
    assert indexed(shards, tmp_path / "again", max_bad_fraction=0.25).n_samples == 9


@given(st.lists(st.integers(1, 4), max_size=12))
def test_starts_are_the_first_rows(counts: list[int]) -> None:
    numbers = [i for i, n in enumerate(counts) for _ in range(n)]
    starts = sample_starts(pa.table({"sample": pa.array(numbers, pa.int64())}))
    assert starts.tolist() == [sum(counts[:i]) for i in range(len(counts))]
