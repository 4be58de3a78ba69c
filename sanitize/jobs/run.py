"""A run folder, and calls of stages: plain function calls here; a subclass may call them in another way."""

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import yaml
from pydantic import BaseModel, ValidationError

from sanitize.artifacts import MANIFEST, Artifact, first_line, first_problem
from sanitize.compute import Compute
from sanitize.data.sources import refuse_inside
from sanitize.distributed import rank0_first, world
from sanitize.errors import ArtifactError, SanitizeError
from sanitize.storage import create, exclusive, exists, join, read_bytes

logger = logging.getLogger("sanitize.run")
A = TypeVar("A", bound=Artifact)
C = TypeVar("C", bound=BaseModel)
CONFIGS: dict[str, type[BaseModel]] = {}  # name of a job -> class of its config; `job` adds them
# Fields of run.json; the others are the summary of the run.
RECORD = (
    "status",
    "stages",
    "inputs",
    "versions",
    "compute",
    "device",
    "updated",
)


class Run:
    """Calls stages one after another and records each in `run.json`.

    Args:
        out: path or URL of the run folder; every stage gets a folder in it.
        compute: compute settings of every stage.
        n_groups: number of groups of shards in a sharded stage; results do not depend on it.
    """

    def __init__(self, out: str | Path, compute: Compute, n_groups: int = 1) -> None:
        self.out = str(out)
        self.compute = compute
        self.n_groups = n_groups
        self.stages: list[dict[str, Any]] = []
        self.given: dict[str, str] = {}  # digest -> path of input artifacts from outside the run
        logger.info("sanitize %s on %s", version("sanitize"), compute.describe())

    def inside(self, folder: str, compute: Compute) -> Self:
        """A separate run in a folder of this one, with the same way of calling stages."""
        run = copy(self)
        run.out, run.compute, run.stages, run.given = join(self.out, folder), compute, [], {}
        return run

    def stage(self, folder: str, function: Callable[..., A], *inputs: Any, **more: Any) -> A:
        """Run one stage into `folder` of the run; of several processes (torchrun) the first one does the work."""
        return rank0_first(lambda: self.together(folder, function, *inputs, **more))

    def together(self, folder: str, function: Callable[..., A], *inputs: Any, **more: Any) -> A:
        """Run a stage in which all processes of torchrun take part."""
        self._note_given([*inputs, *more.values()])
        return self._timed(folder, function, lambda out: self._call(function, *inputs, out, self.compute, **more))

    def sharded(self, folder: str, function: Callable[..., A], shards: Sequence[str], *inputs: Any) -> A:
        """Run a stage that goes shard by shard; groups of shards may run side by side."""

        def call(out: str) -> A:
            groups = split(shards, self.n_groups)
            if len(groups) > 1:
                self._call_groups(function, groups, *inputs, out, self.compute)
            return self._call(function, *inputs, out, self.compute)

        self._note_given(inputs)
        return rank0_first(lambda: self._timed(folder, function, call))

    def finish(self, config: BaseModel, result: dict[str, Any]) -> dict[str, Any]:
        """Write the config and the last `run.json`, with the result in it; returns the result."""
        save_config(config, self.out)
        self.save("finished", **result)
        return result

    def note_batch(self, batch: dict[str, Any]) -> None:
        """Called by `ingest` with the state of each batch it commits; does nothing here."""

    def _note_given(self, inputs: Sequence[Any]) -> None:
        """Record input artifacts that no stage of this run made, for `sanitize verify`."""
        made = {stage["digest"] for stage in self.stages}
        for value in inputs:
            if isinstance(value, Artifact):
                if value.digest not in made:
                    self.given[value.digest] = value.path
            elif isinstance(value, list | tuple):
                self._note_given(value)
            elif isinstance(value, dict):
                self._note_given(list(value.values()))

    def _call(self, function: Callable[..., A], *args: Any, **more: Any) -> A:
        return function(*args, **more)

    def _call_groups(self, function: Callable[..., A], groups: list[list[str]], *args: Any) -> None:
        for group in groups:
            function(*args, shards=group)

    def _timed(self, folder: str, function: Callable[..., A], call: Callable[[str], A]) -> A:
        out = join(self.out, folder)
        resumed = exists(join(out, MANIFEST))
        start = time.perf_counter()
        artifact = call(out)
        seconds = time.perf_counter() - start
        counts = artifact.manifest().counts
        self.stages.append(
            {
                "folder": folder,
                "stage": function.__name__,
                "digest": artifact.digest,
                "samples": counts.get("samples", sum(counts.values()) or None),  # or the sum over outcomes
                "seconds": round(seconds, 3),
                "resumed": resumed,
            }
        )
        self.save("running")
        return artifact

    def save(self, status: str, **more: Any) -> None:
        """Write `run.json`: status, stages, inputs, versions, device, and the fields in `more`."""
        if world()[0] > 0:
            return
        record = {
            "status": status,
            "stages": self.stages,
            "inputs": self.given,
            "versions": versions(),
            "compute": self.compute.model_dump(mode="json"),
            "device": self.compute.describe(),
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **more,
        }
        with create(join(self.out, "run.json")) as writer:
            writer.write(json.dumps(record, indent=2).encode() + b"\n")


