"""`sanitize verify` walks a store from its feed to its shards, and names whatever is not as it was written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.start import start
from sanitize.data.digits import Digits
from sanitize.errors import ArtifactError
from sanitize.jobs import refit
from sanitize.jobs.restore import config_of as clean_config
from sanitize.jobs.verify_store import verify_path
from tests.flows.stores import config_of, land


@pytest.fixture(scope="session")
def ingested(referenced: Path, digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one accepted batch, and the folder its shards came from; the store is copied, not used."""
    folder = tmp_path_factory.mktemp("ingested")
    store, incoming = shutil.copytree(referenced, folder / "store"), folder / "incoming"
    incoming.mkdir()
    land(digits.shards()[8:10], incoming)
    (incoming / "empty.tar").write_bytes(b"")
    result = start(config_of(incoming), str(store), direct=True)
    assert [batch["status"] for batch in result["batches"]] == ["split", "accepted"]
    return folder


@pytest.fixture
def store(ingested: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ingested / "store", tmp_path / "store", symlinks=True)


def accepted(store: Path) -> Path:
    """Folder of the accepted batch."""
    return next(path.parents[1] for path in (store / "batches").rglob("50-shards/manifest.json"))


def changed(path: Path) -> None:
    """One byte is another; the size and the time stay."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_an_untouched_store_and_all_that_is_in_it_has_no_problem(store: Path, approved: Path) -> None:
    batch = accepted(store)
    places = [
        store,
        batch,
        batch / "50-shards",
        store / "reference/v0001",
        store / "reference/v0001/10-embedder",
        approved,
    ]
    for path in places:
        found = verify_path(str(path))
        assert (found.problems, found.notes) == ([], []), path
        assert found.n_files > 0
    said = CliRunner().invoke(app, ["verify", str(store), "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["problems"] == []


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a clean shard": (lambda s: changed(first(accepted(s), "50-shards/clean/*.tar")), "content differs"),
    "a quarantine shard": (lambda s: changed(first(accepted(s), "50-shards/quarantine/*.tar")), "content differs"),
    "a clean shard is gone": (lambda s: first(accepted(s), "50-shards/clean/*.tar").unlink(), "missing"),
    "a file more": (lambda s: (accepted(s) / "50-shards/clean/more.tar").write_bytes(b""), "not listed"),
    "scores": (lambda s: changed(first(accepted(s), "31-*/rows/*.parquet")), "content differs"),
    "a manifest": (
        lambda s: edited(accepted(s) / "50-shards/manifest.json", '"gzip_level": 6', '"gzip_level": 7'),
        "not the one the ledger names",
    ),
    "a manifest that is none": (lambda s: (accepted(s) / "40-selection/manifest.json").write_text("[]"), "is damaged"),
    "an artifact is gone": (lambda s: shutil.rmtree(accepted(s) / "70-drift"), "missing; the ledger names it"),
    "a batch is gone": (lambda s: shutil.rmtree(accepted(s)), "missing; the ledger names it"),
    "the embedder": (lambda s: changed(s / "reference/v0001/10-embedder/model.safetensors"), "content differs"),
    "the settings of the reference": (
        lambda s: edited(s / "reference/v0001/config.yaml", "level: 0.01", "level: 0.4"),
        "config.yaml: not what the ledger names",
    ),
    "the feed has more": (
        lambda s: edited(s / "feed.json", '"shards": [', '"shards": [{"shard": "batches/x.tar"},'),
        "which the ledger does not release",
    ),
    "the feed says another sha256": (
        lambda s: edited(s / "feed.json", '"sha256": "', '"sha256": "0'),
        "differs from the ledger",
    ),
    "the feed is gone": (lambda s: (s / "feed.json").unlink(), "feed.json: missing"),
    "the feed is no JSON": (lambda s: (s / "feed.json").write_text("[" * 100_000), "feed.json: damaged"),
    "an entry is no JSON": (lambda s: (s / "ledger/00000001.json").write_text("{"), "00000001.json is damaged"),
    "an entry is gone": (lambda s: (s / "ledger/00000002.json").unlink(), "is incomplete"),
    "an entry climbs out": (
        lambda s: edited(s / "ledger/00000001.json", '"batch": "', '"batch": "../../'),
        "00000001.json is damaged",
    ),
    "the first claim is of other shards": (
        lambda s: edited(s / "ledger/00000001.json", '"batch": "', '"batch": "0123456789abcdef", "x": "'),
        "00000001.json is damaged",
    ),
    "a batch without a claim": (
        lambda s: shutil.copytree(accepted(s), s / "batches/0123456789abcdef"),
        "no entry of the ledger names this batch",
    ),
    "a version without approval": (
        lambda s: shutil.copytree(s / "reference/v0001", s / "reference/v0007"),
        "no entry of the ledger names this version",
    ),
    "a FIFO for a shard": (
        lambda s: (p := first(accepted(s), "50-shards/clean/*.tar"), p.unlink(), os.mkfifo(p)),
        "missing",
    ),
}


@pytest.mark.parametrize(("tamper", "named"), TAMPERED.values(), ids=TAMPERED.keys())
def test_whatever_is_changed_in_a_store_is_named(tamper: Callable[[Path], Any], named: str, store: Path) -> None:
    tamper(store)
    found = verify_path(str(store), sources=False)
    assert any(named in problem for problem in found.problems), found.problems


def test_source_shards_that_are_gone_or_changed_are_notes(ingested: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ingested, tmp_path / "copy")
    incoming, store = ingested / "incoming", folder / "store"
    shards = sorted(incoming.glob("d*.tar"))
    kept = [shard.read_bytes() for shard in shards]
    marks = [shard.stat() for shard in shards]
    try:
        shards[0].unlink()
        changed(shards[1])
        found = verify_path(str(store))
        assert found.problems == []
        assert ["gone" in found.notes[0], "has changed since" in found.notes[1]] == [True, True]
        assert verify_path(str(store), sources=False).notes == []
    finally:
        for shard, data, mark in zip(shards, kept, marks, strict=True):
            shard.write_bytes(data)
            os.utime(shard, ns=(mark.st_atime_ns, mark.st_mtime_ns))


def test_clean_shards_of_the_approved_run_are_in_the_feed_and_so_are_checked(
    store: Path, approved: Path, tmp_path: Path
) -> None:
    shard = first(approved, "50-shards/clean/*.tar")
    kept, mark = shard.read_bytes(), shard.stat()
    try:
        changed(shard)
        found = verify_path(str(store), sources=False)
        assert [problem for problem in found.problems if "the feed names it" in problem] == found.problems != []
    finally:
        shard.write_bytes(kept)
        os.utime(shard, ns=(mark.st_atime_ns, mark.st_mtime_ns))


def test_a_refit_is_verified_too(store: Path) -> None:
    refit(out=store)
    assert verify_path(str(store), sources=False).problems == []
    assert verify_path(str(store / "reference/v0002")).problems == []
    changed(store / "reference/v0002/21-statistics/statistics.json")
    assert any("v0002" in problem for problem in verify_path(str(store), sources=False).problems)


def test_what_is_no_store_and_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        verify_path(str(tmp_path))
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "nowhere")]).exit_code == 2


# --- run again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["50-shards/clean/*.tar", "31-scores-spectral/rows/*.parquet"])
def test_cleaning_again_over_a_shard_that_was_altered_says_so(approved: Path, tmp_path: Path, which: str) -> None:
    run = shutil.copytree(approved, tmp_path / "run")
    config = clean_config(str(run))
    start(config, run, direct=True)
    shard = first(run, which)
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{shard.name} has changed since it was written"):
        start(config, run, direct=True)


def test_ingesting_again_over_a_clean_shard_that_was_altered_says_so(store: Path, ingested: Path) -> None:
    incoming = ingested / "incoming"
    assert start(config_of(incoming), str(store), direct=True)["altered"] == []
    shard = first(accepted(store), "50-shards/clean/*.tar")
    shard.write_bytes(shard.read_bytes())  # written again to the same bytes
    assert start(config_of(incoming), str(store), direct=True)["altered"] == []
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    command = ["ingest", "--store", str(store), "--shards", str(incoming), "--direct", "--device", "cpu", "-q"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 1
    assert f"{shard.name} has changed since it was written" in said.output.replace("\n", "")
