"""Where groups of shards are worked on: `runner:` of a job. Results never depend on it; Prefect's flows read it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Runner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Threads(_Runner):
    """Threads of the process that runs the flow.

    Nearly free to start, and reading, decoding, hashing and torch let other threads run meanwhile.

    Attributes:
        workers: groups at work at a time.
    """

    kind: Literal["threads"] = "threads"
    workers: int = Field(default=8, ge=1)


class Processes(_Runner):
    """Processes on the same machine, each a fresh interpreter: seconds to start, then no lock is shared.

    One that is killed ends the run, as a kill of the run itself would; run again, it goes on.

    Attributes:
        workers: groups at work at a time; None takes one a CPU core.
    """

    kind: Literal["processes"] = "processes"
    workers: int | None = Field(default=None, ge=1)


class Ray(_Runner):
    """Workers of a Ray cluster (extra `ray`). A worker or node that dies costs the shards it was at, not the run.

    Every node needs this package, and must see shards and run folder under the same absolute path or URL. The flow's
    process runs on a node too: stages that are not divided into groups stay in it.

    Attributes:
        address: HOST:PORT of a cluster, or "auto" for the one that `ray start` made this machine part of; None starts
            one on this machine, which ends with the flow. RAY_ADDRESS goes first.
        num_cpus: that a group occupies, of those that its node offers.
        num_gpus: that a group occupies; 0.5 puts two on one GPU.
        retries: how often a group is begun again after its worker died.
    """

    kind: Literal["ray"] = "ray"
    address: str | None = None
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    retries: int = Field(default=3, ge=0)


RunnerConfig = Annotated[Threads | Processes | Ray, Field(discriminator="kind")]
