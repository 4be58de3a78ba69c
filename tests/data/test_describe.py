import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sanitize.artifacts import Artifact, FileEntry, Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.describe import croissant, describe_clean
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.data.tables import Selection, write_rows
from sanitize.data.writer import shard_writer
from sanitize.select import ContaminationRule, SelectConfig, WriteConfig, select_samples, write_selected
from sanitize.storage import sha256_file
from tests.select.test_stage import make_scores

pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")  # rdflib's own
# What Croissant recommends and we cannot know; mlcroissant warns of nothing else.
UNKNOWN = {"citeAs", "datePublished", "license", "version"}
SHARDS = ("a.tar", "deep/b.tar.gz", "deep/with blank é#1.tar")


@pytest.fixture(scope="module")
def mlc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """mlcroissant with a cache of its own; it reads the variable when it is first imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROISSANT_CACHE", str(tmp_path_factory.mktemp("croissant")))
        yield pytest.importorskip("mlcroissant", reason="the extra `interop` is not installed")


def samples(make_png: Callable[..., bytes]) -> dict[str, list[list[tuple[str, bytes]]]]:
    """Members of ten samples in each shard: png and jpg, folders, a second picture, a label of each class but 2 and 4;
    class 3 occurs once."""

    def sample(prefix: str, i: int) -> list[tuple[str, bytes]]:
        key, label = f"{prefix}v1.0/é{i}", 3 if (prefix, i) == ("b", 9) else i % 2
        image = (f"{key}.png", make_png(i)) if i % 3 else (f"{key}.JPG", make_png(i, format="JPEG"))
        record = json.dumps({"class id": label}).encode()
        return [image, (f"{key}.cls", b"%d\n" % label), (f"{key}.json", record), (f"{key}.mask.png", make_png(99))]

    return {name: [sample(prefix, i) for i in range(10)] for name, prefix in zip(SHARDS, "abc", strict=True)}


class Written(Artifact):
    """`clean/SHARD`, `dataset.json`, `croissant.json`."""


def write(out: Path, dataset: Dataset, selection: Selection) -> Written:
    """The kept samples, and their description."""

    def write_all(part: Part) -> None:
        for shard in dataset.shards:
            keep = selection.rows(shard)["keep"].to_pylist()
            with shard_writer(part, f"clean/{shard}") as tar:
                for (sample, _), stays in zip(dataset.samples(shard), keep, strict=True):
                    for name, data in sample.members if stays else ():
                        tar.add(name, data)
        description = describe_clean(dataset, selection, part.files)
        part.write_json("dataset.json", description)
        part.write_json("croissant.json", croissant(description))

    return make(Written, out, Recipe(stage="write"), write_all)


def select(out: Path, dataset: Dataset, keep: Callable[[dict[str, Any]], bool]) -> Selection:
    def write_verdicts(part: Part) -> None:
        for shard in dataset.shards:
            rows = dataset.rows(shard, ["position", "key", "label", "status"]).to_pylist()
            for row in rows:
                row["keep"] = row["status"] == "ok" and keep(row)
                row["status"] = "kept" if row["keep"] else "quarantined" if row["status"] == "ok" else "unreadable"
                part.counts[row["status"]] += 1
            write_rows(part, shard, pa.Table.from_pylist(rows))

    return make(Selection, out, Recipe(stage="select", inputs={"dataset": dataset.digest}), write_verdicts)


def make_shards(folder: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]) -> Path:
    for name, members in samples(make_png).items():
        flat = [member for sample in members for member in sample]
        if name == "a.tar":
            flat.append(("broken.cls", b"1"))
        make_tar(folder / name, flat, "w:gz" if name.endswith("gz") else "w")
    return folder


def run(home: Path, shards: Path, config: IndexConfig) -> Written:
    """Keep all but the one sample of class 3, every fifth sample, and one without a picture."""
    dataset = index_shards(config, str(shards), str(home / "index"), Compute(device="cpu"))
    selection = select(home / "selection", dataset, lambda row: row["position"] % 5 != 4 and row["label"] != 3)
    return write(home / "out", dataset, selection)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> Written:
    home = tmp_path_factory.mktemp("described")
    return run(home, make_shards(home / "in", make_tar, make_png), IndexConfig(n_classes=5))


def test_dataset_json_says_what_is_in_the_shards(
    written: Written, read_tar: Callable[[str | Path], list[tuple[str, bytes]]]
) -> None:
    description = written.read_json("dataset.json")
    labels: Counter[str] = Counter()
    for shard in SHARDS:
        entry, path = description["shards"][f"clean/{shard}"], written.file(f"clean/{shard}")
        found = [int(data) for name, data in read_tar(path) if name.endswith(".cls")]
        assert entry == {"samples": len(found), "size": path.stat().st_size, "sha256": sha256_file(path)}
        labels.update(map(str, found))
    assert list(description["shards"]) == [f"clean/{shard}" for shard in SHARDS]
    assert description["samples"] == {"kept": 24, "quarantined": 6, "unreadable": 1}
    assert description["labels"] == {"0": labels["0"], "1": labels["1"], "3": 0}
    assert sum(description["labels"].values()) == 24
    assert (description["n_classes"], description["label"]) == (5, "cls")
    assert description["image"] == {
        "size": [6, 6],
        "max_side": None,
        "crop": True,
        "channels": 3,
        "member": None,
        "formats": ["jpeg", "png", "webp", "ppm", "bmp", "gif", "tiff", "avif"],
        "max_pixels": 50_000_000,
        "max_scan_pixels": 400_000_000,
        "max_chunks": 65_536,
        "suffixes": ["JPG", "png"],
    }


def test_descriptions_hold_no_date_and_no_place_and_give_the_same_bytes_again(tmp_path: Path, written: Written) -> None:
    shards = shutil.copytree(Path(written.path).parent / "in", tmp_path / "elsewhere")
    again = run(tmp_path, shards, IndexConfig(n_classes=5))
    for name in ("dataset.json", "croissant.json"):
        assert again.file(name).read_bytes() == written.file(name).read_bytes()
        assert str(Path(written.path).parent).encode() not in written.file(name).read_bytes()
    assert again.digest == written.digest


def test_our_own_reader_finds_only_the_shards(written: Written) -> None:
    assert set(find_shards(str(written.file("clean")))) == set(SHARDS)
    assert set(find_shards(written.path)) == set(SHARDS)


def warnings_of(dataset: Any) -> set[str]:
    """Names of the properties that mlcroissant recommends."""
    return {warning.split('"')[1].rpartition("/")[2] for warning in dataset.metadata.ctx.issues.warnings}


def test_croissant_is_valid_and_lacks_only_what_we_cannot_know(mlc: Any, written: Written) -> None:
    dataset = mlc.Dataset(jsonld=written.file("croissant.json"))  # raises where it is not valid
    assert not dataset.metadata.ctx.issues.errors
    assert warnings_of(dataset) == UNKNOWN
    known = dict.fromkeys(UNKNOWN, "https://example.org/") | {"datePublished": "2030-01-01", "version": "1.0.0"}
    assert not warnings_of(mlc.Dataset(jsonld=written.read_json("croissant.json") | known))
    (written_files, manifest) = (dataset.metadata.file_objects, written.manifest())
    assert len(written_files) == len(SHARDS)
    for file in written_files:
        assert written.file(file.content_url).is_file()
        entry = manifest.files[file.content_url]
        assert (file.sha256, file.content_size) == (entry.sha256, f"{entry.size} B")


def test_mlcroissant_reads_every_sample_with_its_picture_and_label(
    mlc: Any, written: Written, read_tar: Callable[[str | Path], list[tuple[str, bytes]]]
) -> None:
    """From tar and tar.gz, without the second pictures (`.mask.png`). mlcroissant compares the sha256 of each shard."""
    wanted: dict[str, tuple[bytes, int]] = {}
    for shard in SHARDS:
        members = dict(read_tar(written.file(f"clean/{shard}")))
        for name in members:
            if name.endswith(".cls"):
                key = name.removesuffix(".cls")
                image = members.get(f"{key}.png") or members[f"{key}.JPG"]
                wanted[key] = (image, int(members[name]))
    records = list(mlc.Dataset(jsonld=written.file("croissant.json")).records("samples"))
    found = {record["samples/key"].decode(): record for record in records}
    assert len(records) == len(found) == 24
    assert found.keys() == wanted.keys()
    for key, (image, label) in wanted.items():
        assert found[key]["samples/label"] == label
        assert np.array_equal(np.asarray(found[key]["samples/image"]), np.asarray(Image.open(io.BytesIO(image))))


def test_labels_in_json_are_described_by_their_path(
    mlc: Any, tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    """Valid, though mlcroissant cannot extract a JSONPath from files in an archive."""
    config = IndexConfig(label="json:class id", max_bad_fraction=0.1)
    written = run(tmp_path, make_shards(tmp_path / "in", make_tar, make_png), config)
    assert written.read_json("dataset.json")["label"] == "json:class id"
    dataset = mlc.Dataset(jsonld=written.file("croissant.json"))
    assert warnings_of(dataset) == UNKNOWN
    label = next(f for r in dataset.metadata.record_sets for f in r.fields if f.id == "labels/label")
    assert label.source.extract.json_path == '$["class id"]'
    with pytest.raises(mlc.GenerationError):
        list(dataset.records("samples"))


def test_a_data_set_of_which_nothing_is_left_is_still_described(
    mlc: Any, tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list[tuple[str, bytes]]]
) -> None:
    make_tar(tmp_path / "in/x.tar", good(4))
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "index"), Compute(device="cpu"))
    written = write(tmp_path / "out", dataset, select(tmp_path / "selection", dataset, lambda _: False))
    assert written.read_json("dataset.json")["labels"] == {"0": 0, "1": 0}
    assert warnings_of(mlc.Dataset(jsonld=written.file("croissant.json"))) == UNKNOWN


def test_a_shard_that_was_not_written_is_missed(written: Written, tmp_path: Path) -> None:
    home = Path(written.path).parent
    dataset, selection = Dataset.load(home / "index"), Selection.load(home / "selection")
    with pytest.raises(KeyError, match=r"clean/a\.tar"):
        describe_clean(dataset, selection, {"clean/deep/b.tar.gz": FileEntry(sha256="0" * 64, size=0)})


def test_mlcroissant_reads_every_picture_of_a_sample_with_its_label(
    mlc: Any, tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    members = [
        (f"s{i}.{suffix}", data)
        for i in range(4)
        for suffix, data in (
            ("left.png", make_png(2 * i)),
            ("right.png", make_png(2 * i + 1)),
            ("cls", b"%d" % (i % 2)),
        )
    ]
    make_tar(tmp_path / "in/x.tar", members)
    config = IndexConfig.model_validate({"image": {"member": "all"}})
    dataset = index_shards(config, str(tmp_path / "in"), str(tmp_path / "index"), Compute(device="cpu"))
    scores = make_scores(tmp_path / "scores", dataset, lambda _shard, row: row["position"])
    rule = ContaminationRule(rate=0.25, factor=1)
    selection = select_samples(SelectConfig(rule=rule), dataset, [scores], str(tmp_path / "selection"), Compute())
    written = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), Compute(device="cpu"))
    assert written.read_json("dataset.json")["labels"] == {"0": 1, "1": 1}
    croissant = mlc.Dataset(jsonld=written.file("croissant.json"))
    assert warnings_of(croissant) == UNKNOWN
    found = {record["samples/name"].decode(): record for record in croissant.records("samples")}
    assert sorted(found) == ["s0.left.png", "s0.right.png", "s1.left.png", "s1.right.png"]
    payloads = dict(members)
    for name, record in found.items():
        assert record["samples/key"].decode() == name.partition(".")[0]
        assert record["samples/label"] == int(name[1])
        stored = np.asarray(Image.open(io.BytesIO(payloads[name])))
        assert np.array_equal(np.asarray(record["samples/image"]), stored)
