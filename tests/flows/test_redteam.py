"""A red team from shards to the gate: blind, the same however it is called, and with an exit code to wait for."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.artifacts import Artifact
from pydantic import ValidationError
from typer.testing import CliRunner

from flows.cli import app
from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.attack import Poisoned
from sanitize.data.digits import Digits
from sanitize.data.tables import Selection
from sanitize.errors import ConfigError
from sanitize.jobs.redteam import DEFAULT_ATTACKS, RedTeamConfig, table
from sanitize.tar.names import as_markdown

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def settings(digits: Digits) -> dict[str, Any]:
    """Quick: a scorer that needs no good network, and a rule that removes .075 of each class, whatever it holds."""
    pipeline = {
        "shards": digits.shards()[:5],
        "embedder": {
            "architecture": {"kind": "convnet", "widths": [8]},
            "optim": {"epochs": 2, "batch_size": 64},
            "min_steps": 1,
            "max_steps": 1,
        },
        "scorers": [{"kind": "spectral", "embedding": "pixels"}],
        "select": {"rule": {"kind": "contamination", "rate": 0.05}},
        "compute": {"device": "cpu"},
    }
    return {
        "clean": pipeline,
        "sample": {"n_train": 350, "n_test": 100},
        "attacks": ["badnets@10%"],
        "repeats": 2,
        "require": ["badnets@10%:recall>=0.05", "none:false_removals<=0.1"],
    }


@pytest.fixture(scope="module")
def config_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "redteam.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def direct(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("redteam") / "run"
    start(RedTeamConfig.model_validate(settings), out, direct=True)
    return out


def digests(run: Path) -> dict[str, str]:
    folders = [path.parent for path in run.rglob("manifest.json") if ".partial" not in str(path)]
    return {str(folder.relative_to(run)): read_manifest(folder).digest for folder in folders}


def test_measures_are_those_of_the_artifacts(direct: Path) -> None:
    result = json.loads((direct / "run.json").read_text())
    assert [case["name"] for case in result["cases"]] == ["none", "badnets@10%"]
    none, badnets = (case["measures"] for case in result["cases"])
    assert none.keys() == {"false_removals", "acc_before", "acc_after"}
    assert badnets.keys() - none.keys() == {"recall", "precision", "asr_before", "asr_after", "asr_baseline"}
    assert none["false_removals"]["mean"] == pytest.approx(0.075, abs=0.01)
    for seed in (0, 1):
        case = direct / "cases" / "badnets@10" / str(seed)
        truth, verdicts = Poisoned.load(case / "10-poisoned"), Selection.load(case / "clean" / "40-selection")
        (shard,) = truth.shards
        is_poisoned = truth.rows(shard)["poisoned"].to_pylist()
        kept = verdicts.rows(shard)["keep"].to_pylist()
        found = sum(p and not k for p, k in zip(is_poisoned, kept, strict=True))
        assert sum(is_poisoned) == 35
        assert badnets["recall"]["repeats"][seed] == [found, 35]
    shares = [part / whole for part, whole in badnets["recall"]["repeats"]]
    assert badnets["recall"]["mean"] == pytest.approx(sum(shares) / 2)
    assert result["met"] is True
    assert [requirement["met"] for requirement in result["requirements"]] == [True, True]
    page = Path(result["report"]).read_text()
    assert "All 2 requirements are met." in page
    assert "badnets@10%:recall&gt;=0.05" in page
    assert page.count('class="triggers"') == 1


def test_the_pipeline_is_blind(direct: Path) -> None:
    """What it reads has nothing in it but keys, images and labels; the images differ from the sample's where the truth
    says so, and the truth lies elsewhere."""
    case = direct / "cases" / "badnets@10" / "0"
    read = yaml.safe_load((case / "clean" / "config.yaml").read_text())["shards"]
    assert [Path(url).parent for url in read] == [case / "10-poisoned" / "shards"]
    assert {path.name for path in (case / "10-poisoned" / "shards").iterdir()} == {"part-0000.tar"}
    truth = Poisoned.load(case / "10-poisoned").rows("part-0000.tar").to_pylist()
    with tarfile.open(read[0]) as poisoned, tarfile.open(direct / "01-sample" / "train" / "part-0000.tar") as honest:
        members = poisoned.getmembers()
        assert [member.name for member in members] == [member.name for member in honest.getmembers()]
        assert {member.name.partition(".")[2] for member in members} == {"png", "cls"}
        assert len({(member.mtime, member.mode, member.uid, member.uname) for member in members}) == 1
        labels = {m.name[:8]: int(poisoned.extractfile(m).read()) for m in members if m.name.endswith("cls")}  # type: ignore[union-attr]
    assert labels == {row["key"]: row["label"] for row in truth}
    assert all(row["key"].isdigit() for row in truth)
    for url in read:
        assert b"poison" not in Path(url).read_bytes()


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.usefixtures("prefect_server")
def test_prefect_changes_nothing_and_shows_the_result(
    direct: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import tasks

    emitted: list[dict[str, Any]] = []
    emit = tasks.emit_event
    monkeypatch.setattr(tasks, "emit_event", lambda **event: emitted.append(event) or emit(**event))
    config = RedTeamConfig.model_validate(settings)
    result = start(config, tmp_path / "run", direct=False)
    assert digests(tmp_path / "run") == digests(direct)
    shown = Artifact.get("redteam-stages")  # what Prefect's page has of it
    assert shown is not None
    assert table(result) in str(shown.data)
    assert all(f"| {as_markdown(case['name'])} |" in str(shown.data) for case in result["cases"])
    (event,) = emitted
    assert event["event"] == ("sanitize.redteam.met" if result["met"] else "sanitize.redteam.missed")
    assert event["payload"]["requirements"] == result["requirements"]


# Runs the command with one change: the process is killed when a certain stage has been called so many times.
KILLED_IN = """
import os, signal, sys
from sanitize.jobs.run import Run
call, seen = Run._call, [0]
def counted(self, function, *args, **more):
    seen[0] += function.__name__ == sys.argv[1]
    if seen[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, function, *args, **more)
