"""PCA-noise: shards in, shards of modified training images out."""

from typing import Any

from sanitize.denoise import DenoiseConfig, PCAConfig, denoise_shards, fit_pca
from sanitize.jobs.job import RunConfig, job
from sanitize.jobs.run import Run
from sanitize.jobs.steps import index_found
from sanitize.report import write_denoising_report


class DenoiseRunConfig(RunConfig):
    """One run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards of training images.
        index, pca, denoise: one section a stage.
    """

    pca: PCAConfig = PCAConfig()
    denoise: DenoiseConfig


@job(DenoiseRunConfig)
def denoise(config: DenoiseRunConfig, run: Run) -> dict[str, Any]:
    """Modify training images: index, principal components, PCA-noise, page.

    Returns:
        Places, and how many samples were written.
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
