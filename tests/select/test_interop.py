"""What we write, read by tools that know nothing of us: webdataset, Hugging Face datasets, GNU tar, tarfile."""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.select import Shards, WriteConfig, write_selected
from tests.select.test_write import make_selection

Sample = tuple[str, dict[str, Any]]  # key, {suffix: content of the member}, in the order of the archive
Reader = Callable[[Sequence[str]], list[Sample]]
IMAGES = ("png", "jpg")
DEEP = "deep.d/" + "folder/" * 40  # 287 characters: too long for a ustar header
KEYS = (
    lambda i: f"plain{i}",
    lambda i: f"folder/v1.0/{i}",
    lambda i: f"{'long' * 30}{i}",
    lambda i: f"{DEEP}{i}",
    lambda i: f"日本語/é{i}",
    lambda i: f"{DEEP}ü{i}",
    lambda i: f"with blank, = and 'quotes' {i}",
)


# --- the readers ------------------------------------------------------------------------------------------------


def split(name: str) -> tuple[str, str]:
    """Key and suffix, by the words of the WebDataset format: up to the first dot of the file's own name."""
    folder, _, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return (f"{folder}/{key}" if folder else key), suffix


def grouped(members: Sequence[tuple[str, bytes]]) -> list[Sample]:
    samples: list[Sample] = []
    for name, data in members:
        key, suffix = split(name)
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        assert suffix not in samples[-1][1]
        samples[-1][1][suffix] = data
    return samples


def by_tarfile(paths: Sequence[str]) -> list[Sample]:
    members = []
    for path in paths:
        with tarfile.open(path) as tar:
            members += [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    return grouped(members)


def by_gnu_tar(paths: Sequence[str]) -> list[Sample]:
    """Extracted to a folder by `tar -xf`; the order is that of `tar -tf`."""
    tar = shutil.which("tar")
    if tar is None or "GNU tar" not in subprocess.run([tar, "--version"], capture_output=True, text=True).stdout:
        pytest.skip("there is no GNU tar on this machine")
    members = []
    for number, path in enumerate(paths):
        folder = Path(path).parent / f"extracted-{number}"
        folder.mkdir()
        done = subprocess.run([tar, "-xf", path, "-C", str(folder)], capture_output=True, check=True)
        assert done.stderr == b""
        listed = subprocess.run([tar, "-tf", path, "--quoting-style=literal"], capture_output=True, check=True)
        names = listed.stdout.decode().splitlines()
        assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(names)
        members += [(name, (folder / name).read_bytes()) for name in names]
    return grouped(members)


def by_webdataset(paths: Sequence[str]) -> list[Sample]:
    import webdataset as wds

    samples = wds.WebDataset(list(paths), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {name: s[name] for name in s if not name.startswith("__")}) for s in samples]


def by_datasets(paths: Sequence[str], features: Any = "declared", streaming: bool = False) -> list[Sample]:
    """Hugging Face parses cls and json by itself; pictures are asked for as they are. Columns that a sample does not
    have are None."""
    datasets = pytest.importorskip("datasets", reason="the extra `interop` is not installed")
    image, text = datasets.Image(decode=False), datasets.Value("string")
    if features == "declared":
        columns = {"png": image, "jpg": image, "cls": datasets.Value("int64"), "__key__": text, "__url__": text}
        features = datasets.Features({**columns, "json": datasets.Json(), "sanitize.json": datasets.Json()})
    rows = datasets.load_dataset(
        "webdataset", data_files={"train": list(paths)}, split="train", features=features, streaming=streaming
    )
    if features is None:
        rows = rows.cast_column("png", image)
    samples = []
    for row in rows:
        members = {name: value for name, value in row.items() if value is not None and not name.startswith("__")}
        samples.append((row["__key__"], {n: v["bytes"] if n in IMAGES else v for n, v in members.items()}))
    return samples


@pytest.fixture(autouse=True, scope="module")
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set before the first import of `datasets`, which reads them then: no network, nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        yield


# --- the data ---------------------------------------------------------------------------------------------------


def members_of(sample: Sample) -> list[tuple[str, bytes]]:
    key, members = sample
    return [(f"{key}.{suffix}", data) for suffix, data in members.items()]


def parsed(samples: Sequence[Sample]) -> list[Sample]:
    """What Hugging Face makes of cls and json."""
    parse = {"cls": int, "json": json.loads}
    return [(key, {s: parse[s](data) if s in parse else data for s, data in m.items()}) for key, m in samples]


def is_third(position: int) -> bool:
    return position % 3 == 1


