"""Run a job with plain function calls or as a flow of Prefect; both give the same digests."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sanitize.distributed import world
from sanitize.jobs.job import job_of, run_job


def start(config: BaseModel, out: str | Path | None, direct: bool) -> dict[str, Any]:
    """Run the job that takes this config.

    Args:
        config: the config of a job; see `sanitize.jobs`.
        out: the run folder, a path or a URL; of `ingest`, the store; None where the job needs no folder of its own.
        direct: True calls the stages without Prefect. A job without a flow always does.

    Raises:
        SanitizeError: an error of a stage; ArtifactError if another process works on `out`.
    """
    # Under torchrun, the first process is the flow; the others join its training.
    if direct or not job_of(config).has_flow or world()[0] > 0:
        return run_job(config, out)
    from flows.tasks import FLOWS  # imports Prefect: a second that --direct need not wait for

    return dict(FLOWS[job_of(config).name](config, str(out)))
