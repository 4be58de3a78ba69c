"""Known attacks on a sample of the data: recall of the pipeline, and models trained before and after cleaning."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sanitize.attack import AttackConfig, poison_shards
from sanitize.data.dataset import Dataset
from sanitize.data.index import index_shards
from sanitize.data.index_config import IndexConfig
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.errors import ConfigError
from sanitize.jobs.clean import CleanConfig, Cleaned, clean_inside
from sanitize.jobs.job import job
from sanitize.jobs.result import JobRun
from sanitize.jobs.run import Run
from sanitize.jobs.steps import leaks, like, with_facts
from sanitize.models.checkpoint import Checkpoint
from sanitize.progress import track
from sanitize.redteaming import (
    NONE,
    Case,
    Findings,
    FindingsConfig,
    Measured,
    PlannedAttack,
    SampleConfig,
    Samples,
    case_name,
    measure_case,
    measures_of,
    parse_requirement,
    sample_shards,
    sum_up,
)
from sanitize.report import write_redteam_report
from sanitize.select import trusted_shards
from sanitize.tar.names import as_markdown

SHOWN = (
    "recall",
    "precision",
    "false_removals",
    "acc_before",
    "acc_after",
    "asr_before",
    "asr_after",
    "asr_baseline",
)
DEFAULT_ATTACKS = ("badnets@1%", "badnets@5%", "blended@5%", "labels@5%")


class RedTeamConfig(BaseModel):
    """Config of one red team; one YAML file.

    Attributes:
        clean: the pipeline under test, as `sanitize clean` takes it; its shards are the data.
        sample: size of the sample to poison and to test on.
        attacks: attacks, each tried by itself: names such as badnets@1%, or settings. Case `none`, without an attack,
            is always run; everything removed there is a false removal.
        repeats: number of seeds of each case, counted up from the seed of `clean.compute`. All use the same sample.
        model: training of the models before and after cleaning. None trains them as the suspect model, which then is
            the model before; or with the embedder's defaults, where the suspect model is no classifier trained here.
        require: requirements, such as `badnets@1%:recall>=0.9`; each is judged by the mean over the repeats.
        level: confidence level of the intervals, in (0, 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clean: CleanConfig
    sample: SampleConfig = SampleConfig()
    attacks: tuple[PlannedAttack, ...] = Field(default=DEFAULT_ATTACKS, min_length=1, validate_default=True)
    repeats: int = Field(default=2, ge=1)
    model: EmbedderConfig | None = None
    require: tuple[str, ...] = ()
    level: float = Field(default=0.95, gt=0, lt=1)

    @model_validator(mode="after")
    def _cases_are_distinct_and_requirements_valid(self) -> Self:
        if self.clean.index.has_several:
            raise ConfigError(
                "clean.index.image.member=all is for `clean` alone: attacks poison one picture a sample; set "
                "clean.index.image.member to its suffix, such as left.jpg, or to first"
            )
        names = [case_name(attack) for attack in self.attacks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"attacks: two have the name {min(twice)}; change the rate of one, or run it by itself")
        for text in self.require:
            parse_requirement(text, {name: measures_of(attack) for name, attack in self.cases.items()})
        return self

    @property
    def cases(self) -> dict[str, AttackConfig | None]:
        """Name -> attack, `none` first."""
        return {NONE: None} | {case_name(attack): attack for attack in self.attacks}

    @property
    def trained(self) -> EmbedderConfig:
        """Training of the models before and after cleaning."""
        embedder = self.clean.embedder
        if self.model is not None:
            return self.model
        return embedder if isinstance(embedder, EmbedderConfig) and embedder.weights is None else EmbedderConfig()


class RedTeamData(NamedTuple):
    """Inputs of all cases: the sample, and the index of its training and test samples."""

    samples: Samples
    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class RedTeamRun(JobRun):
    """A finished run of `redteam`."""

    kind = RedTeamConfig

    @property
    def measures(self) -> dict[str, dict[str, Any]]:
        """Name of a case -> measure -> mean, low, high (of the interval) and repeats; see `Findings.info`."""
        return {case["name"]: case["measures"] for case in self._findings()["cases"]}

    @property
    def requirements(self) -> list[dict[str, Any]]:
        """The requirements: text, mean, low, high, met."""
        found: list[dict[str, Any]] = self._findings()["requirements"]
        return found

    @property
    def met(self) -> bool:
        """True where all requirements are met."""
        return bool(self._findings()["met"])

    @property
    def report(self) -> str:
        """Path or URL of the report page."""
        return self._page()

    def _findings(self) -> dict[str, Any]:
        return Findings.load(self._in("80-findings")).info


@job(RedTeamConfig, RedTeamRun, section="clean")
def redteam(config: RedTeamConfig, run: Run) -> dict[str, Any]:
    """Test a pipeline: sample, poison, clean without the truth, train before and after, measure, report.

    Returns:
        The findings, `met` (True where all requirements are met), and paths of artifacts.
    """
    data = _data(config, run)
    measured: dict[str, list[Measured]] = {name: [] for name in config.cases}
    with track("red team", config.repeats * len(config.cases), "cases") as advance:
        for seed in range(config.repeats):
            baseline: Checkpoint | None = None
            for name, attack in config.cases.items():
                seeded = run.compute.model_copy(update={"seed": run.compute.seed + seed})
                inside = run.inside(f"cases/{name.replace('%', '')}/{seed}", seeded)
                case, before = _case(attack, baseline, data, config, inside)
                baseline = baseline or before
                measured[name].append(case)
                advance(1)
    cases = [Case(name, repeats) for name, repeats in measured.items()]
    summing = FindingsConfig(level=config.level, require=config.require)
    findings = run.stage("80-findings", sum_up, summing, cases)
    report = run.stage("90-report", write_redteam_report, findings, data.samples)
    result = findings.info | {"findings": findings.path, "report": report.url("index.html")}
    return run.finish(config, result)


def _data(config: RedTeamConfig, run: Run) -> RedTeamData:
    """A sample of the data, and its index; no image outside the sample is decoded."""
    found = find_shards(config.clean.shards)
    trusted = trusted_shards(config.clean.trusted, found)
    hashed = config.clean.index.named(found.values()).model_copy(update={"check": "digest"})
    source = run.sharded("00-source", index_shards, list(found), hashed, fingerprint_shards(found))
    samples = run.stage("01-sample", sample_shards, config.sample, source, trusted=trusted)
    classes = like(config.clean.index, source)
    train = run.stage("02-index-train", index_shards, with_facts(classes), samples.paths("train"))
    test = run.stage("03-index-test", index_shards, with_facts(_index_like(train, config)), samples.paths("test"))
    leaks(train, test, run)
    n = train.n_samples
    for attack in config.attacks:
        if any(round(one.rate * n) == 0 for one in attack.attacks):
            raise ConfigError(f"{case_name(attack)} of {n} samples is none: raise sample.n_train, or the rate")
    return RedTeamData(samples, train, test)


def _index_like(train: Dataset, config: RedTeamConfig) -> IndexConfig:
    """Index settings of the training samples: images of one size for every model, and all classes."""
    image = config.clean.index.image.model_copy(update={"size": train.image_shape[1:]})
    return like(config.clean.index, train).model_copy(update={"image": image})


def _case(
    attack: AttackConfig | None, baseline: Checkpoint | None, data: RedTeamData, config: RedTeamConfig, run: Run
) -> tuple[Measured, Checkpoint]:
    """Measures of one case with one seed, and its model before cleaning; that of case `none` is `baseline`."""
    samples, train, test = data
    index = _index_like(train, config)
    truth, shards = None, samples.paths("train")
    if attack is not None:
        surrogate = baseline if attack.needs_surrogate else None
        options = {"surrogate": surrogate, "exclude": samples.trusted()}
        truth = run.stage("10-poisoned", poison_shards, attack, train, **options)
        shards = truth.shard_paths()
    blind = {"shards": tuple(shards), "trusted": samples.trusted(), "index": index, "compute": run.compute}
    cleaned = clean_inside(config.clean.model_copy(update=blind), run.inside("clean", run.compute))
    models = _models(cleaned, index, config, run)
    if baseline is not None:
        models["baseline"] = baseline
    measured = run.stage("90-measured", measure_case, attack, cleaned.selection, models, test, truth=truth)
    return measured, models["before"]


def _models(cleaned: Cleaned, index: IndexConfig, config: RedTeamConfig, run: Run) -> dict[str, Checkpoint]:
    """`before` is trained on all samples, `after` on those the pipeline kept; the seed is the same."""
    before = cleaned.embedder  # training this config on this data again would give the same model
    if config.trained != config.clean.embedder:
        before = run.stage("60-model-before", train_embedder, config.trained, cleaned.dataset)
    counts = cleaned.selection.manifest().counts
    if not counts.get("quarantined", 0):
        return {"before": before, "after": before}
    kept = run.stage("70-index-kept", index_shards, index, cleaned.shards.clean())
    return {"before": before, "after": run.stage("71-model-after", train_embedder, config.trained, kept)}


def table(result: dict[str, Any]) -> str:
    """Means over seeds in per cent, in Markdown; "-" for a measure without samples."""
    lines = ["| case | " + " | ".join(SHOWN).replace("_", " ") + " |", "|---|" + "---:|" * len(SHOWN)]
    for case in result["cases"]:
        means = [case["measures"].get(name, {}).get("mean") for name in SHOWN]
        cells = [as_markdown(case["name"]), *("-" if m is None else f"{100 * m:.1f}" for m in means)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{'met' if r['met'] else '**MISSED**'}: {as_markdown(r['text'])}" for r in result["requirements"]]
    return "\n".join(lines)
