"""PCA-noise: shards in, shards of modified training images out."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flows.run import Run, claimed, save_config
from flows.runner import RunnerConfig, Threads
from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.denoise import DenoiseConfig, PCAConfig, denoise_shards, fit_pca
from sanitize.report import write_denoising_report


class DenoiseRunConfig(BaseModel):
    """One run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards of training images.
        index, pca, denoise: one section a stage.
        n_groups: groups of shards that are worked on side by side. Results do not depend on it.
        compute: device, precision, seed, threads.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...] = Field(min_length=1)
    index: IndexConfig = IndexConfig()
    pca: PCAConfig = PCAConfig()
    denoise: DenoiseConfig
    n_groups: int = Field(default=1, ge=1)
    compute: Compute = Compute()
    runner: RunnerConfig = Threads()


def denoise(config: DenoiseRunConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, principal components, modified copies of the shards, page.

    Returns:
        Places, and how many samples were written.
    """
    shards = list(find_shards(config.shards))
    dataset = run.sharded("00-index", index_shards, shards, config.index, config.shards)
    pca = run.stage("10-pca", fit_pca, config.pca, dataset)
    denoised = run.sharded("20-denoised", denoise_shards, dataset.shards, config.denoise, pca, dataset)
    report = run.stage("90-report", write_denoising_report, pca, dataset, denoised)
    result = {
        "shards": denoised.url("shards"),
        "samples": denoised.manifest().counts.get("samples", 0),
        "report": report.url("index.html"),
    }
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def run_denoise(config: DenoiseRunConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Denoise as a Prefect flow, or with plain function calls; both give the same digests.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    if direct:
        with claimed(out, config.shards):
            return denoise(config, Run(out, config.compute, config.n_groups))
    from flows.tasks import denoise_flow  # imports Prefect: a second that --direct need not wait for

    return dict(denoise_flow(config, str(out)))
