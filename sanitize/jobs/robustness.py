"""How robust a model really is: attack it, and see where its gradients point."""

from typing import Any

from sanitize.denoise import PCAConfig, fit_pca
from sanitize.errors import ConfigError
from sanitize.jobs.job import ModelRunConfig, job
from sanitize.jobs.run import Run
from sanitize.jobs.steps import as_the_model_sees, index_found
from sanitize.measure import RobustnessConfig, measure_robustness
from sanitize.package import open_model
from sanitize.report import write_robustness_report


class RobustnessRunConfig(ModelRunConfig):
    """One run; one YAML file.

    Attributes:
        shards: test samples: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        train_shards: images whose principal components gradients are measured against; none takes those of `shards`.
        index: how both are read; sizes and classes are those of the model.
        pca, robustness: one section a stage.
    """

    train_shards: tuple[str, ...] = ()
    pca: PCAConfig = PCAConfig()
    robustness: RobustnessConfig = RobustnessConfig()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*self.shards, *self.train_shards)


@job(RobustnessRunConfig)
def robustness(config: RobustnessRunConfig, run: Run) -> dict[str, Any]:
    """Attack a trained model: index, principal components, smallest perturbations, page.

    Returns:
        Places, and what was measured.
    """
    model = open_model(config.model, config.allow_factory)
    if model.config.is_ensemble:
        raise ConfigError(f"{config.model} votes, and votes have no gradient to attack by: certify it instead")
    index = as_the_model_sees(config.index, model.config)
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
