"""What a person does with a finished run: put samples back, write its report again."""

import json
import time
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sanitize.artifacts import first_line, first_problem
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Scores, Selection
from sanitize.errors import ArtifactError, SanitizeError
from sanitize.jobs.clean import CleanConfig, scores_folder
from sanitize.jobs.verify import artifacts_of, verify_run
from sanitize.report import write_report
from sanitize.select import RestoreConfig, Shards, restore_samples, write_selected
from sanitize.storage import create, exclusive, exists, join, read_bytes

__all__ = ["config_of", "latest", "restore", "verify_run", "write_again"]

C = TypeVar("C", bound=BaseModel)


def restore(folder: str, keys: tuple[str, ...], note: str) -> dict[str, Any]:
    """Put samples back: a new selection and new shards beside the old ones, and a line in `decisions.jsonl`.

    Raises:
        DataError: a key is not in quarantine.
        ArtifactError: `folder` is no finished run.
    """
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
    """Write the report of the latest selection; path of the page."""
    with exclusive(folder):
        config = config_of(folder)
        selection, number = latest(folder)
        suffix = f".r{number}" if number else ""
        report = write_report(
            config.report,
            Dataset.load(join(folder, "00-index")),
            [Scores.load(join(folder, scores_folder(scorer))) for scorer in config.scorers],
            selection,
            Shards.load(join(folder, f"50-shards{suffix}")),
            join(folder, f"90-report{suffix}"),
            config.compute,
        )
    return report.url("index.html")


def config_of(folder: str) -> CleanConfig:
    """What a finished run was asked for. Raises ArtifactError where it is none."""
    return written_config(folder, CleanConfig)


def written_config(folder: str, kind: type[C]) -> C:
    """The `config.yaml` of a folder. Raises ArtifactError where there is none, or it is of another kind."""
    try:
        return kind.model_validate(yaml.safe_load(read_bytes(join(folder, "config.yaml"))))
    except OSError:
        raise ArtifactError(f"{folder} is not a finished run of `sanitize clean`: it has no config.yaml") from None
    except (yaml.YAMLError, RecursionError, ValueError, SanitizeError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise ArtifactError(f"{join(folder, 'config.yaml')} is no {kind.__name__}: {why}") from error


def latest(folder: str) -> tuple[Selection, int]:
    """The selection of a finished run that is in force, and how many times samples were put back."""
    names = artifacts_of(folder)
    number = max((int(name.rpartition(".r")[2]) for name in names if name.startswith("50-shards.r")), default=0)
    return Selection.load(join(folder, f"40-selection.r{number}" if number else "40-selection")), number
