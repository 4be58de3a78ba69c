"""The main job: shards nobody can vouch for in, clean shards, quarantine and a report out."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from sanitize.data.dataset import Dataset
from sanitize.data.index import bad_shards, index_shards
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.data.tables import Embeddings, Scores, Selection
from sanitize.embed import (
    AnyEmbedderConfig,
    EmbedConfig,
    EmbedderConfig,
    embed_shards,
)
from sanitize.errors import ConfigError
from sanitize.jobs.job import RunConfig, job
from sanitize.jobs.run import Run
from sanitize.models.checkpoint import Checkpoint
from sanitize.report import Report, ReportConfig, write_report
from sanitize.score import ScorerConfig, ToxicDirectionConfig, fit_scorer, score_shards
from sanitize.select import (
    ConformalRule,
    SelectConfig,
    Shards,
    WriteConfig,
    select_samples,
    trusted_shards,
    write_selected,
)


class CleanConfig(RunConfig):
    """One cleaning run; one YAML file.

    Attributes:
        trusted: shards that the user vouches for, by name, place or glob: nothing in them is removed, no scorer
            is fitted on them, and rule `conformal` compares with them.
        scorers: one or more, each of another kind; their rules are in `select`.
        index, embed, select, write, report: one section a stage.
        embedder: of kind classifier (the suspect model) or simclr. The latter sees no labels, so it is for `neighbours`
            (`embedding: penultimate, windows: 1`), not for toxic_direction.
    """

    trusted: tuple[str, ...] = ()
    embedder: AnyEmbedderConfig = EmbedderConfig()
    embed: EmbedConfig = EmbedConfig()
    scorers: tuple[ScorerConfig, ...] = Field(default=(ToxicDirectionConfig(),), min_length=1)
    select: SelectConfig = SelectConfig()
    write: WriteConfig = WriteConfig()
    report: ReportConfig = ReportConfig()
    n_groups: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.index.label is None:
            raise ConfigError("index.label=null reads no labels: shards can be cleaned only with them")
        kinds = [scorer.kind for scorer in self.scorers]
        if len(set(kinds)) < len(kinds):
            raise ConfigError(f"scorers: two are of one kind ({', '.join(kinds)}); run the second on the clean shards")
        conformal = [k for k, rule in self.select.rules_of(kinds).items() if isinstance(rule, ConformalRule)]
        if conformal and not self.trusted:
            raise ConfigError(
                f"rule 'conformal' of {', '.join(conformal)} compares with samples you vouch for: name their shards "
                "under `trusted:`, or take rule 'fdr'"
            )
        return self


class Cleaned(NamedTuple):
    """The artifacts a reader of the run wants."""

    dataset: Dataset
    embedder: Checkpoint
    scores: tuple[Scores, ...]
    selection: Selection
    shards: Shards
    report: Report


@job(CleanConfig)
def clean(config: CleanConfig, run: Run) -> dict[str, Any]:
    """Clean shards: index, embed, score, select, write, report.

    Returns:
        The `summary` of the run.
    """
    return summary(clean_inside(config, run))


def clean_inside(config: CleanConfig, run: Run) -> Cleaned:
    """The same for jobs that clean on their way, with the artifacts."""
    found = find_shards(config.shards)
    names, trusted = list(found), trusted_shards(config.trusted, found)
    dataset = run.sharded("00-index", index_shards, names, config.index, fingerprint_shards(found))
    embedder = run.stage("10-embedder", config.embedder.stage, config.embedder, dataset)
    embeddings = run.sharded("20-embeddings", embed_shards, names, config.embed, dataset, embedder)
    scores = tuple(_score(scorer, embeddings, trusted, run) for scorer in config.scorers)
    selection = run.stage("40-selection", select_samples, config.select, dataset, scores, trusted=trusted)
    shards = run.sharded("50-shards", write_selected, names, config.write, dataset, selection)
    report = run.stage("90-report", write_report, config.report, dataset, scores, selection, shards)
    cleaned = Cleaned(dataset, embedder, scores, selection, shards, report)
    run.finish(config, summary(cleaned))
    return cleaned


def _score(config: ScorerConfig, embeddings: Embeddings, trusted: Sequence[str], run: Run) -> Scores:
    fitted = run.stage(f"30-scorer-{config.kind}", fit_scorer, config, embeddings, exclude=trusted)
    return run.sharded(scores_folder(config), score_shards, embeddings.shards, config, fitted, embeddings)


def scores_folder(config: ScorerConfig) -> str:
    """Where a run has the scores of a scorer."""
    return f"31-scores-{config.kind}"


def summary(cleaned: Cleaned) -> dict[str, Any]:
    """Counts and places, for people and machines."""
    counts = cleaned.selection.manifest().counts
    classes = cleaned.selection.read_json("selection.json")["classes"]
    damaged = {name: shard["damage"] for name, shard in cleaned.dataset.info["shards"].items() if shard["damage"]}
    return {
        "samples": {name: counts.get(name, 0) for name in ("samples", "kept", "quarantined", "unreadable")},
        "classes_touched": {label: c for label, c in classes.items() if c["removed"]},
        "damaged_shards": damaged,
        "bad_shards": sorted(bad_shards(cleaned.dataset.info["shards"])),
        "clean": cleaned.shards.url("clean"),
        "quarantine": cleaned.shards.url("quarantine"),
        "report": cleaned.report.url("index.html"),
    }
