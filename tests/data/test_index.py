import bz2
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from sanitize.artifacts import verify
from sanitize.compute import Compute
from sanitize.data.bad_data import bad_shards
from sanitize.data.dataset import Dataset
from sanitize.data.dataset_info import common_size
from sanitize.data.decode import ImageConfig, resized
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.rows import plain_rows, read_rows
from sanitize.data.samples import Sample, SampleLimits, ShardReader
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.errors import ArtifactError, ConfigError, DataError

Make = Callable[..., str]
ANYTHING = IndexConfig(max_bad_fraction=1)


def rows_of(dataset: Dataset) -> list[dict]:
    return [row | {"shard": shard} for shard in dataset.shards for row in dataset.rows(shard).to_pylist()]


def bad(dataset: Dataset) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in rows_of(dataset) if row["status"] != "ok"}


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.hostile
def test_every_bad_sample_is_a_row_with_its_reason_and_the_others_survive(
    tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], good: Callable[..., list], compute: Compute
) -> None:
    png = make_png()
    wanted = {
        "noimage": ([("noimage.cls", b"1")], "no image member"),
        "two": ([("two.png", png), ("two.jpg", png), ("two.cls", b"1")], "2 image members"),
        "nolabel": ([("nolabel.png", png)], "no .cls member"),
        "word": ([("word.png", png), ("word.cls", b"cat")], "label 'cat' is not an integer"),
        "minus": ([("minus.png", png), ("minus.cls", b"-1")], "label -1 is not in 0..4"),
        "high": ([("high.png", png), ("high.cls", b"5")], "label 5 is not in 0..4"),
        "huge": ([("huge.png", png), ("huge.cls", b"1" + b"0" * 400)], "is not an integer"),
        "text": ([("text.png", b"no image"), ("text.cls", b"1")], "not a jpeg, png, webp, ppm"),
        "void": ([("void.png", b""), ("void.cls", b"1")], "image is empty"),
        "half": ([("half.png", png[: len(png) // 2]), ("half.cls", b"1")], "damaged"),
        "link": ([("link.png", png), link("link.cls")], "no regular file"),
        "../up": ([("../up.png", png), ("../up.cls", b"1")], "unsafe member name"),
        "same": ([("same.png", png), ("same.png", png), ("same.cls", b"1")], "occurs twice"),
        "fat": ([("fat.png", png), ("fat.cls", b"1"), ("fat.raw", bytes(20_000))], "larger than max_sample_bytes"),
        "many": ([("many.png", png), *((f"many.{i}", b"") for i in range(20))], "more than max_members"),
        "good0000": ([("good0000.png", png), ("good0000.cls", b"1")], "occurs a second time"),
    }
    members = good(4, n_classes=5)
    for one, _ in wanted.values():
        members += one
    members += good(4, "last", 5)
    config = IndexConfig(n_classes=5, limits=SampleLimits(max_sample_bytes=20_000, max_members=10), max_bad_fraction=1)
    dataset = index_shards(config, make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    reasons = bad(dataset)
    assert set(reasons) == set(wanted)
    for key, (_, reason) in wanted.items():
        assert reason in reasons[key], key
    ok = [row["key"] for row in rows_of(dataset) if row["status"] == "ok"]
    assert ok == [f"{p}{i:04d}" for p in ("good", "last") for i in range(4)]
    assert dataset.manifest().counts == {"samples": 8 + len(wanted), "unreadable": len(wanted)}
    assert sum(dataset.info["unreadable"].values()) == len(wanted)
    assert dataset.n_samples == 8
    assert [row["position"] for row in rows_of(dataset)] == list(range(8 + len(wanted)))


def test_rows_say_what_is_in_a_sample(
    tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], compute: Compute
) -> None:
    import hashlib

    png, raw = make_png(3, size=(5, 7)), b"caf\xe9".decode("utf-8", "surrogateescape")
    members = [(f"{raw}.txt", b"hello"), (f"{raw}.png", png), (f"{raw}.cls", b"2\n")]
    dataset = index_shards(IndexConfig(), make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    (row,) = rows_of(dataset)
    assert row == {
        "shard": "x.tar",
        "position": 0,
        "key": "caf\\xe9",
        "status": "ok",
        "reason": None,
        "label": 2,
        "height": 5,
        "width": 7,
        "image": "caf\\xe9.png",
        "sha256": hashlib.sha256(png).hexdigest(),
        "start": 0,
        "end": 6 * 512,
        "members": [
            {"name": "caf\\xe9.txt", "size": 5},
            {"name": "caf\\xe9.png", "size": len(png)},
            {"name": "caf\\xe9.cls", "size": 2},
        ],
    }
    assert dataset.n_classes == 3
    assert dataset.image_shape == (3, 5, 7)
    assert dataset.info["labels"] == {"2": 1}


@pytest.mark.parametrize(
    ("sizes", "max_side", "wanted"),
    [
        ({(28, 28): 9, (5, 5): 1}, 64, (28, 28)),  # never scaled up
        ({(333, 500): 9, (500, 333): 2}, 64, (43, 64)),
        ({(333, 500): 9, (500, 333): 2}, None, (333, 500)),
        ({(100, 200): 2, (300, 100): 2, (120, 180): 2}, 60, (40, 60)),  # medians 120 and 180
        ({(1, 1_000): 1}, 64, (1, 64)),
    ],
)
def test_the_size_at_which_images_of_several_sizes_are_read(
    sizes: dict[tuple[int, int], int], max_side: int | None, wanted: tuple[int, int]
) -> None:
    for order in (sizes, dict(reversed(sizes.items()))):
        assert common_size(order, max_side) == wanted


def test_photographs_of_several_sizes_are_read_whole(
    tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], compute: Compute
) -> None:
    members = []
    for i, size in enumerate([(80, 120), (120, 80), (90, 90), (200, 40)]):
        members += [(f"{i}.png", make_png(i, size)), (f"{i}.cls", b"0")]
    config = IndexConfig(image=ImageConfig(max_side=32, crop=False))
    dataset = index_shards(config, make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    assert max(dataset.image_shape[1:]) == 32
    (batch,) = dataset.batches(10)
    for (_, data), image_CHW in zip(members[::2], batch.images_BCHW, strict=True):
        whole = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
        assert torch.equal(image_CHW, resized(whole, dataset.image_shape[1:]))


def test_labels_from_json_and_the_most_common_size(
    tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], compute: Compute
) -> None:
    members = []
    for i, size in enumerate([(4, 4), (8, 8), (8, 8), (6, 6)]):
        members += [(f"{i}.png", make_png(i, size)), (f"{i}.json", b'{"y": %d, "z": "x"}' % i)]
    config = IndexConfig(label="json:y", image=ImageConfig(channels=1))
    dataset = index_shards(config, make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    assert [row["label"] for row in rows_of(dataset)] == [0, 1, 2, 3]
    assert dataset.image_shape == (1, 8, 8)
    assert all(batch.images_BCHW.shape[1:] == (1, 8, 8) for batch in dataset.batches(3))


def test_without_n_classes_one_hostile_label_does_not_size_the_model(
    tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], good: Callable[..., list], compute: Compute
) -> None:
    members = [*good(4, n_classes=3), ("x.png", make_png()), ("x.cls", b"1000000")]
    dataset = index_shards(ANYTHING, make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    assert dataset.n_classes == 3
    assert list(bad(dataset)) == ["x"]


# --- too much -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_bad", "stops"), [(0, False), (1, False), (2, True)])
def test_more_bad_samples_than_allowed_stop_the_run_and_the_message_says_why(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute, n_bad: int, stops: bool
) -> None:
    members = [*good(20 - n_bad), *((f"bad{i}.cls", b"0") for i in range(n_bad))]
    path, out = make_tar(tmp_path / "x.tar", members), tmp_path / "out"
    if not stops:
        assert index_shards(IndexConfig(max_bad_fraction=0.05), path, str(out), compute).n_samples == 20 - n_bad
        return
    with pytest.raises(DataError, match=r"2 of 20 .*max_bad_fraction=0.05.*2 x no image member"):
        index_shards(IndexConfig(max_bad_fraction=0.05), path, str(out), compute)
    assert not out.exists()


@pytest.mark.parametrize("content", ["nothing", "only bad", "garbage"])
def test_no_usable_sample_is_an_error_even_where_all_may_be_bad(
    tmp_path: Path, make_tar: Make, compute: Compute, content: str
) -> None:
    members = [("a.cls", b"1")] if content == "only bad" else []
    path = make_tar(tmp_path / "x.tar", members)
    if content == "garbage":
        Path(path).write_bytes(b"this is no tar archive" * 100)
    with pytest.raises(DataError, match="no usable sample"):
        index_shards(ANYTHING, path, str(tmp_path / "out"), compute)


@pytest.mark.hostile
def test_a_shard_of_which_nothing_can_be_read_stops_the_run_unless_that_is_allowed(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute
) -> None:
    for name in ("a.tar", "b.tar", "c.tar"):
        make_tar(tmp_path / "in" / name, good(5))
    make_tar(tmp_path / "in/empty.tar", [])  # an archive without samples: nothing was lost
    for name, content in (("b.tar", b"no archive" * 100), ("c.tar", b"LZIP" + bytes(9))):
        (tmp_path / "in" / name).write_bytes(content)
    said = (
        r"2 of 4 shards could not be read, more than max_bad_shards=[01]: b\.tar \(bad.*c\.tar \(lzip compressed: not"
    )
    for n in (0, 1):
        with pytest.raises(DataError, match=said):
            index_shards(IndexConfig(max_bad_shards=n), str(tmp_path / "in"), str(tmp_path / f"out{n}"), compute)
        assert not (tmp_path / f"out{n}").exists()
    dataset = index_shards(IndexConfig(max_bad_shards=2), str(tmp_path / "in"), str(tmp_path / "out"), compute)
    assert dataset.n_samples == 5
    assert list(bad_shards(dataset.info["shards"])) == ["b.tar", "c.tar"]


@pytest.mark.hostile
def test_an_archive_that_is_not_read_stops_the_run_before_anything_is_read(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute
) -> None:
    plain = Path(make_tar(tmp_path / "in/a.tar", good(5))).read_bytes()
    (tmp_path / "in/b.tar.LZMA").write_bytes(lzma.compress(plain, lzma.FORMAT_ALONE))
    with pytest.raises(
        DataError, match=r"1 of 2 shards .*b\.tar\.LZMA \(lzma compressed: not read; repack it as \.tar"
    ):
        index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "out"), compute, shards=["a.tar"])
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("check", ["decode", "digest", "headers"])
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.tar", gzip.compress),
        ("x.TAR", lzma.compress),
        ("x.tar.gz", bytes),
        ("x.TGZ", bz2.compress),
        ("x.tar.zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
        ("x.tar.xz", bytes),
        ("x.TBZ", lzma.compress),
    ],
)
def test_a_name_that_says_the_wrong_compression_changes_nothing(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute, name: str, pack: Any, check: Any
) -> None:
    config = IndexConfig(check=check, image=ImageConfig(size=(4, 4)))
    path = Path(make_tar(tmp_path / "x.tar", good(9)))
    right = index_shards(config, str(path), str(tmp_path / "right"), compute)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(pack(path.read_bytes()))
    other = index_shards(config, str(tmp_path / "in"), str(tmp_path / "other"), compute)
    assert other.info["shards"][name]["damage"] is None
    assert other.rows(name).equals(right.rows("x.tar"))
    batches = [list(dataset.batches(4)) for dataset in (right, other)]
    assert [batch.keys for batch in batches[0]] == [batch.keys for batch in batches[1]]
    assert all(a.images_BCHW.equal(b.images_BCHW) for a, b in zip(*batches, strict=True))


@pytest.mark.hostile
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("check", ["decode", "headers"])
def test_what_lies_behind_the_damage_counts_as_bad(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute, pack: Any, check: Any
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 40_000), dtype=np.uint8)  # does not compress
    members = [m for i, m in enumerate(good(50)) for m in ([m] if i % 2 else [m, (f"{m[0].split('.')[0]}.bin", b"")])]
    members = [
        (name, noise[i // 3].tobytes() if name.endswith("bin") else data) for i, (name, data) in enumerate(members)
    ]
    plain = Path(make_tar(tmp_path / "x.tar", members)).read_bytes()
    half = len(plain) // 2 // 512 * 512
    (tmp_path / "x.tar").write_bytes(pack(plain[:half] + b"\xa5" * 512 + plain[half:]))
    for fraction in (0.4, 0.6):
        config = IndexConfig(check=check, max_bad_fraction=fraction)
        if fraction < 0.5:
            with pytest.raises(DataError, match=r"2\d x behind damage in a shard \(about\)"):
                index_shards(config, str(tmp_path / "x.tar"), str(tmp_path / f"{fraction}"), compute)
        else:
            index_shards(config, str(tmp_path / "x.tar"), str(tmp_path / f"{fraction}"), compute)


@pytest.mark.hostile
@pytest.mark.parametrize("check", ["decode", "headers"])
def test_an_archive_joined_to_another_counts_as_bad(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute, check: Any
) -> None:
    """`cat a.tar b.tar`: readers stop at the end of the first, and half of the samples would be lost in silence."""
    path, more = (Path(make_tar(tmp_path / f"{name}.tar", good(40, name))) for name in ("x", "y"))
    path.write_bytes(path.read_bytes() + bytes(20 * 512) + more.read_bytes())
    config = IndexConfig(check=check)
    with pytest.raises(DataError, match=r"\d\d x behind damage in a shard \(about\)"):
        index_shards(config, str(path), str(tmp_path / "out"), compute)
    path.write_bytes(path.read_bytes()[: -more.stat().st_size] + bytes(1000) + b"garbage")
    assert index_shards(config, str(path), str(tmp_path / "out"), compute).n_samples == 40


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "train/"])
@pytest.mark.parametrize("check", ["decode", "headers"])
def test_archives_made_on_a_mac_are_read_without_the_files_of_macos(
    tmp_path: Path,
    make_tar: Make,
    good: Callable[..., list],
    compute: Compute,
    read_tar: Callable,
    folder: str,
    check: Any,
    form: int,
) -> None:
    members = [(f"{folder}{name}", data) for name, data in good(30)]
    beside = [(f"{folder}._{name.rpartition('/')[2]}", b"\0\5\x16\7\0\2\0\0Mac OS X") for name, _ in members]
    both = [(f"{folder}.DS_Store", b"?"), *(m for pair in zip(beside, members, strict=True) for m in pair)]
    make_tar(tmp_path / "x.tar", both, "w", form)
    image = {"image": {"size": (8, 8)}}
    dataset = index_shards(IndexConfig(check=check, **image), str(tmp_path / "x.tar"), str(tmp_path / "out"), compute)
    assert (dataset.n_samples, dataset.manifest().counts["unreadable"]) == (30, 0)
    assert dataset.info["notes"] == ["61 files of macOS (._NAME, .DS_Store) belong to no sample and are left out"]
    found = [member for sample, _ in dataset.samples("x.tar") for member in sample.members]
    assert found == members
    assert sum(len(batch.keys) for batch in dataset.batches(7)) == 30


def test_a_damaged_shard_keeps_what_was_read_whole_and_is_named(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute
) -> None:
    make_tar(tmp_path / "in/a.tar", good(5))
    path = Path(make_tar(tmp_path / "in/b.tar", good(5)))
    data = path.read_bytes()
    path.write_bytes(data[: 512 * 4 * 3 + 100])  # three samples of four blocks, and a piece of a header
    dataset = index_shards(IndexConfig(max_bad_fraction=0.2), str(tmp_path / "in"), str(tmp_path / "out"), compute)
    assert dataset.info["shards"]["a.tar"]["damage"] is None
    assert "truncated" in dataset.info["shards"]["b.tar"]["damage"]
    rows = [row for row in rows_of(dataset) if row["shard"] == "b.tar"]
    assert [row["status"] for row in rows] == ["ok", "ok", "unreadable"]
    assert "damaged" in rows[-1]["reason"]


def test_no_shards_is_a_config_error(tmp_path: Path, compute: Compute) -> None:
    with pytest.raises(ConfigError, match="no shards"):
        index_shards(IndexConfig(), str(tmp_path), str(tmp_path / "out"), compute)


# --- reproducible -----------------------------------------------------------------------------------------------


def test_the_order_place_and_grouping_of_shards_do_not_matter(
    tmp_path: Path, digits: Digits, dataset: Dataset, compute: Compute
) -> None:
    shards = digits.shards()[:4]
    again = index_shards(IndexConfig(), shards[::-1], str(tmp_path / "reversed"), compute)
    for shard in shards:
        (tmp_path / "moved").mkdir(exist_ok=True)
        shutil.copy(shard, tmp_path / "moved")
    moved = index_shards(IndexConfig(), str(tmp_path / "moved"), str(tmp_path / "of_moved"), compute)
    names = [Path(shard).name for shard in shards]
    for name in names[::-1]:
        part = index_shards(IndexConfig(), shards, str(tmp_path / "grouped"), compute, shards=[name])
        assert part.digest == ""
    grouped = index_shards(IndexConfig(), shards, str(tmp_path / "grouped"), compute)
    assert {again.digest, moved.digest, grouped.digest} == {dataset.digest}
    assert verify(Path(grouped.path)) == []


def test_the_same_base_name_in_two_folders_stays_two_shards(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute
) -> None:
    for folder in ("a", "b"):
        make_tar(tmp_path / "in" / folder / "0.tar", good(3, prefix=folder))
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "out"), compute)
    assert dataset.shards == ["a/0.tar", "b/0.tar"]
    assert [batch.keys[0] for batch in dataset.batches(8)] == ["a0000", "b0000"]


