"""Classes have names wherever a person reads their numbers: pages, cards, evidence, terminals, reasons of batches."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from sanitize.attack import BadNetsConfig, poison_shards
from sanitize.compute import Compute
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.entries import DuplicatesEntry, ReferenceEntry
from sanitize.jobs.landed import list_shards
from sanitize.ledger import Ledger
from tests.flows.stores import LEVEL, land

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SMALL = (
    "embedder.architecture={kind: convnet, widths: [8, 16]}",
    "embedder.optim={epochs: 3, batch_size: 32, learning_rate: 0.02}",
    "embedder.min_steps=1",
    "embedder.max_steps=1",
    "scorers=[{kind: spectral}]",
    "select.rules={spectral: {kind: contamination, rate: 0.05}}",
)


def run(*arguments: Any, sets: tuple[str, ...] = ()) -> Result:
    settings = [f"--set={one}" for one in sets]
    return CliRunner().invoke(app, [*map(str, arguments), *settings, "--quiet"])


def named(folder: Path, shards: list[str], names: tuple[str, ...] = NAMES) -> Path:
    """Shards in a folder, with the names of their classes beside them, as an import leaves them."""
    folder.mkdir()
    land(shards, folder)
    (folder / "classes.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    return folder


@pytest.fixture(scope="module")
def cleaned(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on named shards, and what its command printed."""
    home = tmp_path_factory.mktemp("named")
    shards = named(home / "in", digits.shards()[:8])
    result = run("clean", "--shards", shards, "--out", home / "run", "--direct", "--device=cpu", sets=SMALL)
    assert result.exit_code == 0, result.output
    return home / "run", result.output


def page(run_folder: Path, folder: str = "90-report") -> str:
    return (run_folder / folder / "index.html").read_text()


def test_clean_names_classes_on_the_page_the_terminal_and_in_quarantine(cleaned: tuple[Path, str]) -> None:
    folder, output = cleaned
    html = page(folder)
    assert all(f"{number} ({name})" in html for number, name in enumerate(NAMES))
    assert "class 3 (three): " in output
    evidence = []
    for shard in sorted((folder / "50-shards" / "quarantine").glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".sanitize.json")]
            evidence += [json.loads(file.read()) for file in files if file]
    assert evidence
    assert all(one["class_name"] == NAMES[one["label"]] for one in evidence)
    described = json.loads((folder / "50-shards" / "dataset.json").read_text())
    assert described["class_names"] == {str(number): name for number, name in enumerate(NAMES)}
    assert described["classes"] is None  # labels are integers still


def test_batches_are_held_for_reasons_that_name_classes(
    cleaned: tuple[Path, str], digits: Digits, tmp_path: Path
) -> None:
    store, compute = tmp_path / "store", Compute(device="cpu")
    assert run("reference", cleaned[0], "--store", store, f"--level={LEVEL}").exit_code == 0
    index = index_shards(IndexConfig(), digits.shards()[8:12], str(tmp_path / "index"), compute)
    attack = BadNetsConfig(rate=0.4, size=4, pattern="white", target=3)
    poisoned = poison_shards(attack, index, str(tmp_path / "poisoned"), compute)
    batch = named(tmp_path / "in", poisoned.shard_paths(), tuple(reversed(NAMES)))
    ingest = ("ingest", "--store", store, "--shards", batch, "--direct", "--device=cpu")
    result = run(*ingest)
    n = len(poisoned.shard_paths())
    assert result.exit_code == 3
    assert result.output.count("numbered in different ways: class 0 is 'nine'") == n, result.output
    assert result.output.count("in the reference v0001 it is 'zero'") == n
    assert "index.class_names" not in result.output  # it cannot be set here
    assert not (store / "batches").exists()
    (batch / "classes.json").unlink()  # as the message says; the names of the reference count
    result = run(*ingest)
    assert "class 3 (three): embeddings shifted" in result.output, result.output
    assert "class 3 (three): embeddings shifted" in CliRunner().invoke(app, ["batches", "--store", str(store)]).output
    (folder,) = (store / "batches").iterdir()
    assert "3 (three)" in page(folder, "91-drift-report")


def test_new_shards_in_folders_that_number_classes_in_another_way_are_refused_and_known_ones_stay(
    digits: Digits, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "store")
    shards = digits.shards()
    entry = ReferenceEntry(version=1, config="0" * 64, digests={}, shards=())
    ledger.append(lambda _state: entry)
    places = [
        named(tmp_path / "c", shards[:1], ("cat", "dog")),
        named(tmp_path / "a", shards[1:2], ("dog", "cat")),
        named(tmp_path / "b", shards[2:3], ("cat", "dog", "owl")),
    ]
    (tmp_path / "none").mkdir()
    land(shards[3:4], tmp_path / "none")
    every = [*map(str, places), str(tmp_path / "none")]

    def listed(names: dict[int, str] | None, sources: list[str] = every) -> tuple[set[str], dict[str, str]]:
        landed = list_shards(sources, ledger.read(), names)
        folders = {Path(shard.url).parent.name for shard in landed.offered}
        return folders, {Path(shard.url).parent.name: shard.reason for shard in landed.refused}

    # Compared with the reference.
    offered, refused = listed({0: "cat", 1: "dog"})
    assert offered == {"c", "b", "none"}
    assert "class 0 is 'dog'" in refused["a"]
    assert "reference v0001" in refused["a"]
    # Without names there, with each other: known shards come first, then the order of the folders.
    assert listed({})[0] == {"a", "none"}
    ledger.append(lambda _state: DuplicatesEntry(shards=tuple(list_shards([every[0]], ledger.read()).offered)))
    offered, refused = listed({})
    assert offered == {"c", "b", "none"}
    assert str(tmp_path / "c") in refused["a"]
    # A known shard stays known, whatever lies beside it now.
    assert listed({0: "owl"})[0] == {"c", "none"}
    # Labels that are names, or lie elsewhere, have no numbers.
    assert listed(None) == ({"a", "b", "c", "none"}, {})


