"""How robust a model really is: attack it, and see where its gradients point."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flows.certify import as_the_model_sees
from flows.run import Run, claimed, save_config
from flows.runner import RunnerConfig, Threads
from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.denoise import PCAConfig, fit_pca
from sanitize.errors import ConfigError
from sanitize.measure import RobustnessConfig, measure_robustness
from sanitize.package import open_model
from sanitize.report import write_robustness_report


class RobustnessRunConfig(BaseModel):
    """One run; one YAML file.

    Attributes:
        model: a model package, the folder of a training stage, or a run folder with a package.
        shards: test samples: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        train_shards: images whose principal components gradients are measured against; none takes those of `shards`.
        index: how both are read; sizes and classes are those of the model.
        pca, robustness: one section a stage.
        allow_factory: a function that the model names may be run, if an installed package holds it (a model of kind
            "factory"). It is not kept in `config.yaml`.
        n_groups: groups of shards that are indexed side by side. Results do not depend on it.
        compute: device, precision, seed, threads.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    allow_factory: bool = Field(default=False, exclude=True)  # never written down: a copied config.yaml grants nothing
    shards: tuple[str, ...] = Field(min_length=1)
    train_shards: tuple[str, ...] = ()
    index: IndexConfig = IndexConfig()
    pca: PCAConfig = PCAConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    n_groups: int = Field(default=1, ge=1)
    compute: Compute = Compute()
    runner: RunnerConfig = Threads()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*self.shards, *self.train_shards)


def robustness(config: RobustnessRunConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, principal components, attack, page.

    Returns:
        Places, and what was measured.
    """
    model = open_model(config.model, config.allow_factory)
    if model.config.n_networks > 1:
        raise ConfigError(f"{config.model} votes, and votes have no gradient to attack by: certify it instead")
    index = as_the_model_sees(config.index, model.config)
    shards = list(find_shards(config.shards))
    dataset = run.sharded("00-index", index_shards, shards, index, config.shards)
    seen = dataset
    if config.train_shards:
        seen = run.sharded(
            "01-index-train", index_shards, list(find_shards(config.train_shards)), index, config.train_shards
        )
    pca = run.stage("55-pca", fit_pca, config.pca, seen)
    measured = run.stage("75-robustness", measure_robustness, config.robustness, model, dataset, pca)
    report = run.stage("90-report", write_robustness_report, measured)
    summary = {name: value for name, value in measured.summary.items() if name != "alpha"}
    result = {"robustness": measured.path, "report": report.url("index.html"), "summary": summary}
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def run_robustness(config: RobustnessRunConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Measure as a Prefect flow, or with plain function calls; both give the same digests.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    if direct:
        with claimed(out, config.sources):
            return robustness(config, Run(out, config.compute, config.n_groups))
    from flows.tasks import robustness_flow  # imports Prefect: a second that --direct need not wait for

    return dict(robustness_flow(config, str(out)))
