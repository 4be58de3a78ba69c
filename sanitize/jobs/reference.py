"""The reference of a store, which new shards are judged against. Version 1 is made from an approved run, each later
version by merging the statistics of the batches accepted since; no old shard is read again."""

import getpass
import hashlib
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import copy, read_manifest
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig
from sanitize.data.tables import Embeddings, Scores
from sanitize.drift import (
    Projection,
    Statistics,
    StatisticsConfig,
    fit_projection,
    merge_statistics,
    summarise_shards,
)
from sanitize.drift.statistics import CALIBRATE
from sanitize.embed import EmbedConfig
from sanitize.errors import ArtifactError, ConfigError
from sanitize.jobs.clean import CleanConfig, latest, scores_folder
from sanitize.jobs.run import Run, read_config, save_config
from sanitize.lease import check_held
from sanitize.ledger import CleanShard, Ledger, Offered, ReferenceEntry, State
from sanitize.models.checkpoint import Checkpoint
from sanitize.score import FittedScorer, ScorerConfig, fit_scorer, score_shards
from sanitize.select import JudgeConfig, Shards
from sanitize.storage import absolute, exclusive, is_local, join, read_bytes, remove, sha256_file

EMBEDDER, PROJECTION, STATISTICS = "10-embedder", "20-projection", "21-statistics"  # folders of a version
BATCH_STATISTICS = "60-statistics"  # folder of a batch
CONFIG = "config.yaml"


