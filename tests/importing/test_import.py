"""What holds for every kind of source: the same bytes, nothing lost, whole or not at all; and the command."""

import csv
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from typer.testing import CliRunner

from flows.cli import app
from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ArtifactError
from sanitize.importing import Imported, stage
from tests.importing.imported import by_file, content, run, samples
from tests.killed import run_until_killed

Sources = dict[str, Path]
KINDS = ("folders", "csv", "coco", "parquet")
every_kind = pytest.mark.parametrize("kind", KINDS)


def as_kind(kind: str, files: dict[str, bytes], folder: Path) -> Path:
    """A source of this kind that offers these files; the label of a file is its folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if kind == "folders":
        return folder
    source = folder.parent / f"{folder.name}.{'json' if kind == 'coco' else kind}"
    if kind == "csv":
        with source.open("w", newline="") as stream:
            csv.writer(stream).writerows([("path", "label"), *((f"{folder.name}/{n}", n.split("/")[0]) for n in files)])
    elif kind == "coco":
        images = [{"id": i, "file_name": f"{folder.name}/{name}"} for i, name in enumerate(files)]
        captions = [{"image_id": i, "caption": f"{i}, {k}"} for i in range(len(files)) for k in range(2)]
        source.write_text(json.dumps({"images": images, "annotations": captions}))
    else:
        rows = {"image": list(files.values()), "label": [name.split("/")[0] for name in files]}
        pq.write_table(pa.table(rows), source, row_group_size=4)
    return source


@every_kind
def test_the_same_source_gives_the_same_bytes_anywhere(kind: str, photos: dict[str, bytes], tmp_path: Path) -> None:
    one = run(as_kind(kind, photos, tmp_path / "1" / "photos"), tmp_path / "out1", samples_per_shard=8)
    two = run(as_kind(kind, photos, tmp_path / "2" / "photos"), tmp_path / "out2", samples_per_shard=8)
    assert one.digest == two.digest
    differ = {n for n, data in content(tmp_path / "out1").items() if data != content(tmp_path / "out2")[n]}
    assert differ == {"manifest.json"}  # which has place and time of the source
    assert one.manifest().counts == two.manifest().counts


class Reversed:
    """`os.scandir` in another order."""

    def __init__(self, scandir: Callable[[str], Any], path: str) -> None:
        with scandir(path) as entries:
            self._entries = sorted(entries, key=lambda entry: entry.name)

    def __iter__(self) -> "Reversed":
        return self

    def __next__(self) -> Any:
        if not self._entries:
            raise StopIteration
        return self._entries.pop()

    def __enter__(self) -> "Reversed":
        return self

    def __exit__(self, *_error: object) -> None:
        pass


@every_kind
def test_neither_threads_nor_the_order_of_a_file_system_change_a_byte(
    kind: str, photos: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = as_kind(kind, photos | {"ant/bad.png": b"x"}, tmp_path / "photos")
    one = run(source, tmp_path / "out1")
    monkeypatch.setattr(os, "scandir", partial(Reversed, os.scandir))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(5)))
    two = run(source, tmp_path / "out2")
    monkeypatch.undo()
    assert one.digest == two.digest


_KILLED = """
import os, signal, sys
from sanitize.compute import Compute
from sanitize.importing import ImportConfig, import_data, stage

judge, n = stage._judge, 0

def counted(*given):
    global n
    n += 1
    for i, judged in enumerate(judge(*given)):
        if n == 3 and i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield judged