def test_a_shard_that_changes_is_noticed(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute
) -> None:
    path = tmp_path / "x.tar"
    make_tar(path, good(3))
    dataset = index_shards(IndexConfig(), str(path), str(tmp_path / "out"), compute)
    make_tar(path, good(4))
    with pytest.raises(ArtifactError, match=r"x\.tar has changed"):
        index_shards(IndexConfig(), str(path), str(tmp_path / "out"), compute)
    with pytest.raises(DataError, match=r"x\.tar has changed"):
        list(dataset.batches(8))


@pytest.mark.parametrize("check", ["headers", "digest", "decode"])
def test_a_shard_that_changes_after_its_fingerprint_was_taken_is_named(
    check: Any, tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute
) -> None:
    config, path, out = IndexConfig(check=check), tmp_path / "x.tar", str(tmp_path / "out")
    make_tar(path, good(3))
    found = fingerprint_shards(find_shards(str(path)))
    make_tar(path, good(40))
    dataset = index_shards(config, found, out, compute)
    if check == "headers":  # nothing was hashed
        with pytest.raises(DataError, match=r"x\.tar has changed since it was indexed"):
            list(dataset.samples("x.tar"))
    else:
        assert len(list(dataset.samples("x.tar"))) == 40
    with pytest.raises(ArtifactError, match=r"x\.tar has changed since .* was made from it"):
        index_shards(config, str(path), out, compute)


