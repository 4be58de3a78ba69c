"""Jobs: functions `config, run -> result` that call stages in order, each declared once.

    @job(DenoiseRunConfig)
    def denoise(config: DenoiseRunConfig, run: Run) -> dict[str, Any]:
        ...
        return run.finish(config, result)

`run_job` runs a job with plain function calls. Prefect's flows and the tests read the registry, `JOBS`.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sanitize.compute import Compute
from sanitize.data.index import IndexConfig
from sanitize.distributed import world
from sanitize.jobs.run import Run, claimed
from sanitize.jobs.runner import RunnerConfig, Threads


class JobConfig(BaseModel):
    """What all jobs are asked.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        n_groups: groups of shards that are worked on side by side; None takes one a CPU core. Results do not depend
            on it.
        compute: device, precision, seed, threads.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...] = Field(min_length=1)
    n_groups: int | None = Field(default=1, ge=1)
    compute: Compute = Compute()
    runner: RunnerConfig = Threads()

    @property
    def groups(self) -> int:
        """`n_groups`, resolved."""
        return self.n_groups or os.cpu_count() or 1

    @property
    def sources(self) -> tuple[str, ...]:
        """All shards that the job reads."""
        return self.shards


class RunConfig(JobConfig):
    """What all jobs are asked that read shards by settings of their own.

    Attributes:
        index: how shards are read.
    """

    index: IndexConfig = IndexConfig()


class ModelRunConfig(RunConfig):
    """What all jobs are asked that work on a model; image size and classes are those of the model.

    Attributes:
        model: a model package, the folder of a training stage, or a run folder with a package.
        allow_factory: a function that the model names may be run, if an installed package holds it (a model of kind
            "factory"). It is not kept in `config.yaml`.
    """

    model_config = ConfigDict(protected_namespaces=())

    model: str
    allow_factory: bool = Field(default=False, exclude=True)  # never written down: a copied config.yaml grants nothing


C = TypeVar("C", bound=BaseModel)


class Job(NamedTuple):
    """What others need to know of a job.

    Attributes:
        function: the order of work; its name is the name of the job.
        config: class of its config.
        settings: takes the config; shards, groups, compute and runner of the run.
        claims: True where the job has its folder to itself; False where it locks parts of it.
    """

    function: Callable[[Any, Run], dict[str, Any]]
    config: type[BaseModel]
    settings: Callable[[Any], JobConfig]
    claims: bool

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__

    def claim(self, settings: JobConfig, out: str | Path) -> AbstractContextManager[None]:
        """The lock of the run folder, where the job needs it; of the processes of torchrun the first one has it.

        Raises:
            ConfigError: shards are searched for in a folder that `out` lies in.
            ArtifactError: another process is at work on `out`.
        """
        return claimed(out, settings.sources) if self.claims and world()[0] == 0 else nullcontext()


JOBS: dict[str, Job] = {}


def job(
    config: type[C], *, settings: Callable[[C], JobConfig] | None = None, claims: bool = True
) -> Callable[[Callable[[C, Run], dict[str, Any]]], Callable[[C, Run], dict[str, Any]]]:
    """Declare a job.

    Args:
        config: class of its config.
        settings: takes the config; the settings of the run. None where the config itself has them.
        claims: False for a job that locks parts of its folder itself.

    Raises:
        TypeError: name or config are those of another job, or the settings of the run are missing.
    """
    if settings is None and not issubclass(config, JobConfig):
        raise TypeError(f"{config.__name__} is no JobConfig: say where the settings of the run are")

    def declare(function: Callable[[C, Run], dict[str, Any]]) -> Callable[[C, Run], dict[str, Any]]:
        name = function.__name__
        if name in JOBS or any(known.config is config for known in JOBS.values()):
            raise TypeError(f"there is a job {name}, or one of {config.__name__}, already")
        JOBS[name] = Job(function, config, settings or _itself, claims)
        return function

    return declare


def _itself(config: JobConfig) -> JobConfig:
    return config


def job_of(config: BaseModel) -> Job:
    """The job that takes a config of this class. Raises TypeError where there is none."""
    for known in JOBS.values():
        if type(config) is known.config:
            return known
    raise TypeError(f"no job takes a {type(config).__name__}")


def run_job(config: BaseModel, out: str | Path) -> dict[str, Any]:
    """Run the job that takes this config, with plain function calls.

    Args:
        config: the config of a job.
        out: the run folder, a path or a URL; of `ingest`, the store.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    found = job_of(config)
    settings = found.settings(config)
    with found.claim(settings, out):  # one group unless asked: nothing is side by side here
        return found.function(config, Run(out, settings.compute, settings.n_groups or 1))
