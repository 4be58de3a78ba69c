"""The clean job end to end: the same verdicts however it is called, divided, ordered or interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from flows.clean import CleanConfig, run_clean
from sanitize.artifacts import read_manifest

FOLDERS = (
    "00-index",
    "10-embedder",
    "20-embeddings",
    "30-scorer",
    "31-scores",
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


def test_second_call_makes_nothing_again(direct: Path, settings: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in direct.glob("*/manifest.json")}
    run_clean(CleanConfig.model_validate(settings), direct, direct=True)
    assert {path: path.stat().st_mtime_ns for path in direct.glob("*/manifest.json")} == before


@pytest.mark.prefect
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups_order_and_prefect_change_nothing(
    direct: Path, settings: dict[str, Any], poisoned: Path, prefect_server: str, tmp_path: Path, groups: int
) -> None:
    shards = sorted(map(str, poisoned.glob("*.tar")), reverse=True)
    config = CleanConfig.model_validate(settings | {"shards": shards[groups:] + shards[:groups], "n_groups": groups})
    run_clean(config, tmp_path / "run", direct=False)
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


@pytest.mark.prefect
def test_killed_in_every_stage_it_resumes_to_the_same_digests(
    direct: Path, config_file: Path, prefect_server: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["clean", str(config_file), "--out", str(out), "--quiet"]
    environment = os.environ | {"PREFECT_API_URL": prefect_server}
    for folder in FOLDERS:
        nth = "1" if folder == "90-report" else "2"
        arguments = [sys.executable, "-c", KILLED_IN, folder, nth, *command]
        killed = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (out / folder).exists()
    for folder in FOLDERS[:-1]:
        assert (out / folder).exists()
    subprocess.run([sys.executable, "-m", "flows.cli", *command], env=environment, check=True, timeout=240)
    assert digests(out) == digests(direct)
    assert not [path for path in out.rglob("*") if ".tmp-" in path.name or ".partial" in path.name]