def test_remote_shards_are_indexed_and_read(digits: Digits, dataset: Dataset, tmp_path: Path, compute: Compute) -> None:
    import fsspec

    for shard in digits.shards()[:4]:
        with fsspec.open(f"memory://index-test/{Path(shard).name}", "wb") as file:
            file.write(Path(shard).read_bytes())
    remote = index_shards(IndexConfig(), "memory://index-test", str(tmp_path / "out"), compute)
    assert remote.digest == dataset.digest
    ours, theirs = next(remote.batches(50)), next(dataset.batches(50))
    assert ours.images_BCHW.equal(theirs.images_BCHW)


@pytest.mark.parametrize(
    "wrong",
    [{"label": ""}, {"label": "a:b"}, {"label": "json:"}, {"n_classes": 0}, {"max_bad_fraction": 1.5}, {"labels": "x"}],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        IndexConfig(**wrong)


@pytest.mark.parametrize("label", ["cls", "json:y"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_headers_and_digests_give_the_rows_of_decoding_less_what_only_decoding_knows(
    tmp_path: Path, make_tar: Make, good: Callable[..., list], compute: Compute, label: str, form: int
) -> None:
    """Rows come by columns where all is plain, and through the strict reader where one name is not."""
    bad = [("a.cls", b"1"), ("b.png", b"?"), ("c.png", b"?"), ("c.cls", b"x"), ("d.PNG", b"?"), ("d.cls", b" 3\n")]
    bad += [("e.png", b"?"), ("e.cls", b"007"), ("f.png", b"?"), ("f.cls", b"9" * 30), ("g.png", b"?"), ("g.cls", b"")]
    bad += [("h.png", b"?"), ("h.jpg", b"?"), ("h.cls", b"1"), ("i.png", b"?"), ("i.cls", b"-1")]
    if label != "cls":
        bad = [(name.replace(".cls", ".json"), b'{"y": %s}' % (data or b"null")) for name, data in bad]
    members = [*good(300), *bad, *good(20, "z")]
    if label != "cls":
        members = [(n.replace(".cls", ".json"), b'{"y": %s}' % d if n.endswith(".cls") else d) for n, d in members]
    make_tar(tmp_path / "in" / "plain.tar", members, "w", form)
    make_tar(tmp_path / "in" / "odd.tar", [*members, ("é.png", b"?"), ("é.txt", b"")], "w", form)
    make_tar(tmp_path / "in" / "small.tar.gz", members, "w:gz", form)
    found = {}
    for check in ("decode", "digest", "headers"):
        config = ANYTHING.model_copy(update={"check": check, "label": label, "n_classes": 10})
        rows = rows_of(index_shards(config, str(tmp_path / "in"), str(tmp_path / check), compute))
        found[check] = rows
    for decoded, digested, headers in zip(*found.values(), strict=True):
        assert headers == digested | {"sha256": None}
        if decoded["status"] == "ok":
            assert digested == decoded | {"height": None, "width": None}
        else:
            assert digested["status"] == "ok" or digested["reason"] == decoded["reason"]
    counts = [sum(row["status"] == "ok" for row in rows) for rows in found.values()]
    assert counts[0] == 3 * 320
    # d and e: a label, and an image that was not checked; but 007 is no JSON.
    assert counts[1] == counts[2] == 3 * (320 + (2 if label == "cls" else 1))


usual_parts = st.sampled_from(["a", "b", "A", "d"])
odd_parts = st.sampled_from(["a.png", "b.cls", ".", "", "a b", "é", "e\u0301"])


@pytest.mark.hostile
@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(usual_parts | odd_parts, max_size=2), usual_parts, st.lists(st.sampled_from(["png", "cls"]))
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 3000),
)
def test_by_columns_or_one_by_one_the_same_keys_are_refused(
    samples: list[tuple[list[str], str, list[str]]], max_listing_bytes: int
) -> None:
    """For any names: rows by columns are the rows of the strict reader, or None."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"{folder}/x.tar"
        with tarfile.open(url, "w") as tar:
            for folders, key, suffixes in samples:
                for suffix in suffixes:
                    info = tarfile.TarInfo("/".join([*folders, f"{key}.{suffix}"]))
                    info.size = 1
                    tar.addfile(info, io.BytesIO(b"1"))
        for limits in (SampleLimits(), SampleLimits(max_listing_bytes=max_listing_bytes)):
            found = plain_rows(url, limits, "cls", 10, judge_nothing, lambda _: None)
            if found is not None:
                strict = read_rows(ShardReader(url, limits, "cls", digest=False), judge_nothing, lambda _: None)
                assert strict.damage is None
                assert found.table.select(["key", "start", "end", "members"]).equals(
                    strict.table.select(["key", "start", "end", "members"])
                )
                assert strict.table["reason"].null_count == len(strict.table)


def judge_nothing(sample: Sample, _position: int) -> list[dict[str, Any]]:
    """Only the findings of the reader itself."""
    return [{"status": "ok"} if sample.problem is None else {"status": "unreadable", "reason": sample.problem}]


@pytest.mark.parametrize("member", [None, "left.jpg", "png", "first", "LEFT.JPG"])
def test_both_readers_choose_the_same_image(
    member: str | None, tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], compute: Compute
) -> None:
    """Samples with one picture, two, none, in other formats, with compound suffixes and odd labels."""
    rng = np.random.default_rng(0)
    suffixes = ["left.jpg", "left.png", "right.jpg", "png", "jpg", "txt", "seg.png"]
    members = [
        (f"s{i:03d}.{suffix}", make_png(i))
        for i in range(60)
        for suffix in rng.choice(suffixes, rng.integers(1, 4), replace=False)
    ]
    members += [(f"s{i:03d}.cls", b"x" if i % 7 == 0 else b"1") for i in range(60)]
    shard = make_tar(tmp_path / "x.tar", sorted(members))
    tables = []
    for check in ("headers", "digest"):
        config = IndexConfig(check=check, max_bad_fraction=1, n_classes=2, image=ImageConfig(member=member))
        dataset = index_shards(config, shard, str(tmp_path / f"out-{check}"), compute)
        tables.append(dataset.rows("x.tar").select(["key", "status", "reason", "image", "label", "start"]))
    assert tables[0].equals(tables[1])
    assert 0 < dataset.n_samples < 60


def test_the_named_picture_is_the_one_that_is_read(
    tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], compute: Compute
) -> None:
    left, right = make_png(1, size=(4, 6)), make_png(2, size=(4, 6))
    members = [("a.left.png", left), ("a.right.png", right), ("a.output.cls", b"1")]
    for i, (member, png) in enumerate({"left.png": left, "right.jpg": right, "first": left}.items()):
        config = IndexConfig(label="output.cls", image=ImageConfig(member=member))
        dataset = index_shards(config, make_tar(tmp_path / "x.tar", members), str(tmp_path / str(i)), compute)
        images_NCHW, labels_N = dataset.images()
        wanted = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        assert np.array_equal(images_NCHW[0].permute(1, 2, 0).numpy(), wanted)
        assert labels_N.tolist() == [1]
