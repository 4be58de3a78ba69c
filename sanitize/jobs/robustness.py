"""Robustness of a model: attacks on it, and the direction of its gradients."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sanitize.denoising import PCAConfig, fit_pca
from sanitize.errors import ConfigError
from sanitize.jobs.job import ModelRunConfig, job
from sanitize.jobs.result import JobRun
from sanitize.jobs.run import Run
from sanitize.jobs.steps import as_the_model_sees, index_found
from sanitize.measure import Robustness, RobustnessConfig, measure_robustness
from sanitize.packaging import open_model
from sanitize.report import write_robustness_report


class RobustnessRunConfig(ModelRunConfig):
    """Config of one run; one YAML file.

    Attributes:
        shards: test samples: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        train_shards: images for the principal components that gradients are compared with; none takes `shards`.
        index: settings of reading shards; sizes and classes are those of the model.
        pca, robustness: sections of the stages.
    """

    train_shards: tuple[str, ...] = ()
    pca: PCAConfig = PCAConfig()
    robustness: RobustnessConfig = RobustnessConfig()

    @property
    def sources(self) -> tuple[str, ...]:
        """All shards that the job reads."""
        return (*self.shards, *self.train_shards)


@dataclass(frozen=True)
class RobustnessRun(JobRun):
    """A finished run of `robustness`."""

    kind = RobustnessRunConfig

    @property
    def measures(self) -> dict[str, Any]:
        """Accuracy by radius, mean and median length of the smallest perturbations; see `Robustness.summary`."""
        return Robustness.load(self._in("75-robustness")).summary

    @property
    def report(self) -> str:
        """Path or URL of the report page."""
        return self._page()

    def perturbations(self) -> pa.Table:
        """One row an image: shard, position, key, label, and the length of the smallest perturbation found."""
        return Robustness.load(self._in("75-robustness")).table()


@job(RobustnessRunConfig, RobustnessRun)
def robustness(config: RobustnessRunConfig, run: Run) -> dict[str, Any]:
    """Attack a trained model, and measure the smallest changes of images that alter its predictions.

    Stages: index, principal components, smallest perturbations, report.

    Returns:
        Places and measures.
    """
    model = open_model(config.model, config.allow_factory)
    if model.config.is_ensemble:
        raise ConfigError(f"{config.model} is an ensemble that votes, and votes have no gradient: certify it instead")
    index = as_the_model_sees(config.index, model.config, (*config.shards, *config.train_shards))
    dataset = index_found("00-index", config.shards, index, run)
    seen = dataset
    if config.train_shards:
        seen = index_found("01-index-train", config.train_shards, index, run)
    pca = run.stage("55-pca", fit_pca, config.pca, seen)
    measured = run.stage("75-robustness", measure_robustness, config.robustness, model, dataset, pca)
    report = run.stage("90-report", write_robustness_report, measured)
    summary = {name: value for name, value in measured.summary.items() if name != "alpha"}
    result = {"robustness": measured.path, "report": report.url("index.html"), "summary": summary}
    return run.finish(config, result)
