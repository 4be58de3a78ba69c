"""PCA-noise: shards in, shards of modified training images out."""

from dataclasses import dataclass
from typing import Any

from sanitize.denoising import DenoiseConfig, Denoised, PCAConfig, denoise_shards, fit_pca
from sanitize.jobs.job import RunConfig, job
from sanitize.jobs.result import JobRun
from sanitize.jobs.run import Run
from sanitize.jobs.steps import index_found
from sanitize.report import write_denoising_report


class DenoiseRunConfig(RunConfig):
    """Config of one run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards of training images.
        pca, denoise: sections of the stages.
    """

    pca: PCAConfig = PCAConfig()
    denoise: DenoiseConfig


@dataclass(frozen=True)
class DenoiseRun(JobRun):
    """A finished run of `denoise`."""

    kind = DenoiseRunConfig

    @property
    def shards(self) -> list[str]:
        """Paths or URLs of the modified shards, sorted."""
        denoised = Denoised.load(self._in("20-denoised"))
        return denoised.shard_paths()

    @property
    def report(self) -> str:
        """Path or URL of the report page."""
        return self._page()


@job(DenoiseRunConfig, DenoiseRun)
def denoise(config: DenoiseRunConfig, run: Run) -> dict[str, Any]:
    """Write training images without their small principal components.

    Stages: index, principal components, PCA-noise, report.

    Returns:
        Places, and the number of samples.
    """
    dataset = index_found("00-index", config.shards, config.index, run)
    pca = run.stage("10-pca", fit_pca, config.pca, dataset)
    denoised = run.sharded("20-denoised", denoise_shards, dataset.shards, config.denoise, pca, dataset)
    report = run.stage("90-report", write_denoising_report, pca, dataset, denoised)
    result = {
        "shards": denoised.url("shards"),
        "samples": denoised.manifest().counts.get("samples", 0),
        "report": report.url("index.html"),
    }
    return run.finish(config, result)