stage._judge = counted
import_data(ImportConfig(samples_per_shard=5), sys.argv[1], sys.argv[2], Compute(device="cpu"))
"""


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_a_killed_import_leaves_nothing_under_its_name_and_goes_on(
    kind: str, photos: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = as_kind(kind, photos, tmp_path / "photos"), tmp_path / "out"
    run_until_killed(_KILLED, str(source), str(out))
    assert not out.exists()
    judge, judged = stage._judge, []

    def counted(source: Any, numbers: Any, *more: Any) -> Any:
        judged.append(len(numbers))
        return judge(source, numbers, *more)

    monkeypatch.setattr(stage, "_judge", counted)
    made = run(source, out, samples_per_shard=5)
    assert judged == [5] * 4  # of six shards two were finished
    whole = run(source, tmp_path / "whole", samples_per_shard=5)
    assert made.digest == whole.digest
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_what_changed_between_two_calls_is_not_mixed(photos: dict[str, bytes], tmp_path: Path) -> None:
    source, out = as_kind("folders", photos, tmp_path / "photos"), tmp_path / "out"
    run_until_killed(_KILLED, str(source), str(out))
    for name in photos:
        (source / name).write_bytes(photos["bee/03.png"])
    made = run(source, out, samples_per_shard=5)
    assert {members["png"] for members in samples(made).values()} == {photos["bee/03.png"]}
    assert run(source, out, samples_per_shard=5) == made
    (source / "bee/03.png").write_bytes(photos["ant/00.png"])
    with pytest.raises(ArtifactError, match=r"source has changed since .*; choose another --out"):
        run(source, out, samples_per_shard=5)
    with pytest.raises(ArtifactError, match=r"made by another recipe: config\.samples_per_shard was 5 and is now 6"):
        run(source, out, samples_per_shard=6)


def test_more_refused_images_can_be_allowed_later(photos: dict[str, bytes], tmp_path: Path) -> None:
    source = as_kind("folders", photos, tmp_path / "photos")
    made = run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", max_refused_fraction=1) == made


CONTENT = st.sampled_from(["good", "garbage", "empty", "cut", "large"])
NAMES = st.text("abé .#%\n", min_size=1, max_size=6).filter(lambda name: name.strip(". ") == name and name)
PATHS = st.builds("{}/{}.png".format, NAMES, NAMES)


@every_kind
@settings(max_examples=25)
@given(
    given_files=st.dictionaries(PATHS, CONTENT, min_size=1, max_size=12), seed=st.integers(0, 3), size=st.integers(1, 5)
)
def test_imported_and_refused_are_what_was_offered(
    make_png: Callable[..., bytes], kind: str, given_files: dict[str, str], seed: int, size: int
) -> None:
    good = make_png(1)
    data = {"garbage": b"\x89PNG garbage", "empty": b"", "cut": good[:60], "large": good + bytes(5000)}
    files = {"z/good.png": good} | {
        name: make_png(i) if one == "good" else data[one] for i, (name, one) in enumerate(given_files.items())
    }
    names = {"z/good.png"} | {name for name, one in given_files.items() if one == "good" and "\n" not in name}
    if kind == "parquet":  # rows have no paths
        names = {"z/good.png"} | {name for name, one in given_files.items() if one == "good"}
    with tempfile.TemporaryDirectory() as place:
        source = as_kind(kind, files, Path(place) / "photos")
        limits = {"max_refused_fraction": 1, "max_image_bytes": 4000}
        made = run(source, Path(place) / "out", seed=seed, samples_per_shard=size, **limits)
        summary = made.summary()
        assert summary["imported"] + summary["refused"] == summary["offered"] == len(files)
        assert sum(one["n"] for one in summary["refused_by_reason"]) == summary["refused"]
        found = samples(made)
        assert len(found) == summary["imported"]
        assert sorted(one["png"] for one in found.values()) == sorted(files[name] for name in names)
        if summary["classes"] is not None:
            assert sum(summary["classes"].values()) == summary["imported"]
            for one in by_file(made).values():
                assert made.classes()[one["class_name"]] == one["label"] == int(one["members"]["cls"])


def test_source_and_shards_may_be_urls(photos: dict[str, bytes], tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name, data in photos.items():
        store.pipe_file(f"/import/photos/{name}", data)
    try:
        made = run("memory://import/photos", "memory://import/out")  # type: ignore[arg-type]
        assert made.classes() == {"ant": 0, "bee": 1, "cat": 2}
        assert made.summary()["imported"] == 30
        local = run(as_kind("folders", photos, tmp_path / "photos"), tmp_path / "out")
        assert made.digest == local.digest
        for kind in ("csv", "coco", "parquet"):
            source = as_kind(kind, photos, tmp_path / "photos")
            store.pipe_file(f"/import/{source.name}", source.read_bytes())
            url = run(f"memory://import/{source.name}", tmp_path / f"url-{kind}")
            assert url.digest == run(source, tmp_path / f"local-{kind}").digest
    finally:
        store.rm("/import", recursive=True)


def test_the_index_reads_what_was_imported(photos: dict[str, bytes], compute: Compute, tmp_path: Path) -> None:
    made = run(as_kind("folders", photos, tmp_path / "photos"), tmp_path / "out", samples_per_shard=8)
    dataset = index_shards(IndexConfig(), str(tmp_path / "out"), str(tmp_path / "index"), compute)
    assert (dataset.n_samples, dataset.n_classes) == (30, 3)
    assert dataset.manifest().counts["unreadable"] == 0
    assert len(dataset.shards) == len(made.shards()) == 4


# --- the command ---------------------------------------------------------------------------------------------------


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["import", *map(str, arguments), "--quiet"])


def test_the_command_counts_and_names_what_is_refused(photos: dict[str, bytes], tmp_path: Path) -> None:
    source = as_kind("folders", photos | {"ant/bad.png": b"x"}, tmp_path / "photos")
    done = command(source, "--out", tmp_path / "out", "--set", "samples_per_shard=10")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "31 images = 30 imported + 1 refused; 4 shards: " in text
    assert "refused 1 x not a jpeg, png, webp, ppm, bmp, gif, tiff or avif image (ant/bad.png)" in text
    assert "classes: 0 (ant): 10, 1 (bee): 10, 2 (cat): 10" in text
    again = json.loads(command(source, "--out", tmp_path / "out", "--samples-per-shard", 10, "--json").stdout)
    assert (again["offered"], again["imported"], again["refused"], again["shards"]) == (31, 30, 1, 4)
    assert again["labels"] == {"ant": 0, "bee": 1, "cat": 2}
    assert Imported.load(tmp_path / "out").summary()["imported"] == 30


def test_exit_codes(photos: dict[str, bytes], tmp_path: Path) -> None:
    source = as_kind("folders", {"a/1.png": b"x", **photos}, tmp_path / "photos")
    out = ("--out", tmp_path / "out")
    assert command().exit_code == 2
    assert command(tmp_path / "nowhere", *out).exit_code == 2
    assert command(source, *out, "--kind", "tar").exit_code == 2
    assert command(source, *out, "--set", "samples=3").exit_code == 2
    failed = command(source, *out, "--max-refused", 0)
    assert failed.exit_code == 1
    assert "1 of 31 images was refused" in " ".join(failed.output.split())
    assert not (tmp_path / "out").exists()
    assert command(source, *out, "--max-refused", 0.1).exit_code == 0
