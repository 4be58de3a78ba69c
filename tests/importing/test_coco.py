"""Captions of COCO."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sanitize.errors import ConfigError, DataError
from tests.importing.imported import by_file, reasons, run


@pytest.fixture
def source(write: Callable[..., Path], photos: dict[str, bytes]) -> Path:
    return write(photos)


def annotations(source: Path, images: list[Any], captions: list[Any], **more: Any) -> Path:
    path = source / "captions_train.json"
    path.write_text(json.dumps(more | {"images": images, "annotations": captions}, indent=1))
    return path


def caption(image: Any, text: str) -> dict[str, Any]:
    return {"image_id": image, "id": 1, "caption": text}


IMAGES = [{"id": 7, "file_name": "bee/01.png", "height": 6}, {"id": 3, "file_name": "ant/00.png"}]


def test_an_image_gets_all_its_captions(source: Path, tmp_path: Path) -> None:
    captions = [caption(3, "An ant. "), caption(7, "Eine Biene, größer."), caption(3, "A small\nanimal.")]
    info = {"info": {"year": 2026}, "licenses": [{"id": i, "url": "x" * 100} for i in range(100)], "n": 12345}
    made = run(annotations(source, IMAGES, captions, **info), tmp_path / "out")
    found = by_file(made)
    assert {file: one["captions"] for file, one in found.items()} == {
        "ant/00.png": ["An ant.", "A small\nanimal."],
        "bee/01.png": ["Eine Biene, größer."],
    }
    for file, one in found.items():
        assert one["members"]["txt"].decode() == one["captions"][0] == one["caption"]
        assert one["members"].keys() == {"png", "txt", "json"}
        assert one["members"]["png"] == (source / file).read_bytes()
    assert made.classes() == {}
    assert made.summary()["classes"] is None


def test_nothing_is_lost_silently(source: Path, tmp_path: Path) -> None:
    images = [*IMAGES, {"id": 7, "file_name": "cat/01.png"}, {"id": 9, "file_name": "ant/00.png"}]
    images += [{"id": i, "file_name": name} for i, name in enumerate(["../x.png", "/etc/passwd", "gone.png"], start=20)]
    images += [
        {"id": 30, "file_name": "cat/02.png"},
        {"id": 31, "file_name": "cat/03.png"},
        {"id": 32, "file_name": "cat/04.png"},
    ]
    captions = [caption(i, "x") for i in (3, 7, 9, 20, 21, 22)] + [
        caption(99, "of nothing"),
        {"image_id": 3, "bbox": []},
    ]
    captions += [caption(30, " \n")]
    captions += [caption(31, "y")] * 101 + [caption(32, "z" * 10_001)]
    made = run(annotations(source, images, captions), tmp_path / "out", max_refused_fraction=1)
    assert made.summary()["offered"] == len(images) == 10
    assert made.summary()["imported"] == 2
    assert reasons(made) == {
        "listed again: an earlier entry has this file or id": 2,
        "unsafe path: '..' component": 1,
        "unsafe path: absolute path": 1,
        "there is no such file": 1,
        "no caption": 1,
        "more than 100 captions": 1,
        "a caption of more than 10000 characters": 1,
    }
    assert made.summary()["notes"] == {"captions of no image": 1, "annotations without a caption": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'{' expected"),
        ("[]", "'{' expected"),
        ("{", "is no JSON file of COCO's form"),
        ('{"images": [', "is no JSON file"),
        ('{"images": [{"id": 1, "file_name": "a"},]}', "entry expected"),
        ('{"images": [{"id": 1, "file_name": "a"} {"id"', "',' expected"),
        ('{"images": [1]}', "is no object"),
        ('{"images": [{"id": 1}]}', "image 0 has no file_name"),
        ('{"images": [{"id": [1], "file_name": "a"}]}', "no file_name, or no id"),
        ('{"images": []}', "has no `images`"),
        ('{"annotations": []}', "has no `images`"),
        ('{"images": [{"id": 1, "file_name": "a"}]}', "has no `annotations`"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}', r"boxes\?"),
        ('{"images": ' + "[" * 100_000, "is no JSON file"),
        ('{"a": ' + '{"a":' * 100_000, "is no JSON file"),
        ('{"images": [{"id": ' + "9" * 10_000 + "}]}", "is no JSON file"),
        ('{"images": [{"id": 1, "file_name": "' + "x" * (1 << 21) + '"}]}', "more than 1,048,576 characters"),
        ('{"images": [{"id": "\udce9', "is no JSON file"),
    ],
)
def test_what_is_no_annotation_file_is_an_error(text: str, message: str, source: Path, tmp_path: Path) -> None:
    path = source / "captions.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises((ConfigError, DataError), match=message):
        run(path, tmp_path / "out")


def test_limits_of_annotations(source: Path, tmp_path: Path) -> None:
    path = annotations(source, IMAGES, [caption(3, "x")])
    with pytest.raises(DataError, match="max_json_bytes 50"):
        run(path, tmp_path / "out", max_json_bytes=50)
    with pytest.raises(ConfigError, match="max_samples"):
        run(path, tmp_path / "out", max_samples=1)


def test_a_folder_with_captions_is_found(source: Path, tmp_path: Path) -> None:
    annotations(source, IMAGES, [caption(3, "x"), caption(7, "y")])
    with pytest.raises(ConfigError, match=r"--kind coco: captions_train\.json"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", kind="coco").summary()["imported"] == 2
