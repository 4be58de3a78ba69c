"""Run a job with plain function calls or as a flow of Prefect; both give the same digests."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sanitize.distributed import world
from sanitize.jobs.job import job_of, run_job


def start(config: BaseModel, out: str | Path, direct: bool) -> dict[str, Any]:
    """Run the job that takes this config.

    Args:
        config: the config of a job; see `sanitize.jobs`.
        out: the run folder, a path or a URL; of `ingest`, the store.
        direct: True calls the stages without Prefect.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process works on `out`.
    """
    if direct or world()[0] > 0:  # under torchrun, the first process is the flow; the others join its training
        return run_job(config, out)
    from flows.tasks import FLOWS  # imports Prefect: a second that --direct need not wait for

    return dict(FLOWS[job_of(config).name](config, str(out)))
