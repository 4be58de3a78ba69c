"""Class folders."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import features
from pydantic import ValidationError

from sanitize.errors import ConfigError, DataError
from sanitize.importing import ImportConfig, Imported
from sanitize.importing.source import listed_classes
from tests.importing.imported import by_file, reasons, run, samples


def test_images_are_copied_with_label_and_class_name(
    write: Callable[..., Path], photos: dict[str, bytes], tmp_path: Path
) -> None:
    made = run(write(photos), tmp_path / "out", samples_per_shard=7)
    found = by_file(made)
    assert {name: one["members"]["png"] for name, one in found.items()} == photos
    classes = {"ant": 0, "bee": 1, "cat": 2}
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == classes == made.classes()
    for name, one in found.items():
        assert one["class_name"] == name.split("/")[0]
        assert int(one["members"]["cls"]) == one["label"] == classes[one["class_name"]]
    assert made.summary()["classes"] == {"ant": 10, "bee": 10, "cat": 10}
    assert [Path(shard).name for shard in made.shards()] == [f"train-{i:06d}.tar" for i in range(5)]
    in_order = sorted(photos)
    assert {key: json.loads(one["json"])["file"] for key, one in samples(made).items()} == {
        f"{i:08d}": name for i, name in enumerate(in_order)
    }


def test_classes_are_mixed_within_shards_unless_order_is_wanted(
    write: Callable[..., Path], photos: dict[str, bytes], tmp_path: Path
) -> None:
    source = write(photos)
    mixed = run(source, tmp_path / "mixed", samples_per_shard=10)
    ordered = run(source, tmp_path / "ordered", samples_per_shard=10, shuffle=False)
    assert list(samples(ordered)) == sorted(samples(ordered)) == sorted(samples(mixed))
    labels = [one["cls"] for one in list(samples(mixed).values())[:10]]
    assert set(labels) == {b"0", b"1", b"2"}
    assert {one["cls"] for one in list(samples(ordered).values())[:10]} == {b"0"}
    assert list(samples(run(source, tmp_path / "other", seed=1))) != list(samples(mixed))


def test_a_shard_ends_at_its_number_of_bytes(
    write: Callable[..., Path], photos: dict[str, bytes], tmp_path: Path
) -> None:
    size = max(map(len, photos.values()))
    made = run(write(photos), tmp_path / "out", bytes_per_shard=3 * size)
    assert len(made.shards()) >= 10
    assert len(samples(made)) == 30


def test_integers_are_sorted_as_integers(
    write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    source = write({f"{i}/a.png": make_png(i) for i in (10, 9, 1)})
    assert run(source, tmp_path / "out").classes() == {"1": 0, "9": 1, "10": 2}


def test_files_of_macos_are_no_images(write: Callable[..., Path], photos: dict[str, bytes], tmp_path: Path) -> None:
    beside = {name.replace("/", "/._"): b"\0\5\x16\7" for name in photos}
    source = write(photos | beside | {".DS_Store": b"?", "cat/.DS_Store": b"?"})
    summary = run(source, tmp_path / "out").summary()
    assert (summary["offered"], summary["refused"]) == (len(photos), 0)
    assert summary["notes"] == {"files of macOS (._NAME, .DS_Store)": len(photos) + 2}


def test_everything_in_the_folder_is_counted(
    write: Callable[..., Path], photos: dict[str, bytes], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    outside = write({"secret.png": make_png(99)}, "outside")
    others = {
        "cat/notes.txt": b"\0" * 50,
        "cat/empty.png": b"",
        "cat/cut.png": make_png(50)[:80],
        "loose.png": make_png(51),
    }
    others |= {".git/x.png": make_png(52), "__MACOSX/cat/01.png": b"x", "cat/large.png": make_png(53) + bytes(5000)}
    others["cat/nested/deep.PNG"] = make_png(54)
    source = write(photos | others)
    (source / "cat" / "out.png").symlink_to(outside / "secret.png")
    (source / "cat" / "nothing.png").symlink_to(source / "nowhere.png")
    (source / "cat" / "inside.png").symlink_to(source / "ant" / "00.png")
    (source / "linked").symlink_to(outside)
    (source / "cat" / "ring").symlink_to(source)
    os.mkfifo(source / "cat" / "pipe.png")
    with pytest.raises(
        DataError, match=r"of 44 images were refused, more than max_refused_fraction 0.05.*--max-refused"
    ):
        run(source, tmp_path / "out", max_image_bytes=4000)
    assert not (tmp_path / "out").exists()
    made = run(source, tmp_path / "out", max_image_bytes=4000, max_refused_fraction=0.5)
    summary = made.summary()
    assert (summary["offered"], summary["imported"], summary["refused"]) == (44, 32, 12)
    assert reasons(made) == {
        "not a jpeg, png, webp, ppm, bmp, gif, tiff or avif image": 1,
        "image is empty": 1,
        "image data is damaged": 1,
        "in no class folder": 2,  # `linked` is a file of the top folder
        "in a hidden folder": 2,
        "a file of more than max_image_bytes 4000": 1,
        "a link that leads out of the folder": 1,
        "a link to nothing": 1,
        "a link to a folder, which is not followed": 1,
        "not a regular file": 1,
    }
    assert made.classes() == {"ant": 0, "bee": 1, "cat": 2}
    assert {"cat/inside.png", "cat/nested/deep.PNG"} <= by_file(made).keys()
    listed = [json.loads(line) for path in (tmp_path / "out/refused").iterdir() for line in path.open()]
    assert len(listed) == 12


def test_the_suffix_says_what_the_bytes_are(
    write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    formats = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "PPM": "ppm", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
    formats |= {"AVIF": "avif"} if features.check("avif") else {}
    made = run(write({f"a/{name}.jpeg": make_png(1, format=name) for name in formats}), tmp_path / "out")
    found = {record["file"]: set(record["members"]) for record in by_file(made).values()}
    assert found == {f"a/{name}.jpeg": {suffix, "cls", "json"} for name, suffix in formats.items()}


def pictures(make_png: Callable[..., bytes], *folders: str) -> dict[str, bytes]:
    return {f"{folder}/{i}.png": make_png(i) for folder in folders for i in range(2)}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["Train/a", "Test/a"], "several splits: Test, Train. Choose one with --split"),
        (["seg_train/a", "seg_test/b"], "several splits: seg_test, seg_train"),
        (["train2017/a", "val2017/a"], "several splits: train2017, val2017"),
        (["train/a", "test/a", "extra/a"], r"folders of splits \(test, train\) beside other folders \(extra\)"),
        (["train", "test"], r"folders of splits \(test, train\) with pictures and no class folders"),
        (["train"], r"folders of splits \(train\) with pictures and no class folders"),
        (["a/train", "a/test", "b/train"], r"class folders of .* hold folders of splits \(test, train\)"),
        (["train/a", "test"], r"folders of splits \(train\) beside other folders \(test\)"),
        (["train/a", "other"], r"folders of splits \(train\) beside other folders \(other\)"),
        (["archive/photos/a", "archive/photos/b"], r"all pictures .* lie in folders of .*/archive/photos"),
        (["archive/a", "archive/b/c"], r"all pictures .* lie in folders of .*/archive: if those are the classes"),
    ],
)
def test_folders_that_may_be_no_classes_are_never_taken_for_classes(
    folders: list[str], message: str, write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    source = write(pictures(make_png, *folders))
    with pytest.raises(ConfigError, match=message):
        run(source, tmp_path / "out")
    tops = tuple(sorted({folder.partition("/")[0] for folder in folders}))
    assert list(run(source, tmp_path / "named", classes=tops).classes()) == list(tops)


def test_files_beside_the_class_folders_of_a_split_do_not_make_splits_classes(
    write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    source = write(pictures(make_png, "train/a", "train/b", "val/a", "extra/c") | {"train/README.txt": b"x"})
    made = run(source, tmp_path / "out", split="train", max_refused_fraction=0.5)
    assert made.classes() == {"a": 0, "b": 1}
    assert reasons(made) == {"in no class folder": 1}


def test_splits_below_the_classes_may_be_mixed(
    write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    source = write(pictures(make_png, "a/train", "a/test", "b/train"))
    assert run(source, tmp_path / "out", split="all").summary()["classes"] == {"a": 4, "b": 2}


def test_a_class_may_be_called_train(
    write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    made = run(write(pictures(make_png, "bus", "train", "train/steam", "car/old")), tmp_path / "out")
    assert made.classes() == {"bus": 0, "car": 1, "train": 2}


def test_a_folder_without_pictures_is_no_class(
    write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    beside = {"Thumbs.db": b"x", "a/desktop.ini": b"x", "docs/readme.txt": b"x"}
    made = run(write(pictures(make_png, "a", "z") | beside), tmp_path / "out", max_refused_fraction=0.5)
    assert made.classes() == {"a": 0, "z": 1}
    assert reasons(made) == {"in a folder without pictures": 1}
    assert made.summary()["notes"] == {"files of Windows (Thumbs.db, desktop.ini)": 2}


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "pgm", "JPG"])
def test_every_usual_suffix_is_one_of_a_picture(
    suffix: str, write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    source = write({f"{name}/1.{suffix}": make_png(1, format="JPEG") for name in "ab"})
    assert run(source, tmp_path / "out").summary()["imported"] == 2


def test_names_of_classes_that_may_mean_one_class_are_noted(
    write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    made = run(write(pictures(make_png, "Cat", "cat", "007", "7", "dog", "nan")), tmp_path / "out")
    alike, missing = made.summary()["class_notes"]
    assert "'007', '7'; 'Cat', 'cat'" in alike
    assert "'nan' looks like a missing label" in missing
    assert len(made.classes()) == 6


def test_splits_are_no_classes(write: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path) -> None:
    source = write({f"{split}/{name}/1.png": make_png(1) for split in ("train", "val") for name in ("a", "b")})
    with pytest.raises(ConfigError, match=r"several splits: train, val. Choose one with --split"):
        run(source, tmp_path / "out")
    made = run(source, tmp_path / "out", split="train")
    assert (made.classes(), made.summary()["imported"]) == ({"a": 0, "b": 1}, 2)
    assert run(source, tmp_path / "all", split="all").summary()["imported"] == 4
    with pytest.raises(ConfigError, match="has train, val"):
        run(source, tmp_path / "none", split="test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jpg", "b.jpg", "c.txt"], r"found there: 2 \.jpg in no folders of classes, 1 \.txt"),
        ([], r"found there: no files"),
        (["x/a.svg"], r"found there: 1 \.svg"),
        (["x/a.jpg", "labels.csv"], r"several ways.*--kind csv: labels\.csv; --kind folders: x/a\.jpg"),
        (["a.csv", "b.csv"], r"several files of kind csv: a\.csv, b\.csv"),
    ],
)
def test_where_nothing_or_several_things_match_the_error_says_what_is_there(
    files: list[str], message: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    source = write(dict.fromkeys(files, b"x"))
    source.mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=message):
        run(source, tmp_path / "out")


def test_places_that_cannot_be_a_source(write: Callable[..., Path], photos: dict[str, bytes], tmp_path: Path) -> None:
    source = write(photos | {"a.tar": b"x"})
    with pytest.raises(ConfigError, match="there is nothing at"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="it is a shard already"):
        run(source / "a.tar", tmp_path / "out")
    with pytest.raises(ConfigError, match="lies inside"):
        run(source, source / "out")
    with pytest.raises(ConfigError, match="is refused: a shard is a path"):
        run("pipe:ls", tmp_path / "out")
    with pytest.raises(ConfigError, match="raise max_samples"):
        run(source, tmp_path / "out", max_samples=10)


# --- given classes ------------------------------------------------------------------------------------------------


def labelled(made: Imported) -> Counter[tuple[bytes, bytes]]:
    """How often each image with its label is in the shards."""
    return Counter((members.get("png", members.get("jpg", b"")), members["cls"]) for members in samples(made).values())


def test_given_classes_number_the_classes_and_others_are_refused(
    photos: dict[str, bytes], write: Callable[..., Path], tmp_path: Path
) -> None:
    made = run(write(photos), tmp_path / "out", classes=("dog", "cat", "ant"), max_refused_fraction=0.5)
    assert made.classes() == {"dog": 0, "cat": 1, "ant": 2}
    assert reasons(made) == {"class 'bee' is not in `classes`": 10}
    assert {one["class_name"]: one["label"] for one in by_file(made).values()} == {"cat": 1, "ant": 2}


PATHS = ("aaa/0.png", "ant/new.png", "x.png", "train/ant/0.png", "cat/link.png", "bee/.hidden.png", ".git/x.png")
PATHS += ("test/bee/0.png", "rows.csv", "captions.json", "ant/00.png.txt", "ant/sub/deep/0.png")


@given(
    path=st.sampled_from(PATHS),
    number=st.integers(0, 29),
    as_splits=st.booleans(),
    removes=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_with_given_classes_a_file_changes_one_sample_at_most(
    make_png: Callable[..., bytes], path: str, number: int, as_splits: bool, removes: bool
) -> None:
    """What poisoning certificates need: whatever the file is, all other samples keep image and label."""
    classes = ("ant", "bee", "cat")
    pictures = {f"{name}/{i:02d}.png": make_png(10 * k + i) for k, name in enumerate(classes) for i in range(10)}
    source = {f"train/{name}": data for name, data in pictures.items()} if as_splits else pictures
    fixed: dict[str, Any] = {"kind": "folders", "classes": classes[::-1], "max_refused_fraction": 0.9}
    fixed |= {"split": "train"} if as_splits else {}
    with TemporaryDirectory() as home:
        found = []
        for i in range(2):
            folder = Path(home, str(i))
            for name, data in source.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
            if i == 1 and removes:
                (folder / sorted(source)[number]).unlink()
            elif i == 1:
                place = (folder / path).resolve()
                place.parent.mkdir(parents=True, exist_ok=True)
                if "link" in path:
                    place.symlink_to((folder / sorted(source)[number]).resolve())
                else:
                    place.write_bytes(make_png(200))
            found.append(labelled(run(folder, Path(home, f"out{i}"), **fixed)))
    before, after = found
    assert (before - after).total() + (after - before).total() <= 1
    assert before.total() == 30


@pytest.mark.parametrize("classes", [(), ("a", "a"), ("",), ("\x1b",), ("x" * 1001,)])
def test_lists_of_classes_that_are_none_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises((ConfigError, ValidationError), match="classes"):
        ImportConfig(classes=classes)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('["b", "a"]', None),
        ('{"b": 0, "a": 1}', None),
        ('{"b": 0, "a": 2}', "not 0 to 1"),
        ('{"b": 0, "a": 0}', "not 0 to 1"),
        ('{"b": "0"}', "no list of class names"),
        ("[1]", "no list of class names"),
        ("{", "cannot be read"),
        ("[" * 10_000, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_with_classes_is_a_list_or_a_map(tmp_path: Path, content: str | None, says: str | None) -> None:
    if content is not None:
        (tmp_path / "names.json").write_text(content)
    if says is None:
        assert listed_classes(str(tmp_path / "names.json")) == ["b", "a"]
        return
    with pytest.raises(ConfigError, match=says):
        listed_classes(str(tmp_path / "names.json"))