@contextmanager
def claimed(out: str | Path, sources: Sequence[str]) -> Iterator[None]:
    """Lock a run folder for this process, after a check that no shards are read from the folder.

    Args:
        out: path or URL of the run folder.
        sources: places of the shards that are read.

    Raises:
        ConfigError: shards are searched for in a folder that `out` lies in.
        ArtifactError: another process works in the folder.
    """
    refuse_inside(sources, out)
    with exclusive(out):
        yield


def save_config(config: BaseModel, out: str) -> None:
    """Write the resolved config as `config.yaml`; the run can be repeated from that file."""
    if world()[0] > 0:
        return
    with create(join(out, "config.yaml")) as writer:
        writer.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def read_config(folder: str, kind: type[C]) -> C:
    """The `config.yaml` of a finished run.

    Args:
        folder: path or URL of the run folder.
        kind: class of the config.

    Raises:
        ArtifactError: there is no such file, or it is the config of another job.
    """
    url = join(folder, "config.yaml")
    content = None
    try:
        content = yaml.safe_load(read_bytes(url))
        return kind.model_validate(content)
    except OSError:
        raise ArtifactError(f"{folder} is not a finished run: it has no config.yaml") from None
    except (yaml.YAMLError, RecursionError, ValueError, SanitizeError) as error:
        needed = next((f"`sanitize {job}`" for job, config in CONFIGS.items() if config is kind), kind.__name__)
        if made_by := _made_by(content):
            raise ArtifactError(f"{folder} is a run of `sanitize {made_by}`, and not of {needed}") from error
        why = first_problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise ArtifactError(f"{url} is not that of a run of {needed} by this version: {why}") from error


def _made_by(content: Any) -> str | None:
    """Name of the job whose config has this content; None where no job has."""
    for job, kind in CONFIGS.items():
        with suppress(ValueError, RecursionError, SanitizeError):
            kind.model_validate(content)
            return job
    return None


def read_record(folder: str) -> dict[str, Any]:
    """The `run.json` of a finished run. Raises ArtifactError where there is none, or the run has not finished."""
    url = join(folder, "run.json")
    try:
        record = json.loads(read_bytes(url))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not a run folder: it has no run.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{url} is damaged: {first_line(error)}") from error
    if not isinstance(record, dict) or record.get("status") != "finished":
        raise ArtifactError(f"the run in {folder} has not finished; run it again to go on")
    return record


def versions() -> dict[str, str]:
    """Versions of software that may change results."""
    return {"sanitize": version("sanitize"), "python": platform.python_version(), "torch": torch.__version__}


def split(shards: Sequence[str], n: int) -> list[list[str]]:
    """The shards in at most `n` groups of about equal size; one task works on one group."""
    n = max(1, min(n, len(shards)))
    return [list(shards[i * len(shards) // n : (i + 1) * len(shards) // n]) for i in range(n)]
