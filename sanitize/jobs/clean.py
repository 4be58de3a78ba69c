"""The main job: untrusted shards in, clean shards, quarantine shards and a report out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from sanitize.artifacts import Artifact
from sanitize.data.bad_data import bad_shards
from sanitize.data.canaries import Canaries
from sanitize.data.dataset import Dataset
from sanitize.data.index import index_shards
from sanitize.data.index_config import IndexConfig
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.data.tables import Embeddings, Hygiene, Scores, Selection
from sanitize.embed import (
    EMBEDDINGS,
    AnyEmbedderConfig,
    EmbedConfig,
    EmbedderConfig,
    SimCLRConfig,
    embed_canaries,
    embed_shards,
    plant_canaries,
)
from sanitize.errors import ConfigError
from sanitize.hygiene import HygieneConfig, check_hygiene
from sanitize.jobs.job import RunConfig, job
from sanitize.jobs.result import JobRun
from sanitize.jobs.run import Run
from sanitize.jobs.steps import HYGIENE, with_facts
from sanitize.jobs.verify import artifacts_of
from sanitize.models.checkpoint import Checkpoint
from sanitize.report import Report, ReportConfig, finding_of, write_report
from sanitize.score import ScorerConfig, ToxicDirectionConfig, fit_scorer, score_shards
from sanitize.select import (
    Rule,
    SelectConfig,
    Shards,
    WriteConfig,
    select_samples,
    trusted_shards,
    write_selected,
)
from sanitize.storage import join

MAX_SIDE = 64  # pixels


class CleanConfig(RunConfig):
    """Config of one cleaning run; one YAML file.

    Attributes:
        index: as for all jobs, but with other defaults of `image`: max_side 64 (the suspect model learns photographs in
            minutes) and crop False (a trigger in a corner stays visible).
        trusted: name, place or glob of shards with trusted samples. None of them is removed, no scorer is fitted on
            them, and rule `conformal` compares with them.
        embedder: kind classifier (the suspect model) or simclr. SimCLR sees no labels; it suits scorer `neighbours`
            (`embedding: penultimate, windows: 1`), not toxic_direction.
        scorers: one or more scorers of different kinds; their rules are in `select`.
        hygiene: duplicates, images of low quality and the like, found without a model; None leaves them out. Kinds in
            `hygiene.quarantine` put samples into quarantine.
        embed, select, write, report: sections of the stages.
    """

    has_several: ClassVar[bool] = True

    trusted: tuple[str, ...] = ()
    index: IndexConfig = Field(default=IndexConfig(), validate_default=True)
    embedder: AnyEmbedderConfig = EmbedderConfig()
    hygiene: HygieneConfig | None = HygieneConfig()
    embed: EmbedConfig = EmbedConfig()
    scorers: tuple[ScorerConfig, ...] = Field(default=(ToxicDirectionConfig(),), min_length=1)
    select: SelectConfig = SelectConfig()
    write: WriteConfig = WriteConfig()
    report: ReportConfig = ReportConfig()
    n_groups: int | None = Field(default=None, ge=1)

    @field_validator("index")
    @classmethod
    def _size_of_the_suspect(cls, index: IndexConfig) -> IndexConfig:
        """Images are scaled down to `MAX_SIDE` and not cropped, unless settings say otherwise."""
        defaults = {"max_side": MAX_SIDE, "crop": False}
        missing = {name: value for name, value in defaults.items() if name not in index.image.model_fields_set}
        return index.model_copy(update={"image": index.image.model_copy(update=missing)})

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.index.label is None and not isinstance(self.embedder, SimCLRConfig):
            raise ConfigError(
                f"index.label=null reads no labels, and embedder {self.embedder.kind!r} needs them: set "
                "embedder.kind=simclr, and scorers such as [{kind: rca}]"
            )
        for scorer in self.scorers:
            if scorer.embedding not in EMBEDDINGS:
                there = ", ".join(EMBEDDINGS)
                raise ConfigError(f"scorers: {scorer.kind} reads embedding {scorer.embedding!r}; there are {there}")
        kinds = [scorer.kind for scorer in self.scorers]
        if len(set(kinds)) < len(kinds):
            raise ConfigError(f"scorers: two are of one kind ({', '.join(kinds)}); run the second on the clean shards")
        for kind, rule in self.rules.items():
            if rule.scorers and kind not in rule.scorers:
                raise ConfigError(
                    f"rule {rule.kind!r} judges the scores of {' and '.join(rule.scorers)} alone, not of {kind}; set "
                    f"select.rules: {{{kind}: {{kind: fdr}}}}, or conformal, or contamination"
                )
            if rule.needs_trusted and not self.trusted:
                raise ConfigError(
                    f"rule {rule.kind!r} of {kind} compares with trusted samples: name their shards under `trusted:`, "
                    "or take rule 'fdr'"
                )
        return self

    @property
    def rules(self) -> dict[str, Rule]:
        """The rule of each scorer, by its kind."""
        return self.select.rules_of({scorer.kind: scorer.rule for scorer in self.scorers})


class Cleaned(NamedTuple):
    """Artifacts of a cleaning run."""

    dataset: Dataset
    hygiene: Hygiene | None
    embedder: Checkpoint
    scores: tuple[Scores, ...]
    selection: Selection
    shards: Shards
    report: Report


@dataclass(frozen=True)
class CleanRun(JobRun):
    """A finished run of `clean`. Where samples were put back (`restore`), the latest decision counts."""

    kind = CleanConfig

    @property
    def verdict(self) -> str:
        """Verdict on the data set at the end of the run: "found", "nothing" (stood out) or "inconclusive".

        `summary["verdict"]` has the reasons, and the settings that would help.
        """
        return str(self.summary["verdict"]["verdict"])

    @property
    def clean_shards(self) -> list[str]:
        """Paths or URLs of the clean shards, sorted."""
        return self._shards().clean()

    @property
    def quarantine(self) -> list[str]:
        """Paths or URLs of the quarantine shards, sorted."""
        shards = self._shards()
        return [shards.url(name) for name in sorted(shards.manifest().files) if name.startswith("quarantine/")]

    @property
    def report(self) -> str:
        """Path or URL of the report page; the last one that was written."""
        numbers = [_restored(name) for name in artifacts_of(self.folder) if name.startswith("90-report")]
        return self._in(_numbered("90-report", max(numbers, default=0)), "index.html")

    def verdicts(self) -> pa.Table:
        """The verdict on every sample, in the order of shards and positions; the whole table is held in memory.

        Returns:
            Columns shard, position, key, label, status (kept, quarantined or unreadable), keep, reasons, and for each
            scorer score_KIND (float32; null where the sample is unreadable). With `index.image.member: all` one row a
            picture, with the columns sample (its number in the shard) and member (name of the picture) behind key.
        """
        selection, _ = latest(self.folder)
        scores = {scorer.kind: Scores.load(self._in(scores_folder(scorer))) for scorer in self.config.scorers}
        return pa.concat_tables(_verdicts(selection, scores, shard) for shard in selection.shards)

    def _shards(self) -> Shards:
        return Shards.load(self._in(_numbered("50-shards", latest(self.folder)[1])))


def _verdicts(selection: Selection, scores: dict[str, Scores], shard: str) -> pa.Table:
    rows = selection.rows(shard)
    several = ["sample", "member"] if selection.has_several else []
    rows = rows.select(["position", "key", *several, "label", "status", "keep", "reasons"])
    rows = rows.add_column(0, "shard", pa.array([shard] * len(rows), pa.string()))
    positions = rows["position"].to_numpy()
    for kind, of_scorer in scores.items():
        scored = of_scorer.rows(shard, ["position", "score"])
        at = np.searchsorted(positions, scored["position"].to_numpy())
        values, is_missing = np.zeros(len(rows), np.float32), np.ones(len(rows), bool)
        values[at], is_missing[at] = scored["score"].to_numpy(), False
        rows = rows.append_column(f"score_{kind}", pa.array(values, mask=is_missing))
    return rows


def latest(folder: str) -> tuple[Selection, int]:
    """The latest selection of a finished run, and the number of times that samples were put back."""
    number = max((_restored(name) for name in artifacts_of(folder) if name.startswith("50-shards")), default=0)
    return Selection.load(join(folder, _numbered("40-selection", number))), number


def _restored(folder: str) -> int:
    """Number in the name of an artifact that was made after samples were put back; 0 for those of the run itself."""
    return int(folder.rpartition(".r")[2]) if ".r" in folder else 0


def _numbered(folder: str, number: int) -> str:
    return f"{folder}.r{number}" if number else folder


@job(CleanConfig, CleanRun)
def clean(config: CleanConfig, run: Run) -> dict[str, Any]:
    """Find poisoned samples; write clean shards, quarantine shards and a report.

    Stages: index, plant canaries, embed, score, select, write, report. Samples that stay are copied byte for byte.

    Returns:
        The `summary` of the run.
    """
    return summary(clean_inside(config, run))


def clean_inside(config: CleanConfig, run: Run) -> Cleaned:
    """The order of work, for jobs that have a cleaning run inside them; returns the artifacts."""
    found = find_shards(config.shards)
    names, trusted = list(found), trusted_shards(config.trusted, found)
    index = with_facts(config.index, config.hygiene is not None).named(found.values())
    dataset = run.sharded("00-index", index_shards, names, index, fingerprint_shards(found))
    for rule in config.rules.values():
        rule.check_trusted(_n_usable(dataset, trusted))  # before anything is trained
    hygiene, unclean = None, {}
    if config.hygiene is not None:
        hygiene = run.stage(HYGIENE, check_hygiene, config.hygiene, dataset)
        unclean = {"hygiene": hygiene, "quarantine": config.hygiene.quarantine}
    planted = _plant(config.embedder, dataset, run)
    embedder = run.stage("10-embedder", config.embedder.build(), config.embedder, dataset, **planted)
    embeddings = run.sharded("20-embeddings", embed_shards, names, config.embed, dataset, embedder)
    seen: dict[str, Artifact] = {"dataset": dataset, "model": embedder, **planted}
    for canaries in planted.values():
        seen["embedded_canaries"] = run.stage("21-canaries", embed_canaries, config.embed, canaries, embedder)
    scores = tuple(_score(scorer, embeddings, trusted, seen, run) for scorer in config.scorers)
    selection = run.stage("40-selection", select_samples, config.select, dataset, scores, trusted=trusted, **unclean)
    shards = run.sharded("50-shards", write_selected, names, config.write, dataset, selection)
    shown = {"embedder": embedder, "hygiene": hygiene}
    report = run.stage("90-report", write_report, config.report, dataset, scores, selection, shards, **shown)
    cleaned = Cleaned(dataset, hygiene, embedder, scores, selection, shards, report)
    run.finish(config, summary(cleaned))
    return cleaned


def _n_usable(dataset: Dataset, shards: Sequence[str]) -> int:
    counts = [dataset.info["shards"][shard]["counts"] for shard in shards]
    return sum(of_shard["samples"] - of_shard["unreadable"] for of_shard in counts)


def _plant(config: AnyEmbedderConfig, dataset: Dataset, run: Run) -> dict[str, Canaries]:
    """Canaries for a suspect model that is trained here, unless they are switched off."""
    if not isinstance(config, EmbedderConfig) or config.canary is None or config.weights is not None:
        return {}
    return {
        "canaries": run.stage("09-canaries", plant_canaries, config.canary, dataset, max_samples=config.max_samples)
    }


def _score(
    config: ScorerConfig,
    embeddings: Embeddings,
    trusted: Sequence[str],
    seen: Mapping[str, Artifact],
    run: Run,
) -> Scores:
    """Scores of all samples; `seen` is what toxic_direction sees beside the embeddings."""
    more = seen if isinstance(config, ToxicDirectionConfig) else {}
    fitted = run.stage(f"30-scorer-{config.kind}", fit_scorer, config, embeddings, exclude=trusted, **more)
    return run.sharded(scores_folder(config), score_shards, embeddings.shards, config, fitted, embeddings)


def findings_of(hygiene: Hygiene) -> dict[str, int]:
    """Number of findings of each kind that was found."""
    return {kind: n for kind, n in hygiene.read_json("hygiene.json")["counts"].items() if n}


def scores_folder(config: ScorerConfig) -> str:
    """Folder of the scores of a scorer in a run."""
    return f"31-scores-{config.kind}"


def summary(cleaned: Cleaned) -> dict[str, Any]:
    """Counts and places, for people and machines."""
    counts = cleaned.selection.manifest().counts
    classes = cleaned.selection.read_json("selection.json")["classes"]
    finding = finding_of(cleaned.scores, cleaned.selection, cleaned.embedder, cleaned.dataset.class_names)
    samples = {name: counts.get(name, 0) for name in ("samples", "kept", "quarantined", "unreadable")}
    if cleaned.dataset.has_several:
        samples["pictures"] = cleaned.dataset.n_samples
    damaged = {name: shard["damage"] for name, shard in cleaned.dataset.info["shards"].items() if shard["damage"]}
    return {
        "verdict": finding.plain(),
        "suspect": cleaned.embedder.suspect,
        "hygiene": None if cleaned.hygiene is None else findings_of(cleaned.hygiene),
        "samples": samples,
        "classes_touched": {label: c | _name(cleaned.dataset, label) for label, c in classes.items() if c["removed"]},
        "notes": cleaned.dataset.info.get("notes", []),
        "damaged_shards": damaged,
        "bad_shards": sorted(bad_shards(cleaned.dataset.info["shards"])),
        "clean": cleaned.shards.url("clean"),
        "quarantine": cleaned.shards.url("quarantine"),
        "report": cleaned.report.url("index.html"),
    }


def _name(dataset: Dataset, label: str) -> dict[str, str]:
    """The name of a class, if there is one."""
    name = dataset.class_names.get(int(label))
    return {} if name is None else {"name": name}