Run._call = counted
from flows.cli import app
app(sys.argv[3:])
"""


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(direct: Path, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["redteam", str(config_file), "--out", str(out), "--quiet", "--direct"]
    arguments = [sys.executable, "-c", KILLED_IN, "select_samples", "3", *command]
    killed = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = digests(out)
    assert "cases/none/0/90-measured" in done
    assert "90-report" not in done
    found = RUNNER.invoke(app, command)
    assert found.exit_code == 0, found.output
    assert digests(out) == digests(direct)
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert [stage["resumed"] for stage in stages if stage["folder"] == "01-sample"] == [True]


def test_scorers_that_are_switched_off_fail_the_gate(settings: dict[str, Any], tmp_path: Path) -> None:
    """A rule that may remove nothing: recall and false removals are 0, and no model is trained twice."""
    off = {"select": {**settings["clean"]["select"], "max_removed_fraction": 0}}
    once = settings | {"clean": settings["clean"] | off, "repeats": 1}
    path = tmp_path / "off.yaml"
    path.write_text(yaml.safe_dump(once))
    found = RUNNER.invoke(app, ["redteam", str(path), "--out", str(tmp_path / "run"), "--quiet", "--direct"])
    assert found.exit_code == 3, found.output
    shown = " ".join(found.output.split())
    assert "MISSED badnets@10%:recall>=0.05: 0.0%" in shown
    assert "met none:false_removals<=0.1: 0.0%" in shown
    (of_badnets,) = (c["measures"] for c in json.loads((tmp_path / "run" / "run.json").read_text())["cases"][1:])
    assert of_badnets["precision"]["mean"] is None
    assert of_badnets["asr_after"] == of_badnets["asr_before"]
    assert "1 of 2 requirements missed" in (tmp_path / "run" / "90-report" / "index.html").read_text()


def test_the_pipelines_own_yaml_and_options_are_enough(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "clean.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings["clean"].items() if name != "shards"}))
    shards = [argument for shard in settings["clean"]["shards"] for argument in ("--shards", shard)]
    options = ["--attack", "blended@20%", "--repeats", "1", "--direct", "--json", "--quiet", "--seed", "3"]
    found = RUNNER.invoke(app, ["redteam", str(path), *shards, *options, "--out", str(tmp_path / "run")])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert [case["name"] for case in result["cases"]] == ["none", "blended@20%"]
    assert result["requirements"] == []
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["clean"]["compute"]["seed"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--require", "wanet@1%:recall>=0.9"], "there is no case 'wanet@1%'"),
        (["--require", "none:recall>=0.9"], "the measures of case none are"),
        (["--attack", "badnets"], "expected KIND@RATE%"),
        (["--attack", "badnets@1%", "--attack", "badnets@1%"], "two have the name badnets@1%"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    options: list[str], message: str, config_file: Path, tmp_path: Path
) -> None:
    found = RUNNER.invoke(app, ["redteam", str(config_file), *options, "--out", str(tmp_path / "run"), "--direct"])
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.output.split())
    assert not (tmp_path / "run").exists()


def test_an_attack_on_no_sample_is_refused_before_any_training(settings: dict[str, Any], tmp_path: Path) -> None:
    options = ["--attack", "badnets@0.1%", "--direct", "--out", str(tmp_path / "run")]
    path = tmp_path / "redteam.yaml"
    path.write_text(yaml.safe_dump(settings | {"require": []}))
    found = RUNNER.invoke(app, ["redteam", str(path), *options])
    assert found.exit_code == 2, found.output
    assert "badnets@0.1% of 350 samples is none" in " ".join(found.output.split())
    assert not (tmp_path / "run" / "cases").exists()


def test_trusted_samples_are_not_poisoned_and_are_trusted(settings: dict[str, Any], tmp_path: Path) -> None:
    trusted = Path(settings["clean"]["shards"][0]).name
    pipeline = settings["clean"] | {"trusted": [trusted], "select": {"rule": {"kind": "conformal", "q": 0.1}}}
    config = RedTeamConfig.model_validate(settings | {"clean": pipeline, "repeats": 1, "require": []})
    start(config, tmp_path / "run", direct=True)
    case = tmp_path / "run" / "cases" / "badnets@10" / "0"
    truth = Poisoned.load(case / "10-poisoned")
    assert truth.shards == ["part-0000.tar", "trusted-0000.tar"]
    assert sum(truth.rows("part-0000.tar")["poisoned"].to_pylist()) == 35
    assert not any(truth.rows("trusted-0000.tar")["poisoned"].to_pylist())
    assert yaml.safe_load((case / "clean" / "config.yaml").read_text())["trusted"] == ["trusted-0000.tar"]
    assert all(Selection.load(case / "clean" / "40-selection").rows("trusted-0000.tar")["keep"].to_pylist())


def test_models_are_trained_like_the_suspect_unless_another_is_set(settings: dict[str, Any]) -> None:
    suspect = RedTeamConfig.model_validate(settings)
    assert suspect.trained == suspect.clean.embedder
    other = {"architecture": {"kind": "mlp"}}
    assert RedTeamConfig.model_validate(settings | {"model": other}).trained.architecture.kind == "mlp"
    for embedder in ({"kind": "simclr"}, {"weights": "theirs.safetensors"}):  # nothing here has learned the poison
        pipeline = settings["clean"] | {"embedder": embedder}
        trained = RedTeamConfig.model_validate(settings | {"clean": pipeline}).trained
        assert trained.kind == "classifier"
        assert trained.weights is None


def test_defaults_are_cases(settings: dict[str, Any]) -> None:
    config = RedTeamConfig.model_validate({"clean": settings["clean"]})
    assert tuple(config.cases) == ("none", *DEFAULT_ATTACKS)
    assert RedTeamConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    with pytest.raises((ConfigError, ValidationError)):
        RedTeamConfig.model_validate({"clean": settings["clean"], "attacks": []})
