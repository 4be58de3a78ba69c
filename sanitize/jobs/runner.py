"""Runners of groups of shards: `runner:` of a job, read by Prefect's flows. Results never depend on the runner."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Runner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Threads(_Runner):
    """Threads of the process that runs the flow.

    They start at once; reading, decoding, hashing and torch release the interpreter lock.

    Attributes:
        workers: number of groups that run at a time.
    """

    kind: Literal["threads"] = "threads"
    workers: int = Field(default=8, ge=1)


class Processes(_Runner):
    """Processes on the same machine, each a fresh interpreter: they take seconds to start and share no lock.

    A worker that is killed ends the run; the same call resumes it.

    Attributes:
        workers: number of groups that run at a time; None takes the number of CPU cores.
    """

    kind: Literal["processes"] = "processes"
    workers: int | None = Field(default=None, ge=1)


class Ray(_Runner):
    """Workers of a Ray cluster (extra `ray`). When a worker or node dies, only its current shards are repeated.

    Every node needs this package, and must see shards and run folder under the same absolute path or URL. The process
    of the flow runs on a node too; stages that are not divided into groups stay in that process.

    Attributes:
        address: HOST:PORT of a cluster, or "auto" for the cluster that this machine joined with `ray start`; None
            starts a cluster on this machine that ends with the flow. RAY_ADDRESS has precedence.
        num_cpus: CPUs reserved for each group.
        num_gpus: GPUs reserved for each group; 0.5 puts two groups on one GPU.
        retries: number of times that a group starts again after its worker died.
    """

    kind: Literal["ray"] = "ray"
    address: str | None = None
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    retries: int = Field(default=3, ge=0)


RunnerConfig = Annotated[Threads | Processes | Ray, Field(discriminator="kind")]
