"""The clean job end to end: the same verdicts however it is called, divided, ordered or interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.errors import ConfigError
from sanitize.jobs import JOBS
from sanitize.jobs.clean import CleanConfig, CleanRun
from sanitize.jobs.restore import restore, verify_run, write_again
from sanitize.jobs.run import Run
from sanitize.report.page import render
from sanitize.select import ContaminationRule, SelectConfig

FOLDERS = (
    "00-index",
    "05-hygiene",
    "09-canaries",
    "10-embedder",
    "20-embeddings",
    "21-canaries",
    "30-scorer-toxic_direction",
    "31-scores-toxic_direction",
    "40-selection",
    "50-shards",
    "90-report",
)


def digests(out: Path) -> dict[str, str]:
    return {folder: read_manifest(out / folder).digest for folder in FOLDERS}


def test_finds_the_patch_and_spares_the_rest(direct: Path, poisoned: Path) -> None:
    found = missed = lost = 0
    for path in sorted((direct / "40-selection" / "rows").glob("*.parquet")):
        truth = pq.read_table(poisoned.parent / "rows" / path.name)["poisoned"].to_pylist()
        keep = pq.read_table(path)["keep"].to_pylist()
        found += sum(p and not k for p, k in zip(truth, keep, strict=True))
        missed += sum(p and k for p, k in zip(truth, keep, strict=True))
        lost += sum(not p and not k for p, k in zip(truth, keep, strict=True))
    assert found >= 0.9 * (found + missed) > 0
    assert lost <= 0.02 * 1761


def test_run_folder_tells_what_happened(direct: Path, settings: dict[str, Any]) -> None:
    record = json.loads((direct / "run.json").read_text())
    assert record["status"] == "finished"
    assert [stage["folder"] for stage in record["stages"]] == list(FOLDERS)
    assert record["samples"]["samples"] == sum(
        record["samples"][name] for name in ("kept", "quarantined", "unreadable")
    )
    resolved = CleanConfig.model_validate(yaml.safe_load((direct / "config.yaml").read_text()))
    assert resolved == CleanConfig.model_validate(settings)


def test_the_verdict_is_in_the_record_and_on_the_page(direct: Path) -> None:
    run = CleanRun.open(direct)
    assert run.verdict == run.summary["verdict"]["verdict"] == "found"
    assert run.summary["suspect"]["learned"]
    numbers = json.loads((direct / "90-report" / "report.json").read_text())
    assert numbers["finding"] == run.summary["verdict"]
    group = {"label": 1, "size": 30, "share": 0.2, "separation": 5.0, "decision": "burst", "reason": "<b>"}
    (planted,) = [one for one in numbers["groups"] if one["decision"] == "planted"]
    assert Counter(one["status"] for one in planted["examples"]).most_common(1)[0][0] == "quarantined"
    page = render(numbers | {"groups": [group, {"label": 99}]}, [None] * len(numbers["suspects"]), [[], []])
    assert "near-duplicates: copies, a burst" in page
    assert "&lt;b&gt;" in page


def test_second_call_makes_nothing_again(direct: Path, settings: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in direct.glob("*/manifest.json")}
    start(CleanConfig.model_validate(settings), direct, direct=True)
    assert {path: path.stat().st_mtime_ns for path in direct.glob("*/manifest.json")} == before


SCORERS = [
    {"kind": "toxic_direction"},
    {"kind": "rca", "model": {"epochs": 5}},
    {"kind": "robust_realnvp", "model": {"epochs": 5}},
    {"kind": "neighbours"},
]


def rows(out: Path, folder: str) -> list[dict[str, Any]]:
    return [
        row for path in sorted((out / folder / "rows").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def test_several_scorers_each_with_its_rule(
    direct: Path, settings: dict[str, Any], poisoned: Path, tmp_path: Path
) -> None:
    """Two shards are trusted: they are excluded from fitting, used as reference, and copied whole."""
    trusted = sorted(path.name for path in poisoned.glob("*.tar"))[:2]
    more = {"rules": {"rca": {"kind": "conformal", "q": 0.1}, "robust_realnvp": {"kind": "conformal", "q": 0.1}}}
    config = CleanConfig.model_validate(settings | {"scorers": SCORERS, "select": more, "trusted": trusted})
    for folder in ("00-index", "10-embedder", "20-embeddings"):
        shutil.copytree(direct / folder, tmp_path / "run" / folder)
    result = start(config, tmp_path / "run", direct=True)
    kinds = [scorer["kind"] for scorer in SCORERS]
    for kind in kinds:
        info = json.loads((tmp_path / f"run/31-scores-{kind}/scorer.json").read_text())
        assert info["exclude"] == trusted
    verdicts = rows(tmp_path / "run", "40-selection")
    of_shards = [len(rows(tmp_path / "run", f"31-scores-{kind}")) for kind in kinds]
    assert of_shards == [len(verdicts)] * len(kinds)
    for path in sorted((tmp_path / "run/40-selection/rows").glob("*.parquet"))[:2]:
        assert all(pq.read_table(path)["keep"].to_pylist())
    removed = [row for row in verdicts if not row["keep"]]
    assert {reason["stage"] for row in removed for reason in row["reasons"]} <= set(kinds)
    assert any(reason["stage"] == "toxic_direction" for row in removed for reason in row["reasons"])
    report = json.loads((tmp_path / "run/90-report/report.json").read_text())
    assert [scorer["kind"] for scorer in report["scorers"]] == kinds
    assert report["rules"]["rca"]["kind"] == "conformal"
    assert report["rules"]["neighbours"]["kind"] == "fdr"
    assert result["samples"]["quarantined"] == len(removed) == sum(c["removed"] for c in report["classes"])
    assert verify_run(str(tmp_path / "run"))[1] == []

    again = restore(out=tmp_path / "run", keys=removed[0]["key"], note="fine")
    assert again.summary["restored"] == 1
    assert again.run.clean_shards[0].startswith(again.summary["clean"])
    assert write_again(str(tmp_path / "run")).endswith("90-report.r1/index.html")

    # A rule is replayed from the scores alone: nothing before the selection is made again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[0-3]*/manifest.json")}
    for folder in ("40-selection", "50-shards", "90-report"):
        shutil.rmtree(tmp_path / "run" / folder)
    replayed = config.model_copy(update={"select": SelectConfig(rule=ContaminationRule(rate=0.02), verdict="majority")})
    start(replayed, tmp_path / "run", direct=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[0-3]*/manifest.json")} == before
    assert rows(tmp_path / "run", "40-selection") != verdicts


@pytest.mark.parametrize("kind", ["rca", "robust_realnvp"])
def test_anomaly_scorers_do_not_depend_on_order_or_groups(
    settings: dict[str, Any], poisoned: Path, direct: Path, tmp_path: Path, kind: str
) -> None:
    more = {"scorers": [{"kind": kind, "model": {"epochs": 2}}], "shards": sorted(map(str, poisoned.glob("*.tar")))}
    found = []
    for name, shards, n_groups in (("a", more["shards"], 1), ("b", more["shards"][::-1], 3)):
        for folder in ("00-index", "10-embedder", "20-embeddings"):
            shutil.copytree(direct / folder, tmp_path / name / folder)
        config = CleanConfig.model_validate(settings | more | {"shards": shards, "n_groups": n_groups})
        JOBS["clean"].function(config, Run(tmp_path / name, config.compute, n_groups))
        found.append([read_manifest(tmp_path / name / f"{f}-{kind}").digest for f in ("30-scorer", "31-scores")])
    assert found[0] == found[1]


WRONG = [
    ({"scorers": [{"kind": "rca"}, {"kind": "rca"}]}, "two are of one kind"),
    ({"scorers": []}, "at least 1 item"),
    ({"scorer": {"kind": "rca"}}, "Extra inputs"),
    ({"select": {"rules": {"rca": {"kind": "fdr"}}}}, "names rca, but the scorers are toxic_direction"),
    ({"select": {"verdict": "combined"}}, "needs p-values"),
    ({"select": {"rule": {"kind": "conformal"}}}, "name their shards under `trusted:`"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_settings_that_cannot_work_are_refused_at_the_door(more: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        CleanConfig.model_validate({"shards": ["a.tar"], **more})


@pytest.mark.prefect
@pytest.mark.parametrize(
    ("groups", "runner"),
    [
        pytest.param(1, "threads", marks=pytest.mark.slow),
        pytest.param(2, "processes", marks=pytest.mark.slow),
        (5, "threads"),
    ],
)
def test_groups_order_runner_and_prefect_change_nothing(
    direct: Path,
    settings: dict[str, Any],
    poisoned: Path,
    prefect_server: str,
    tmp_path: Path,
    groups: int,
    runner: str,
) -> None:
    shards = sorted(map(str, poisoned.glob("*.tar")), reverse=True)
    divided = {"shards": shards[groups:] + shards[:groups], "n_groups": groups, "runner": {"kind": runner}}
    config = CleanConfig.model_validate(settings | divided)
    start(config, tmp_path / "run", direct=False)
    assert digests(tmp_path / "run") == digests(direct)


# Runs the command with one change: the process is killed in the middle of the second (or only) file of one stage.
KILLED_IN = """
import os, signal, sys
from contextlib import contextmanager
from sanitize.artifacts import Part
whole, seen = Part.create, [0]
@contextmanager
def create(self, name):
    with whole(self, name) as writer:
        yield writer
        seen[0] += f".{sys.argv[1]}.partial" in str(self._folder)
        if seen[0] == int(sys.argv[2]):
            writer.flush()
            os.kill(os.getpid(), signal.SIGKILL)
Part.create = create
from flows.cli import app
app(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.prefect
def test_killed_in_every_stage_it_resumes_to_the_same_digests(
    direct: Path, config_file: Path, prefect_server: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["clean", str(config_file), "--out", str(out), "--quiet"]
    environment = os.environ | {"PREFECT_API_URL": prefect_server}
    for folder in FOLDERS:
        nth = "1" if folder in ("21-canaries", "90-report") else "2"  # they have one file
        arguments = [sys.executable, "-c", KILLED_IN, folder, nth, *command]
        killed = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (out / folder).exists()
    for folder in FOLDERS[:-1]:
        assert (out / folder).exists()
    subprocess.run([sys.executable, "-m", "flows.cli", *command], env=environment, check=True, timeout=240)
    assert digests(out) == digests(direct)
    assert not [path for path in out.rglob("*") if ".tmp-" in path.name or ".partial" in path.name]