class ReferenceConfig(BaseModel):
    """Settings by which new shards are processed, the same as in the approved run.

    Attributes:
        index, embed, scorers: settings of the approved run, with its classes and image size.
        judge: rules of the approved run, and the level for samples that are judged one by one.
        statistics: settings of the statistics that are kept.
        compute: seed and precision of every batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: IndexConfig
    embed: EmbedConfig
    scorers: tuple[ScorerConfig, ...] = Field(min_length=1)
    judge: JudgeConfig
    statistics: StatisticsConfig
    compute: Compute

    @classmethod
    def of_run(cls, run: CleanConfig, dataset: Dataset, statistics: StatisticsConfig, level: float | None) -> Self:
        """From the config of a run. Raises ConfigError where its rules cannot judge samples one by one."""
        if run.select.verdict == "combined":
            raise ConfigError("a run with verdict 'combined' judges all samples together: approve one with any or all")
        image = run.index.image.model_copy(update={"size": dataset.image_shape[1:]})
        index = run.index.model_copy(update={"n_classes": dataset.n_classes, "image": image})
        judge = JudgeConfig(select=run.select, level=level)
        return cls(
            index=index, embed=run.embed, scorers=run.scorers, judge=judge, statistics=statistics, compute=run.compute
        )


class Reference(NamedTuple):
    """Handles of the artifacts of one version."""

    version: int
    config: ReferenceConfig
    embedder: Checkpoint
    projection: Projection
    statistics: Statistics
    fitted: tuple[FittedScorer, ...]
    scores: tuple[Scores, ...]


def load_reference(store: str, entry: ReferenceEntry, trust_code: bool = False) -> Reference:
    """Load a version of the reference. Raises ArtifactError where a folder differs from the ledger.

    Args:
        store: path or URL of the store.
        entry: entry of the version in the ledger.
        trust_code: True allows the embedder to run code that it names, see `sanitize.load_model`.
    """
    folder = version_folder(store, entry.version)
    for name, digest in entry.digests.items():
        if read_manifest(join(folder, name)).digest != digest:
            raise ArtifactError(f"{join(folder, name)} is not the artifact that the ledger names")
    config = _read_config(join(folder, CONFIG), entry.config)
    return Reference(
        entry.version,
        config,
        Checkpoint.load(join(folder, EMBEDDER)).model_copy(update={"trust_code": trust_code}),
        Projection.load(join(folder, PROJECTION)),
        Statistics.load(join(folder, STATISTICS)),
        tuple(FittedScorer.load(join(folder, f"30-scorer-{scorer.kind}")) for scorer in config.scorers),
        tuple(Scores.load(join(folder, scores_folder(scorer))) for scorer in config.scorers),
    )


def _read_config(url: str, sha256: str) -> ReferenceConfig:
    """The settings of a version; ledgers of older versions have no sha256 of the file."""
    try:
        data = read_bytes(url)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise ArtifactError(f"{url} is not what the ledger names")
        return ReferenceConfig.model_validate(yaml.safe_load(data))
    except FileNotFoundError:
        raise ArtifactError(f"{url} is missing") from None
    except (yaml.YAMLError, ValueError, RecursionError, ConfigError) as error:
        raise ArtifactError(f"{url} is damaged: {error}") from error


def make_reference(
    run: str | Path,
    store: str | Path,
    statistics: StatisticsConfig | None = None,
    level: float | None = 0.001,
    note: str = "",
) -> dict[str, Any]:
    """Make version 1 of a reference from a finished and approved run of `clean`.

    Args:
        run: path or URL of the run folder; where samples were put back, the latest decision counts.
        store: path or URL of the folder for batches and ledger.
        statistics: settings of the statistics that are kept of the run; None takes the defaults.
        level: probability in (0, 1) that a scorer flags a clean sample; None takes the rules of the run. See
            `JudgeConfig`.
        note: reason of the approval.

    Returns:
        `reference`: the version; `folder`; number of `shards`; `samples` seen, and stored for each half; `level`.

    Raises:
        ConfigError: the store has a reference, or the run cannot be one.
    """
    run, store, statistics = str(run), str(store), statistics or StatisticsConfig()
    made, dataset = read_config(run, CleanConfig), Dataset.load(join(run, "00-index"))
    config = ReferenceConfig.of_run(made, dataset, statistics, level)
    selection, number = latest(run)
    shards = Shards.load(join(run, f"50-shards.r{number}" if number else "50-shards"))
    ledger = Ledger(store)
    with exclusive(join(store, "reference")):
        _refuse_second(ledger.read())
        version_run = _begin(store, 1, config)
        copy(Checkpoint.load(join(run, EMBEDDER)), join(version_run.out, EMBEDDER))
        embeddings = Embeddings.load(join(run, "20-embeddings"))
        projection = version_run.stage(PROJECTION, fit_projection, statistics, embeddings, selection)
        inputs = statistics, dataset, embeddings, selection, projection
        stored = version_run.stage(STATISTICS, summarise_shards, *inputs)
        _fit(config, stored, version_run)
        entry = ReferenceEntry(
            version=1,
            digests=_digests(version_run),
            config=sha256_file(join(version_run.out, CONFIG)),
            shards=_offered(dataset),
            clean=clean_shards(shards, "", absolute(shards.path) if is_local(shards.path) else shards.path),
            **approval("", note),
        )

        def decide(state: State) -> ReferenceEntry:
            _refuse_second(state)
            return entry

        ledger.append(decide)
    return {
        "reference": 1,
        "folder": version_run.out,
        "shards": len(entry.shards),
        "samples": _n_samples(stored),
        "level": level,
    }


def refit(store: str | Path, note: str = "") -> dict[str, Any]:
    """Make the next version of a reference: the last one merged with the batches released since; scorers are refitted.

    Args:
        store: path or URL of the store.
        note: reason.

    Returns:
        `reference`: the version; `folder`; the `merged` batches; `samples` seen, and stored for each half; `level`.

    Raises:
        ConfigError: there is no reference, or no batch was released since.
    """
    store = str(store)
    ledger = Ledger(store)
    with exclusive(join(store, "reference")):
        state = ledger.read()
        last = load_reference(store, state.reference)
        batches = unmerged(state)
        if not batches:
            raise ConfigError(f"no batch was released since reference v{last.version:04d}: nothing to merge")
        version_run = _begin(store, last.version + 1, last.config)
        copy(last.embedder, join(version_run.out, EMBEDDER))
        copy(last.projection, join(version_run.out, PROJECTION))
        parts = [last.statistics, *(_committed_statistics(store, state, name) for name in batches)]
        stored = version_run.stage(STATISTICS, merge_statistics, last.config.statistics, parts)
        _fit(last.config, stored, version_run)
        entry = ReferenceEntry(
            version=last.version + 1,
            digests=_digests(version_run),
            config=sha256_file(join(version_run.out, CONFIG)),
            merged=tuple(batches),
            **approval("", note),
        )

        def decide(state: State) -> ReferenceEntry:
            check_held(join(store, "reference"))  # with the lock, no other process makes versions
            if state.reference.version != last.version:  # the lock was lost to another process
                raise ArtifactError(f"reference v{state.reference.version:04d} was made meanwhile; run again")
            return entry

        ledger.append(decide)
    return {
        "reference": entry.version,
        "folder": version_run.out,
        "merged": list(batches),
        "samples": _n_samples(stored),
        "level": last.config.judge.level,
    }


def _committed_statistics(store: str, state: State, batch: str) -> Statistics:
    statistics, commit = Statistics.load(join(store, "batches", batch, BATCH_STATISTICS)), state.batches[batch].commit
    if commit is None or commit.digests[BATCH_STATISTICS] != statistics.digest:
        raise ArtifactError(f"{statistics.path} is not what was committed to the ledger")
    return statistics


def unmerged(state: State) -> list[str]:
    """Released batches that are in no version of the reference; sorted, as the order of merging changes rounding."""
    merged = {name for entry in state.references.values() for name in entry.merged}
    return sorted(name for name, batch in state.batches.items() if batch.is_released and name not in merged)


def clean_shards(shards: Shards, batch: str, folder: str) -> tuple[CleanShard, ...]:
    """Lines of the feed for written shards; `folder` is their place for readers. Empty shards are left out."""
    described = shards.read_json("dataset.json")["shards"]
    return tuple(
        CleanShard(shard=join(folder, name), batch=batch, **facts)
        for name, facts in sorted(described.items())
        if facts["samples"]
    )


def _fit(config: ReferenceConfig, stored: Statistics, run: Run) -> None:
    """Fit scorers on one half of the sample, and score both halves."""
    for half in stored.shards:
        if not len(stored.rows(half, ["label"])):
            raise ConfigError(f"the run has too few samples for a reference: none is left to {half}")
    for scorer in config.scorers:
        fitted = run.stage(f"30-scorer-{scorer.kind}", fit_scorer, scorer, stored, exclude=[CALIBRATE])
        run.sharded(scores_folder(scorer), score_shards, stored.shards, scorer, fitted, stored)
    save_config(config, run.out)
    run.save("finished")


def _begin(store: str, version: int, config: ReferenceConfig) -> Run:
    """A fresh folder for a version that the ledger does not have; leftovers may come from other batches."""
    folder = version_folder(store, version)
    remove(folder)
    return Run(folder, config.compute)


def version_folder(store: str, version: int) -> str:
    """Folder of a version of the reference."""
    return join(store, "reference", f"v{version:04d}")


def _refuse_second(state: State) -> None:
    if state.references:
        raise ConfigError(
            f"the store has reference v{state.reference.version:04d}; `sanitize refit` makes the next one, and another "
            "run is the beginning of another store"
        )


def _digests(run: Run) -> dict[str, str]:
    folders = [EMBEDDER, PROJECTION, *(stage["folder"] for stage in run.stages)]
    return {name: read_manifest(join(run.out, name)).digest for name in sorted(set(folders))}


def _offered(dataset: Dataset) -> tuple[Offered, ...]:
    """The shards of the run as entries of the ledger, so that ingest does not take them for new ones."""
    sources = dataset.manifest().sources
    return tuple(
        Offered(
            url=str(source["url"]),
            size=int(source["size"]),
            modified=str(source["modified"]),
            sha256=dataset.info["shards"][name]["sha256"],
        )
        for name, source in sorted(sources.items())
    )


def _n_samples(stored: Statistics) -> dict[str, int]:
    return {"seen": stored.manifest().counts["samples"]} | {
        half: len(stored.rows(half, ["label"])) for half in stored.shards
    }


def approval(by: str, note: str) -> dict[str, str]:
    """User, time and reason of a decision."""
    return {"by": by or getpass.getuser(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "note": note}
