"""New shards against an approved run: nothing old is read, nothing is processed twice, nothing doubtful is released."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.start import start
from sanitize.artifacts import Part, verify
from sanitize.attack import BadNetsConfig, poison_shards
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Selection
from sanitize.drift.statistics import CALIBRATE, FIT
from sanitize.errors import ArtifactError, ConfigError, RequestError
from sanitize.jobs import reference, refit
from sanitize.jobs.ingest import IngestConfig
from sanitize.jobs.reference import load_reference
from sanitize.jobs.store import FEED, decide, list_batches
from sanitize.lease import take
from sanitize.ledger import CommitEntry, Ledger
from sanitize.storage import create, exclusive, join, names_below, read_bytes, sha256_file
from tests.clock import Clock
from tests.flows.stores import CPU, LEVEL, config_of, feed_of, land
from tests.s3 import s3_bucket

OPENED: list[Path] = []  # files that were opened since the list was cleared
sys.addaudithook(lambda event, args: OPENED.append(Path(str(args[0]))) if event == "open" else None)


def verdicts_of(store: Path) -> dict[str, list[dict[str, Any]]]:
    """Shard -> its verdicts, over all batches."""
    found = {}
    for batch in (store / "batches").iterdir():
        selection = Selection.load(batch / "40-selection")
        found |= {shard: selection.rows(shard).to_pylist() for shard in selection.shards}
    return found


@pytest.mark.parametrize(("level", "warned"), [("0.001", True), ("0.01", False), ("0", False)])
def test_a_level_that_so_few_samples_cannot_resolve_is_reported(
    approved: Path, tmp_path: Path, level: str, warned: bool
) -> None:
    command = ["reference", str(approved), "--store", str(tmp_path / "store"), "--level", level, "-q"]
    called = CliRunner().invoke(app, command)
    assert called.exit_code == 0, called.output
    assert ("flags no sample" in called.output) == warned


# --- incremental is full ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)  # six batches and two refits
def test_ten_shards_at_once_and_in_five_batches_are_the_same_and_nothing_old_is_read(
    store: Path, referenced: Path, incoming: Path, digits: Digits, tmp_path: Path
) -> None:
    shards = digits.shards()[8:18]
    first = config_of(incoming, max_shards=2)
    land(shards[:8], incoming)
    land(digits.shards()[:1], incoming, "old-")  # of the approved run, under another name
    result = start(first, str(store), direct=True)
    assert Counter(batch["status"] for batch in result["batches"]) == {"accepted": 4}
    assert (result["new"], result["duplicates"], result["known"]) == (8, 1, 0)

    before = list(incoming.iterdir())
    land(shards[8:], incoming)
    land(shards[:1], incoming, "zz-copy-")
    OPENED.clear()
    result = start(first, str(store), direct=True)
    assert (result["new"], result["duplicates"], result["known"]) == (2, 1, 9)
    assert not set(before) & set(OPENED)  # seen, and not opened
    assert not [path for path in OPENED if "/batches/" in str(path) and result["batches"][0]["batch"] not in str(path)]
    OPENED.clear()
    assert start(first, str(store), direct=True)["batches"] == []
    assert not [path for path in OPENED if path.parent == incoming]

    together = shutil.copytree(referenced, tmp_path / "together")
    for copy in incoming.glob("[oz]*"):
        copy.unlink()
    (batch,) = start(config_of(incoming), str(together), direct=True)["batches"]
    assert batch["status"] == "accepted"
    assert batch["samples"]["quarantined"] > 0  # so that there is something to agree on
    assert verdicts_of(together) == verdicts_of(store)
    clean = [{(line["shard"].split("/")[-1], line["sha256"]) for line in feed_of(place)} for place in (store, together)]
    assert clean[0] == clean[1]
    assert len(clean[0]) == 18

    # The next reference: merged from five batches, and from one that saw all of it in a single pass.
    assert len(refit(out=store).summary["merged"]) == 5
    assert refit(out=together).summary["merged"] == [batch["batch"]]
    merged, once = (load_reference(str(place), Ledger(str(place)).read().reference) for place in (store, together))
    for half in (FIT, CALIBRATE):
        assert merged.statistics.rows(half).equals(once.statistics.rows(half))
    assert merged.statistics.info == once.statistics.info
    assert merged.scores[0].manifest().files == once.scores[0].manifest().files  # the same thresholds follow
    with pytest.raises(ConfigError, match="nothing to merge"):
        refit(out=store)
    with pytest.raises(ConfigError, match="has learned from it"):
        decide(str(together), batch["batch"], "rejected")


# --- a person decides -------------------------------------------------------------------------------------------


def test_a_poisoned_batch_is_held_until_a_person_decides(
    store: Path, incoming: Path, digits: Digits, tmp_path: Path
) -> None:
    dataset = index_shards(IndexConfig(n_classes=10), digits.shards()[8:10], str(tmp_path / "index"), CPU)
    poisoned = poison_shards(BadNetsConfig(rate=0.1, size=3), dataset, str(tmp_path / "poisoned"), CPU)
    land(poisoned.shard_paths(), incoming)
    config = tmp_path / "ingest.yaml"
    config.write_text(yaml.safe_dump({"shards": [str(incoming)], "compute": {"device": "cpu"}}))
    runner = CliRunner()
    called = runner.invoke(app, ["ingest", str(config), "--store", str(store), "--direct", "--json", "-q"])
    assert called.exit_code == 3, called.output
    (batch,) = json.loads(called.stdout)["batches"]
    assert (batch["status"], batch["verdict"]) == ("held", "hold")
    assert any("class 0" in reason for reason in batch["reasons"])
    for page in ("report", "drift"):
        assert "<html" in Path(batch[page]).read_text()
    assert "class 0" in Path(batch["drift"]).read_text()
    assert not [line for line in feed_of(store) if line["batch"]]
    manifests = list((store / "batches").rglob("manifest.json"))
    assert manifests
    assert all(verify(path.parent) == [] for path in manifests)

    name = batch["batch"]
    decided = runner.invoke(
        app, ["approve", name[:6], "--store", str(store), "--by", "Ada", "--note", "known", "--json"]
    )
    assert json.loads(decided.stdout)["released"] is True
    assert {line["batch"] for line in feed_of(store)} == {"", name}
    assert all(sha256_file(store / line["shard"]) == line["sha256"] for line in feed_of(store) if line["batch"])
    assert runner.invoke(app, ["reject", name, "--store", str(store)]).exit_code == 0
    assert {line["batch"] for line in feed_of(store)} == {""}
    (row,) = json.loads(runner.invoke(app, ["batches", "--store", str(store), "--json"]).stdout)
    assert (row["status"], row["outcome"], row["released"]) == ("rejected", "held", False)
    assert runner.invoke(app, ["batches", "--store", str(store)]).exit_code == 0
    assert runner.invoke(app, ["approve", "none", "--store", str(store)]).exit_code == 2


@pytest.mark.slow
def test_shards_ledger_and_feed_may_be_in_a_bucket_that_fails_now_and_then(
    approved: Path, store: Path, incoming: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(digits.shards()[8:10], incoming)
    start(config_of(incoming), str(store), direct=True)
    with s3_bucket(monkeypatch, rate=0.05) as (bucket, proxy):
        far, landing = join(bucket, "store"), join(bucket, "incoming")
        config = IngestConfig(shards=(landing,), compute=CPU)
        reference(run=approved, out=far, level=LEVEL)
        assert start(config, far, direct=True)["new"] == 0
        for shard in incoming.glob("*.tar"):
            with create(join(landing, shard.name)) as writer:
                writer.write(shard.read_bytes())
        (batch,) = start(config, far, direct=True)["batches"]
        again = start(config, far, direct=True)
        assert (again["new"], again["known"], again["batches"]) == (0, 2, [])
        assert proxy.injected.total() > 0

        feed = [line for line in json.loads(read_bytes(join(far, FEED)))["shards"] if line["batch"]]
        assert [line["sha256"] for line in feed] == [line["sha256"] for line in feed_of(store) if line["batch"]]
        assert [sha256_file(join(far, line["shard"])) for line in feed] == [line["sha256"] for line in feed]
        decide(far, batch["batch"], "rejected")
        assert not [line for line in json.loads(read_bytes(join(far, FEED)))["shards"] if line["batch"]]
        assert not [name for name in names_below(far) if ".partial" in name or ".tmp-" in name]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_batch_that_another_process_took_over_is_left_to_it(
    approved: Path, incoming: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    store = f"memory://{uuid.uuid4().hex}/store"
    reference(run=approved, out=store, level=LEVEL)
    land(digits.shards()[8:9], incoming)
    module = sys.modules["sanitize.jobs.ingest"]  # the name in the package is the function
    whole, successors = module._run_batch, []

    def paused_at_its_end(*args: Any) -> CommitEntry:
        made = whole(*args)
        clock.now += 130
        successors.append(take(args[4].out))
        if is_damaged:  # the other process is just writing over what this one reads
            raise ArtifactError("a file is not what the manifest says")
        return made

    with monkeypatch.context() as patch:
        clock = Clock(patch)
        patch.setattr(module, "_run_batch", paused_at_its_end)
        (left,) = start(config_of(incoming), store, direct=True)["batches"]
        assert left["status"] == "claimed"
        assert "taken over" in left["reasons"][0]
        (batch,) = list_batches(store)
        assert batch["status"] == "claimed"
        successors[0].give_back()
    (batch,) = start(config_of(incoming), store, direct=True)["batches"]
    assert batch["status"] == "accepted"


def test_a_reference_of_an_older_version_is_refused_before_any_claim_and_refit_makes_it_usable(
    approved: Path, tmp_path: Path, incoming: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write = tmp_path / "old", Part.write_json

    def without_rule(part: Part, name: str, value: dict[str, Any]) -> None:
        write(part, name, {k: v for k, v in value.items() if (name, k) != ("scorer.json", "rule")})

    with monkeypatch.context() as patch:
        patch.setattr(Part, "write_json", without_rule)  # as before default rules were written down
        reference(run=approved, out=store, level=LEVEL)
    land(digits.shards()[8:9], incoming)
    with pytest.raises(RequestError, match=f"older version of sanitize: `sanitize refit --store {store}` fits"):
        start(config_of(incoming), str(store), direct=True)
    assert list_batches(str(store)) == []
    assert refit(out=store).summary["merged"] == []
    with pytest.raises(RequestError, match="nothing to merge"):
        refit(out=store)
    (batch,) = start(config_of(incoming), str(store), direct=True)["batches"]
    assert (batch["status"], batch["reference"]) == ("accepted", 2)


def test_where_nothing_has_landed_yet_there_is_nothing_to_do(store: Path, incoming: Path) -> None:
    command = ["ingest", "--store", str(store), "--direct", "--device", "cpu", "-q", "--shards"]
    called = CliRunner().invoke(app, [*command, str(incoming)])
    assert called.exit_code == 0, called.output
    assert "nothing has landed yet" in called.output
    assert CliRunner().invoke(app, [*command, str(incoming / "mistyped")]).exit_code == 2


def test_a_store_without_a_reference_and_a_second_first_one_are_refused(
    store: Path, approved: Path, incoming: Path, digits: Digits, tmp_path: Path
) -> None:
    land(digits.shards()[8:9], incoming)
    with pytest.raises(ConfigError, match="make one with `sanitize reference"):
        start(config_of(incoming), str(tmp_path / "empty"), direct=True)
    with pytest.raises(ConfigError, match="`sanitize refit` makes the next"):
        reference(run=approved, out=store, level=LEVEL)
    with pytest.raises(ConfigError, match="lies inside"):
        start(config_of(incoming), str(incoming / "store"), direct=True)


def test_reference_and_refit_lock_the_folder_of_the_reference_alone(store: Path, approved: Path) -> None:
    with exclusive(store), pytest.raises(ConfigError, match="nothing to merge"):  # an ingest may work meanwhile
        refit(out=store)
    with exclusive(store / "reference"):
        with pytest.raises(ArtifactError, match="another process"):
            refit(out=store)
        with pytest.raises(ArtifactError, match="another process"):
            reference(run=approved, out=store)


# --- accidents --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_thirty_times_and_two_at_once_every_shard_is_in_one_batch(
    approved: Path, digits: Digits, tmp_path: Path
) -> None:
    (tmp_path / "digits").mkdir()
    land(digits.shards()[8:18], tmp_path / "digits")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    command = [sys.executable, "-m", "tests.flows.crash_ingest", *map(str, (approved, tmp_path / "digits", tmp_path))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["killed"] >= 10, found["killed"]  # the others had nothing left to do
    assert found["found"] == found["expected"]  # batches, verdicts, digests of all artifacts, feed
    assert found["found"]["wrong"] == []
    committed = [entry["batch"] for entry in found["entries"] if entry["kind"] == "commit"]
    assert len(committed) == len(set(committed)) == 5
    claimed = [shard["sha256"] for e in found["entries"] if e["kind"] == "claim" for shard in e["shards"]]
    assert len(claimed) == len(set(claimed)) == 10
    assert any(entry["kind"] == "duplicates" for entry in found["entries"])


# --- Prefect ----------------------------------------------------------------------------------------------------


@pytest.mark.prefect
def test_as_a_flow_the_digests_are_the_same_and_an_event_tells(
    store: Path, referenced: Path, incoming: Path, digits: Digits, tmp_path: Path, prefect_server: str, monkeypatch
) -> None:
    from flows import tasks

    land(digits.shards()[8:10], incoming)
    emitted = []
    emit = tasks.emit_event
    monkeypatch.setattr(tasks, "emit_event", lambda **event: emitted.append(event) or emit(**event))
    result = start(config_of(incoming, n_groups=2), str(store), direct=False)
    other = shutil.copytree(referenced, tmp_path / "direct")
    start(config_of(incoming), str(other), direct=True)
    states = [Ledger(str(place)).read() for place in (store, other)]
    assert [batch.commit for batch in states[0].batches.values()] == [b.commit for b in states[1].batches.values()]
    (event,) = emitted
    (batch,) = result["batches"]
    assert event["event"] == "sanitize.batch.accepted"
    assert event["resource"]["prefect.resource.id"] == f"sanitize.batch.{batch['batch']}"
    assert event["payload"]["samples"] == batch["samples"]
    assert event["payload"]["drift"] == f"{store}/batches/{batch['batch']}/91-drift-report/index.html"
