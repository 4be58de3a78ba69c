"""The reference of a store, which new shards are judged against. Job `reference` makes version 1 from an approved run;
`refit` makes each later version."""

import hashlib
from typing import Any, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import copy, read_manifest
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index_config import IndexConfig
from sanitize.data.tables import Embeddings, Scores
from sanitize.drift import Projection, Statistics, StatisticsConfig, fit_projection, summarise_shards
from sanitize.drift.statistics import CALIBRATE
from sanitize.embed import EmbedConfig
from sanitize.errors import ArtifactError, ConfigError, RequestError
from sanitize.jobs.clean import CleanConfig, latest, scores_folder
from sanitize.jobs.job import DecisionConfig, job
from sanitize.jobs.run import Run, read_config, save_config
from sanitize.jobs.steps import like
from sanitize.jobs.store import IngestStore, approval
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
        """From the config of a run. Raises ConfigError where samples are not judged one by one, by one picture."""
        if run.select.verdict == "combined":
            raise ConfigError("a run with verdict 'combined' judges all samples together: approve one with any or all")
        if run.index.has_several:
            raise ConfigError(
                "a run with index.image.member=all cannot be a reference, which judges one picture a sample; approve a "
                "run with index.image.member set to its suffix, such as left.jpg, or to first"
            )
        image = run.index.image.model_copy(update={"size": dataset.image_shape[1:]})
        index = like(run.index, dataset).model_copy(update={"image": image})
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


def outdated(reference: Reference) -> str:
    """Reason why this version of sanitize cannot judge new shards by a reference of an older one; "" if it can."""
    for config, fitted in zip(reference.config.scorers, reference.fitted, strict=True):
        if fitted.info["config"] != config.model_dump(mode="json"):
            return f"the settings of scorer {config.kind} have changed since"
    try:
        reference.config.judge.select.rules_of(
            {one.info["config"]["kind"]: one.info.get("rule") for one in reference.fitted}
        )
    except ConfigError as error:
        return str(error)
    return ""


def refuse_outdated(reference: Reference, store: str) -> None:
    """Raise RequestError where a reference was made by an older version of sanitize and has to be fitted again."""
    if why := outdated(reference):
        raise RequestError(
            f"reference v{reference.version:04d} was made by an older version of sanitize: `sanitize refit --store "
            f"{store}` fits its scorers again, from what the store holds. The reason: {why}"
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


class ReferenceRunConfig(DecisionConfig):
    """Config of the first reference of a store.

    Attributes:
        run: path or URL of the approved run of `clean`; where samples were put back, the latest decision counts.
        statistics: settings of the statistics that are kept of the run.
        level: probability in (0, 0.5) that a scorer flags a clean sample; None takes the rules of the run. See
            `JudgeConfig`.
    """

    run: str
    statistics: StatisticsConfig = StatisticsConfig()
    level: float | None = Field(default=0.001, gt=0, lt=0.5)


@job(ReferenceRunConfig, IngestStore, claims=False, has_flow=False)
def reference(config: ReferenceRunConfig, run: Run) -> dict[str, Any]:
    """Approve a finished run of `clean` as the reference of a store, which new shards are judged against.

    Returns:
        `reference`: the version; `folder`; number of `shards`; `samples` seen, and stored for each half; `level`.

    Raises:
        ConfigError: the run cannot be a reference.
        RequestError: the store has a reference.
    """
    approved, dataset = read_config(config.run, CleanConfig), Dataset.load(join(config.run, "00-index"))
    kept = ReferenceConfig.of_run(approved, dataset, config.statistics, config.level)
    selection, number = latest(config.run)
    shards = Shards.load(join(config.run, f"50-shards.r{number}" if number else "50-shards"))
    ledger = Ledger(run.out)
    with exclusive(join(run.out, "reference")):
        _refuse_second(ledger.read())
        inside = begin(1, config.compute_after(kept.compute), run)
        copy(Checkpoint.load(join(config.run, EMBEDDER)), join(inside.out, EMBEDDER))
        embeddings = Embeddings.load(join(config.run, "20-embeddings"))
        projection = inside.stage(PROJECTION, fit_projection, kept.statistics, embeddings, selection)
        inputs = kept.statistics, dataset, embeddings, selection, projection
        stored = inside.stage(STATISTICS, summarise_shards, *inputs)
        fit_scorers(kept, stored, inside)
        entry = ReferenceEntry(
            version=1,
            digests=digests_of(inside),
            config=sha256_file(join(inside.out, CONFIG)),
            shards=_offered(dataset),
            clean=clean_shards(shards, "", absolute(shards.path) if is_local(shards.path) else shards.path),
            **approval("", config.note),
        )

        def decide(state: State) -> ReferenceEntry:
            _refuse_second(state)
            return entry

        ledger.append(decide)
    return {
        "reference": 1,
        "folder": inside.out,
        "shards": len(entry.shards),
        "samples": n_samples(stored),
        "level": config.level,
    }


def clean_shards(shards: Shards, batch: str, folder: str) -> tuple[CleanShard, ...]:
    """Lines of the feed for written shards; `folder` is their place for readers. Empty shards are left out."""
    described = shards.read_json("dataset.json")["shards"]
    return tuple(
        CleanShard(shard=join(folder, name), batch=batch, **facts)
        for name, facts in sorted(described.items())
        if facts["samples"]
    )


def fit_scorers(config: ReferenceConfig, stored: Statistics, run: Run) -> None:
    """Fit scorers on one half of the sample, and score both halves."""
    for half in stored.shards:
        if not len(stored.rows(half, ["label"])):
            raise ConfigError(f"the run has too few samples for a reference: none is left to {half}")
    for scorer in config.scorers:
        fitted = run.stage(f"30-scorer-{scorer.kind}", fit_scorer, scorer, stored, exclude=[CALIBRATE])
        run.sharded(scores_folder(scorer), score_shards, stored.shards, scorer, fitted, stored)
    save_config(config, run.out)
    run.save("finished")


def begin(version: int, compute: Compute, run: Run) -> Run:
    """A run in a fresh folder of the store `run.out`, for a version that the ledger does not have; leftovers may come
    from other batches."""
    remove(version_folder(run.out, version))
    return run.inside(f"reference/{_name(version)}", compute)


def version_folder(store: str, version: int) -> str:
    """Folder of a version of the reference."""
    return join(store, "reference", _name(version))


def _name(version: int) -> str:
    return f"v{version:04d}"


def _refuse_second(state: State) -> None:
    if state.references:
        raise RequestError(
            f"the store has reference v{state.reference.version:04d}; `sanitize refit` makes the next one, and another "
            "run is the beginning of another store"
        )


def digests_of(run: Run) -> dict[str, str]:
    """Folder -> digest of each artifact of a version."""
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


def n_samples(stored: Statistics) -> dict[str, int]:
    """Number of samples `seen`, and stored for each half."""
    return {"seen": stored.manifest().counts["samples"]} | {
        half: len(stored.rows(half, ["label"])) for half in stored.shards
    }
