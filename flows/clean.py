"""The main job: shards nobody can vouch for in, clean shards, quarantine and a report out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field

from flows.run import Run
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards, refuse_inside
from sanitize.data.tables import Scores, Selection
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.report import Report, ReportConfig, write_report
from sanitize.score import ScorerConfig, ToxicDirectionConfig, fit_scorer, score_shards
from sanitize.select import SelectConfig, Shards, WriteConfig, select_samples, write_selected
from sanitize.storage import create, exclusive, join


class CleanConfig(BaseModel):
    """One cleaning run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        index, embedder, embed, scorer, select, write, report: one section a stage.
        compute: device, precision, seed, threads.
        n_groups: groups of shards that are worked on side by side; None takes one a CPU core. Results do not depend
            on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...] = Field(min_length=1)
    index: IndexConfig = IndexConfig()
    embedder: EmbedderConfig = EmbedderConfig()
    embed: EmbedConfig = EmbedConfig()
    scorer: ScorerConfig = ToxicDirectionConfig()
    select: SelectConfig = SelectConfig()
    write: WriteConfig = WriteConfig()
    report: ReportConfig = ReportConfig()
    compute: Compute = Compute()
    n_groups: int | None = Field(default=None, ge=1)

    @property
    def groups(self) -> int:
        """`n_groups`, resolved."""
        return self.n_groups or os.cpu_count() or 1


class Cleaned(NamedTuple):
    """The artifacts a reader of the run wants."""

    dataset: Dataset
    scores: Scores
    selection: Selection
    shards: Shards
    report: Report


def clean(config: CleanConfig, run: Run) -> Cleaned:
    """The order of work, written once: index, embed, score, select, write, report."""
    names = list(find_shards(config.shards))
    dataset = run.sharded("00-index", index_shards, names, config.index, config.shards)
    embedder = run.stage("10-embedder", train_embedder, config.embedder, dataset)
    embeddings = run.sharded("20-embeddings", embed_shards, names, config.embed, dataset, embedder)
    fitted = run.stage("30-scorer", fit_scorer, config.scorer, embeddings)
    scores = run.sharded("31-scores", score_shards, embeddings.shards, config.scorer, fitted, embeddings)
    selection = run.stage("40-selection", select_samples, config.select, dataset, scores)
    shards = run.sharded("50-shards", write_selected, names, config.write, dataset, selection)
    report = run.stage("90-report", write_report, config.report, dataset, scores, selection, shards)
    cleaned = Cleaned(dataset, scores, selection, shards, report)
    save_config(config, run.out)
    run.save("finished", **summary(cleaned))
    return cleaned


def run_clean(config: CleanConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Run the job as a Prefect flow, or with plain function calls; both give the same digests.

    Returns:
        The `summary` of the run.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    refuse_inside(config.shards, out)
    with exclusive(out):
        if direct:
            return summary(clean(config, Run(out, config.compute)))
        from flows.tasks import clean_flow  # imports Prefect: a second that --direct need not wait for

        return dict(clean_flow(config, str(out)))


def save_config(config: CleanConfig, out: str) -> None:
    """Write the resolved configuration as `config.yaml`; the run can be repeated from it."""
    with create(join(out, "config.yaml")) as writer:
        writer.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def summary(cleaned: Cleaned) -> dict[str, Any]:
    """Counts and places, for people and machines."""
    counts = cleaned.selection.manifest().counts
    classes = cleaned.selection.read_json("selection.json")["classes"]
    return {
        "samples": {name: counts.get(name, 0) for name in ("samples", "kept", "quarantined", "unreadable")},
        "classes_touched": {label: c for label, c in classes.items() if c["removed"]},
        "damaged_shards": {
            name: shard["damage"] for name, shard in cleaned.dataset.info["shards"].items() if shard["damage"]
        },
        "clean": cleaned.shards.url("clean"),
        "quarantine": cleaned.shards.url("quarantine"),
        "report": cleaned.report.url("index.html"),
    }


STAGES: Sequence[Any] = (
    index_shards,
    train_embedder,
    embed_shards,
    fit_scorer,
    score_shards,
    select_samples,
    write_selected,
    write_report,
)
