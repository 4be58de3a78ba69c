"""What a person does with a finished run: put samples back, verify it, write its report again."""

import json
import time
from pathlib import Path
from typing import Any

import yaml

from flows.clean import CleanConfig
from sanitize.artifacts import MANIFEST, read_manifest, verify
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Scores, Selection
from sanitize.errors import ArtifactError
from sanitize.report import write_report
from sanitize.select import RestoreConfig, Shards, restore_samples, write_selected
from sanitize.storage import exclusive


def restore(folder: Path, keys: tuple[str, ...], note: str) -> dict[str, Any]:
    """Put samples back: a new selection and new shards beside the old ones, and a line in `decisions.jsonl`.

    Raises:
        DataError: a key is not in quarantine.
        ArtifactError: `folder` is no finished run.
    """
    with exclusive(folder):
        config = _config(folder)
        before, number = _latest(folder)
        suffix = f".r{number + 1}"
        selection = restore_samples(
            RestoreConfig(keys=keys, note=note), before, str(folder / f"40-selection{suffix}"), config.compute
        )
        dataset = Dataset.load(folder / "00-index")
        shards = write_selected(config.write, dataset, selection, str(folder / f"50-shards{suffix}"), config.compute)
        decision = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "restored": sorted(keys),
            "note": note,
            "selection": selection.digest,
            "shards": shards.digest,
        }
        with (folder / "decisions.jsonl").open("a") as log:
            log.write(json.dumps(decision) + "\n")
    restored = selection.manifest().counts["restored"]
    return {"restored": restored, "clean": str(shards.file("clean")), "quarantine": str(shards.file("quarantine"))}


def verify_run(folder: Path) -> tuple[int, list[str]]:
    """Re-hash all artifacts of a run, and check the chain: every input digest is that of an artifact of the run.

    Returns:
        Number of files checked, and one line a problem.

    Raises:
        ArtifactError: there is no artifact in the folder.
    """
    artifacts = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not artifacts:
        raise ArtifactError(f"{folder} holds no finished artifact; give the folder of a run")
    manifests = {path: read_manifest(path) for path in artifacts}
    digests = {manifest.digest for manifest in manifests.values()}
    problems = []
    for path, manifest in manifests.items():
        problems += verify(path)
        for name, digest in manifest.recipe.inputs.items():
            if len(digest) == 64 and name != "weights" and digest not in digests:
                problems.append(f"{path}: its input {name} ({digest[:12]}) is no artifact of this run")
    for stage in _recorded(folder):
        path = folder / stage["folder"]
        if path not in manifests:
            problems.append(f"{path}: run.json lists it, but it is not there")
        elif manifests[path].digest != stage["digest"]:
            problems.append(f"{path}: its manifest is not the one run.json lists")
    return sum(len(manifest.files) for manifest in manifests.values()), problems


def write_again(folder: Path) -> str:
    """Write the report of the latest selection; path of the page."""
    with exclusive(folder):
        config = _config(folder)
        selection, number = _latest(folder)
        suffix = f".r{number}" if number else ""
        report = write_report(
            config.report,
            Dataset.load(folder / "00-index"),
            Scores.load(folder / "31-scores"),
            selection,
            Shards.load(folder / f"50-shards{suffix}"),
            str(folder / f"90-report{suffix}"),
            config.compute,
        )
    return str(report.file("index.html"))


def _config(folder: Path) -> CleanConfig:
    try:
        return CleanConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
    except OSError:
        raise ArtifactError(f"{folder} is not a finished run of `sanitize clean`: it has no config.yaml") from None


def _latest(folder: Path) -> tuple[Selection, int]:
    """The selection in force, and how many times samples were put back."""
    numbers = [int(path.parent.name.rpartition(".r")[2]) for path in folder.glob(f"50-shards.r*/{MANIFEST}")]
    number = max(numbers, default=0)
    return Selection.load(folder / (f"40-selection.r{number}" if number else "40-selection")), number


def _recorded(folder: Path) -> list[dict[str, Any]]:
    try:
        stages: list[dict[str, Any]] = json.loads((folder / "run.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return []
    return stages