@pytest.mark.parametrize("command", ["poison", "denoise"])
def test_copies_of_shards_keep_the_names(command: str, digits: Digits, tmp_path: Path) -> None:
    shards = named(tmp_path / "in", digits.shards()[:2])
    out = tmp_path / "out"
    if command == "poison":
        result = run("poison", "--shards", shards, "--out", out, "--rate=0.1")
        copies = out / "poisoned" / "shards"
    else:
        result = run("denoise", "--shards", shards, "--out", out, "--direct", "--device=cpu", "--dims=4")
        copies = out / "20-denoised" / "shards"
    assert result.exit_code == 0, result.output
    assert json.loads((copies / "classes.json").read_text()) == {name: i for i, name in enumerate(NAMES)}
    assert "3 (three):" in run("inspect", copies).output
    (shards / "classes.json").unlink()
    assert run("poison", "--shards", shards, "--out", tmp_path / "plain").exit_code == 0
    assert not (tmp_path / "plain/poisoned/shards/classes.json").exists()


def test_models_know_the_names_of_clean_shards_and_repairs_keep_them(
    cleaned: tuple[Path, str], digits: Digits, tmp_path: Path
) -> None:
    trained, repaired, test = (
        tmp_path / "trained",
        tmp_path / "repaired",
        named(tmp_path / "test", digits.shards()[8:9]),
    )
    small = ("train.architecture={kind: convnet, widths: [8, 16]}", "train.optim.batch_size=64")
    options = ("--epochs=1", "--out", trained, "--direct", "--device=cpu")
    result = run("train", "--shards", cleaned[0] / "50-shards/clean", "--test-shards", test, *options, sets=small)
    assert result.exit_code == 0, result.output
    result = run(
        "repair", trained, "--method=clp", "--test-shards", test, "--out", repaired, "--direct", "--device=cpu"
    )
    assert result.exit_code == 0, result.output
    assert "class 3 (three)" in result.output
    for folder in (trained, repaired):
        assert "10 classes: 0 (zero), 1 (one)," in (folder / "80-package" / "MODEL_CARD.md").read_text().replace(
            "`", ""
        )


def test_test_shards_with_other_numbers_are_refused(digits: Digits, tmp_path: Path) -> None:
    shards = named(tmp_path / "in", digits.shards()[:2])
    test = named(tmp_path / "test", digits.shards()[8:9], (NAMES[1], NAMES[0], *NAMES[2:]))
    command = ("train", "--shards", shards, "--test-shards", test, "--out", tmp_path / "run", "--direct")
    result = run(*command)
    assert result.exit_code == 1
    assert "the classes are numbered in different ways: class 0 is 'one'" in result.output
    assert "index.class_names={}" in result.output
    inspected = run("inspect", shards, test)
    assert inspected.exit_code == 1
    assert "numbered in different ways" in inspected.output


def test_a_condensed_set_names_its_rows(digits: Digits, tmp_path: Path) -> None:
    shards = named(tmp_path / "in", digits.shards()[:4])
    sets = ("condense.matching.iterations=2", "condense.matching.images_per_class=1", "condense.matching.batch_size=8")
    sets += ("condense.matching.architecture={kind: instance_convnet, widths: [8, 8]}",)
    result = run("condense", "--shards", shards, "--out", tmp_path / "run", "--direct", "--device=cpu", sets=sets)
    assert result.exit_code == 0, result.output
    html = page(tmp_path / "run")
    assert all(f"{number} ({name})" in html for number, name in enumerate(NAMES))
    (condensed,) = (tmp_path / "run").glob("*/shards")
    assert "3 (three):" in run("inspect", condensed).output


def test_inspect_names_classes_and_says_where_a_file_is_no_map(digits: Digits, tmp_path: Path) -> None:
    shards = named(tmp_path / "in", digits.shards()[:1])
    assert "3 (three):" in run("inspect", shards).output
    found = json.loads(run("inspect", shards, "--json").stdout)
    assert found["class_names"]["3"] == "three"
    assert found["classes"] is None
    copy = shutil.copy(next(shards.glob("*.tar")), shards / "copy.tar")
    hygiene = run("inspect", shards, "--hygiene").output
    assert "2 copies of one file, class " in hygiene
    assert "(zero)" in hygiene, hygiene
    Path(copy).unlink()
    assert "3 (drei):" in run("inspect", shards, sets=("class_names={3: drei}",)).output  # settings come first
    assert "(three)" not in run("inspect", shards, sets=("class_names={}",)).output
    (shards / "classes.json").write_text("[]")
    assert run("inspect", shards).exit_code == 0
