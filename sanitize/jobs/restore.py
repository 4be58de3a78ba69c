"""Changes to a finished run of `clean`: put samples back, write the report again."""

import json
import time
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from sanitize.data.dataset import Dataset
from sanitize.data.tables import Hygiene, Scores
from sanitize.errors import ArtifactError
from sanitize.jobs.clean import CleanConfig, CleanRun, latest, scores_folder
from sanitize.jobs.job import DecisionConfig, job
from sanitize.jobs.result import CallResult
from sanitize.jobs.run import Run, read_config
from sanitize.jobs.steps import HYGIENE
from sanitize.jobs.verify import verify_run
from sanitize.models.checkpoint import Checkpoint
from sanitize.report import write_report
from sanitize.select import RestoreConfig, Shards, restore_samples, write_selected
from sanitize.storage import create, exclusive, exists, join, read_bytes

__all__ = ["config_of", "latest", "restore", "verify_run", "write_again"]


class RestoreRunConfig(DecisionConfig):
    """Config of a decision to put samples back.

    Attributes:
        keys: keys of samples in quarantine; "SHARD:KEY" where a key occurs in several shards.
    """

    keys: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Restored(CallResult):
    """A run of `clean` after samples were put back; `run` has its clean shards."""

    place = "finished run of `clean`"

    @property
    def run(self) -> CleanRun:
        """The run, in which the latest decision counts."""
        return CleanRun.open(self.folder)


@job(RestoreRunConfig, Restored, has_flow=False)
def restore(config: RestoreRunConfig, run: Run) -> dict[str, Any]:
    """Put samples back: a new selection and new shards beside the old ones, and a line in `decisions.jsonl`.

    Returns:
        `restored`: number of samples that were put back so far; `clean` and `quarantine`: folders of the new shards.

    Raises:
        DataError: a key is not in quarantine.
        ArtifactError: the folder is no finished run.
    """
    folder = run.out
    cleaned = config_of(folder)
    compute = config.compute_after(cleaned.compute)
    before, number = latest(folder)
    suffix = f".r{number + 1}"
    decided = RestoreConfig(keys=config.keys, note=config.note)
    selection = restore_samples(decided, before, join(folder, f"40-selection{suffix}"), compute)
    dataset = Dataset.load(join(folder, "00-index"))
    shards = write_selected(cleaned.write, dataset, selection, join(folder, f"50-shards{suffix}"), compute)
    decision = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "restored": sorted(config.keys),
        "note": config.note,
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
    """Write the report of the latest selection again; returns the path or URL of the page.

    Raises:
        ArtifactError: the folder is no finished run of `clean`; the message names the page of another run.
    """
    with exclusive(folder):
        config = _shown_config(folder)
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


def _shown_config(folder: str) -> CleanConfig:
    try:
        return config_of(folder)
    except ArtifactError as error:
        page = join(folder, "90-report", "index.html")
        if not exists(page):
            raise
        raise ArtifactError(f"{error}, the only runs whose report is written again; its page is {page}") from error


def config_of(folder: str) -> CleanConfig:
    """The config of a finished run of `clean`. Raises ArtifactError where the folder holds none."""
    return read_config(folder, CleanConfig)