@pytest.fixture(scope="module")
def originals(make_png: Callable[..., bytes]) -> dict[str, list[Sample]]:
    """Samples of three shards: jpg and png mixed, keys that need PAX headers, folders, json."""

    def sample(prefix: str, i: int) -> Sample:
        image = {"png": make_png(i)} if i % 2 else {"jpg": make_png(i, format="JPEG")}
        record = {"index": i, "words": ["é", "b"] * (i % 2), "maybe": None if i % 3 else {"x": 0.5}}
        members = {**image, "cls": b"%d\n" % (i % 3), "json": json.dumps(record, ensure_ascii=False).encode()}
        return f"{prefix}{KEYS[i % len(KEYS)](i)}", members

    names = {"a.tar": "", "deep/b.tar.gz": "b/", "deep/with blank é.tar": "c/"}
    return {name: [sample(prefix, i) for i in range(21)] for name, prefix in names.items()}


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    originals: dict[str, list[Sample]],
    make_tar: Callable[..., str],
    compute: Compute,
) -> Shards:
    home = tmp_path_factory.mktemp("interop")
    for name, samples in originals.items():
        members = [member for sample in samples for member in members_of(sample)]
        make_tar(home / "in" / name, members, "w:gz" if name.endswith("gz") else "w", tarfile.PAX_FORMAT)
    dataset = index_shards(IndexConfig(), str(home / "in"), str(home / "index"), compute)
    selection = make_selection(home / "selection", dataset, lambda _shard, row: is_third(row["position"]))
    return write_selected(WriteConfig(), dataset, selection, str(home / "out"), compute)


@pytest.fixture
def copied(tmp_path: Path, written: Shards) -> Path:
    """The shards where a test may write beside them."""
    shutil.copytree(written.path, tmp_path / "50-shards")
    return tmp_path / "50-shards"


def shards_in(folder: Path) -> list[str]:
    return list(find_shards(str(folder)).values())


# --- reading them -----------------------------------------------------------------------------------------------


def assert_same(read: Reader, found: list[Sample], wanted: list[Sample]) -> None:
    """Keys, members and their order; what Hugging Face parses has no order of members."""
    assert [key for key, _ in found] == [key for key, _ in wanted]
    if read is by_datasets:
        assert found == parsed(wanted)
    else:
        assert [members_of(sample) for sample in found] == [members_of(sample) for sample in wanted]


@pytest.mark.parametrize("read", [by_tarfile, by_gnu_tar, by_webdataset, by_datasets])
def test_clean_shards_give_every_kept_sample_to_every_reader(
    read: Reader, copied: Path, originals: dict[str, list[Sample]]
) -> None:
    kept = [s for name in sorted(originals) for i, s in enumerate(originals[name]) if not is_third(i)]
    assert len(kept) == 42
    assert max(len(name.encode()) for sample in kept for name, _ in members_of(sample)) > 255
    assert_same(read, read(shards_in(copied / "clean")), kept)


@pytest.mark.parametrize("read", [by_tarfile, by_gnu_tar, by_webdataset, by_datasets])
@pytest.mark.parametrize(("name", "packed"), [("x.tar", True), ("x.tar.gz", False), ("x.TAR", True), ("x.TGZ", False)])
def test_what_is_written_is_compressed_as_its_name_says(
    read: Reader,
    name: str,
    packed: bool,
    originals: dict[str, list[Sample]],
    make_tar: Callable[..., str],
    compute: Compute,
    tmp_path: Path,
) -> None:
    samples = originals["a.tar"]
    members = [member for sample in samples for member in members_of(sample)]
    make_tar(tmp_path / "in" / name, members, "w:gz" if packed else "w", tarfile.PAX_FORMAT)
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "index"), compute)
    selection = make_selection(tmp_path / "selection", dataset, lambda _shard, row: is_third(row["position"]))
    shards = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), compute)
    for folder in ("clean", "quarantine"):
        is_gzip = shards.file(f"{folder}/{name}").read_bytes().startswith(b"\x1f\x8b")
        assert is_gzip == name.endswith(("gz", "GZ"))
    shutil.copytree(Path(shards.path) / "clean", tmp_path / "copied")
    kept = [sample for i, sample in enumerate(samples) if not is_third(i)]
    assert_same(read, read(shards_in(tmp_path / "copied")), kept)


@pytest.mark.parametrize("read", [by_tarfile, by_gnu_tar, by_webdataset, by_datasets])
def test_quarantine_gives_every_removed_sample_and_its_evidence(
    read: Reader, copied: Path, originals: dict[str, list[Sample]]
) -> None:
    places = [(n, i) for n in sorted(originals) for i in range(len(originals[n])) if is_third(i)]
    found = read(shards_in(copied / "quarantine"))
    evidence = [members.pop("sanitize.json") for _, members in found]
    if read is not by_datasets:
        evidence = [json.loads(text) for text in evidence]
    assert [(e["shard"], e["position"], e["status"]) for e in evidence] == [(n, i, "quarantined") for n, i in places]
    assert_same(read, found, [originals[n][i] for n, i in places])


