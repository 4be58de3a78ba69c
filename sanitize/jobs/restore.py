"""Changes to a finished run of `clean`: put samples back, write the report again."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sanitize.data.dataset import Dataset
from sanitize.data.tables import Hygiene, Scores
from sanitize.jobs.clean import CleanConfig, latest, scores_folder
from sanitize.jobs.run import read_config
from sanitize.jobs.steps import HYGIENE
from sanitize.jobs.verify import verify_run
from sanitize.models.checkpoint import Checkpoint
from sanitize.report import write_report
from sanitize.select import RestoreConfig, Shards, restore_samples, write_selected
from sanitize.storage import create, exclusive, exists, join, read_bytes

__all__ = ["config_of", "latest", "restore", "verify_run", "write_again"]


def restore(folder: str | Path, keys: str | Sequence[str], note: str = "") -> dict[str, Any]:
    """Put samples back: a new selection and new shards beside the old ones, and a line in `decisions.jsonl`.

    Args:
        folder: path or URL of a finished run of `clean`.
        keys: keys of samples in quarantine.
        note: reason, for the record.

    Returns:
        `restored`: number of samples that were put back so far; `clean` and `quarantine`: folders of the new shards.

    Raises:
        DataError: a key is not in quarantine.
        ArtifactError: `folder` is no finished run.
    """
    folder, keys = str(folder), (keys,) if isinstance(keys, str) else tuple(keys)
    with exclusive(folder):
        config = config_of(folder)
        before, number = latest(folder)
        suffix = f".r{number + 1}"
        selection = restore_samples(
            RestoreConfig(keys=keys, note=note), before, join(folder, f"40-selection{suffix}"), config.compute
        )
        dataset = Dataset.load(join(folder, "00-index"))
        shards = write_selected(config.write, dataset, selection, join(folder, f"50-shards{suffix}"), config.compute)
        decision = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "restored": sorted(keys),
            "note": note,
            "selection": selection.digest,
            "shards": shards.digest,
        }
        log = join(folder, "decisions.jsonl")
        earlier = read_bytes(log) if exists(log) else b""
        with create(log) as writer:
            writer.write(earlier + json.dumps(decision).encode() + b"\n")
    restored = selection.manifest().counts["restored"]
    return {"restored": restored, "clean": shards.url("clean"), "quarantine": shards.url("quarantine")}


def write_again(folder: str) -> str:
    """Write the report of the latest selection; returns the path or URL of the page."""
    with exclusive(folder):
        config = config_of(folder)
        selection, number = latest(folder)
        suffix = f".r{number}" if number else ""
        hygiene = join(folder, HYGIENE)
        report = write_report(
            config.report,
            Dataset.load(join(folder, "00-index")),
            [Scores.load(join(folder, scores_folder(scorer))) for scorer in config.scorers],
            selection,
            Shards.load(join(folder, f"50-shards{suffix}")),
            join(folder, f"90-report{suffix}"),
            config.compute,
            embedder=Checkpoint.load(join(folder, "10-embedder")),
            hygiene=Hygiene.load(hygiene) if exists(hygiene) else None,
        )
    return report.url("index.html")


def config_of(folder: str) -> CleanConfig:
    """The config of a finished run of `clean`. Raises ArtifactError where the folder holds none."""
    return read_config(folder, CleanConfig)