def test_webdataset_decodes_pictures_labels_and_json(copied: Path) -> None:
    import webdataset as wds

    paths = shards_in(copied / "clean")
    decoded = list(wds.WebDataset(paths, shardshuffle=False).decode("torchrgb"))
    for sample, (key, raw) in zip(decoded, by_tarfile(paths), strict=True):
        assert sample["__key__"] == key
        suffix = next(name for name in IMAGES if name in raw)
        pixels = np.asarray(Image.open(io.BytesIO(raw[suffix])).convert("RGB"))
        assert sample[suffix].shape == (3, 6, 6)
        assert np.array_equal((sample[suffix] * 255).round().byte().permute(1, 2, 0).numpy(), pixels)
        assert sample["cls"] == int(raw["cls"])
        assert sample["json"] == json.loads(raw["json"])


def test_datasets_finds_out_the_columns_by_itself_where_all_samples_have_the_same(
    tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes], compute: Compute
) -> None:
    """Columns from the first five samples; the folder of the shards is enough; and it streams."""
    samples = [(f"k{i}", {"png": make_png(i), "cls": b"%d" % (i % 2), "json": b'{"i": %d}' % i}) for i in range(12)]
    for name, part in (("train-0.tar", samples[:6]), ("train-1.tar.gz", samples[6:])):
        mode = "w:gz" if name.endswith("gz") else "w"
        make_tar(tmp_path / "in" / name, [member for sample in part for member in members_of(sample)], mode)
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "index"), compute)
    selection = make_selection(tmp_path / "selection", dataset, lambda *_: False)
    shards = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), compute)
    assert by_datasets(shards.clean(), features=None) == parsed(samples)
    assert by_datasets(shards.clean(), features=None, streaming=True) == parsed(samples)
    datasets = pytest.importorskip("datasets", reason="the extra `interop` is not installed")
    of_folder = datasets.load_dataset(str(shards.file("clean")), split="train")
    assert of_folder["__key__"] == [key for key, _ in samples]
    assert [image.size for image in of_folder["png"]] == [(6, 6)] * 12


@pytest.fixture
def with_an_empty_shard(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> list[str]:
    """Two clean shards without a sample, one of them compressed, before one with four."""
    for name in ("a.tar", "b.tar.gz", "c.tar"):
        make_tar(tmp_path / "in" / name, good(4, name[0]), "w:gz" if name.endswith("gz") else "w")
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "index"), compute)
    selection = make_selection(tmp_path / "selection", dataset, lambda shard, _: shard != "c.tar")
    return write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), compute).clean()


@pytest.mark.parametrize("read", [by_tarfile, by_gnu_tar, by_webdataset, by_datasets])
def test_a_shard_of_which_nothing_is_left_is_an_archive_without_members(
    read: Reader, with_an_empty_shard: list[str]
) -> None:
    assert len(with_an_empty_shard) == 3
    assert [key for key, _ in read(with_an_empty_shard)] == [f"c{i:04d}" for i in range(4)]


def test_datasets_cannot_find_out_the_columns_from_an_empty_first_shard(with_an_empty_shard: list[str]) -> None:
    """Why docs/reading-the-output.md says to leave empty shards out, or to declare the columns."""
    pytest.importorskip("datasets", reason="the extra `interop` is not installed")
    with pytest.raises(pa.ArrowInvalid):
        by_datasets(with_an_empty_shard, features=None)
    assert len(by_datasets(with_an_empty_shard[2:], features=None)) == 4


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.hostile
def test_the_way_of_reading_we_recommend_runs_nothing_that_came_with_the_samples(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> None:
    import pickle

    import webdataset as wds

    members = [*good(2), ("good0001.pickle", pickle.dumps(Touch(tmp_path / "executed")))]
    make_tar(tmp_path / "in/x.tar", members)
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "index"), compute)
    selection = make_selection(tmp_path / "selection", dataset, lambda *_: False)
    shards = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), compute)
    samples = list(wds.WebDataset(shards.clean(), shardshuffle=False).decode("torchrgb", only=["png", "cls"]))
    assert [sample["cls"] for sample in samples] == [0, 1]
    assert not (tmp_path / "executed").exists()
    assert pickle.loads(members[-1][1]) is None  # the payload is live, or this test would prove nothing
    assert (tmp_path / "executed").exists()


def test_the_examples_of_the_page_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/reading-the-output.md, block by block, with one set of names, where a run left its shards."""
    pytest.importorskip("datasets", reason="the extra `interop` is not installed")
    page = (Path(__file__).parents[2] / "docs/reading-the-output.md").read_text()
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(copied.parent)
    names: dict[str, Any] = {}
    for language, code in blocks:
        if language == "bash":
            subprocess.run(["bash", "-ec", code], check=True)
        else:
            exec(compile(code, "reading-the-output.md", "exec"), names)
    kept = by_tarfile(shards_in(copied / "clean"))
    assert names["key"] == kept[-1][0]
    assert names["dataset"]["__key__"] == [key for key, _ in kept]
    assert len(by_tarfile([str(copied / "clean/a.tar")])) == len(list(Path("extracted").rglob("*.cls")))
    assert json.loads((copied / "my-croissant.json").read_text())["distribution"] == names["card"]["distribution"]
