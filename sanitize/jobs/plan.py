"""Costs of cleaning a data set: tasks, bytes, memory and time, estimated from a measured sample.

The run is measured on two samples of different sizes, by one worker in a temporary folder. Their difference gives the
cost of a sample; the rest is paid once. docs/scale.md explains which costs grow with the data.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from sanitize.artifacts import Artifact, Part, Recipe, make
from sanitize.data.samples import Sample, ShardReader
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.data.writer import shard_writer
from sanitize.errors import DataError
from sanitize.jobs.clean import CleanConfig, clean_inside
from sanitize.jobs.job import job
from sanitize.jobs.result import CallResult
from sanitize.jobs.run import Run
from sanitize.plural import are, counted
from sanitize.select import trusted_shards
from sanitize.tar.compression import plain_suffix

SELECTED_BYTES, SCORED_BYTES = 17, 4  # held by `select` for each sample, and for each score of a sample
MAX_FITTED = 10_000  # samples of a class that a scorer is fitted on (for some scorers 20,000 of all classes)


class PlanConfig(CleanConfig):
    """Config of the planned run of `clean`, and sizes of the measurement.

    Attributes:
        n_samples: size of the larger sample; the smaller one has a quarter of it.
        n_shards: number of shards to sample; the first samples of each are taken. More where shards are so small that
            these do not have `n_samples`.
        task_minutes: intended duration of a task: much longer than its start, short enough to repeat after a failure.
        scale_to: number of samples of a larger data set of such shards, for which the costs are calculated too; None
            leaves it out.
    """

    has_several: ClassVar[bool] = False

    n_samples: int = Field(default=600, ge=40)
    n_shards: int = Field(default=4, ge=1)
    task_minutes: float = Field(default=10, gt=0)
    scale_to: int | None = Field(default=None, gt=0)


class Cost(NamedTuple):
    """Costs of one stage, fixed and for each sample. Bytes are None where the system does not count them.

    Attributes:
        passes: number of passes of the real run over a data set, given its size; the measured run makes one.
        most: number of samples beyond which time no longer grows: the suspect model is trained, and scorers are fitted,
            on bounded samples.
    """

    folder: str
    stage: str
    divided: bool
    seconds_once: float
    seconds_each: float
    read_each: float | None
    written_each: float
    passes: Callable[[int], int] = lambda _n: 1
    most: float = math.inf

    def seconds(self, n: int) -> float:
        """Time of one worker for `n` samples."""
        return self.seconds_once + self.seconds_each * self.passes(n) * min(n, self.most)


class MeasuredRun(Run):
    """A run that also counts bytes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.divided: set[str] = set()

    def sharded(self, folder: str, *args: Any) -> Any:
        """Record the stage as one that goes by groups of shards."""
        self.divided.add(folder)
        return super().sharded(folder, *args)

    def _timed(self, folder: str, *args: Any) -> Any:
        before = _bytes_read()
        artifact = super()._timed(folder, *args)
        after = _bytes_read()
        written = sum(file.size for file in artifact.manifest().files.values())
        read = None if before is None or after is None else after - before
        self.stages[-1] |= {"read": read, "written": written}
        return artifact


@dataclass(frozen=True)
class Planned(CallResult):
    """Costs of a planned run, in `summary`."""

    place = "empty folder for the measured runs"

    @property
    def n_groups(self) -> int:
        """Recommended number of groups."""
        return int(self.summary["n_groups"])


@job(PlanConfig, Planned, claims=False, has_flow=False, is_temporary=True)
def plan(config: PlanConfig, run: Run) -> dict[str, Any]:
    """Measure a cleaning run on a sample of the shards, and scale the costs to all of them.

    Returns:
        `data`: shards, bytes and samples; `stages`: one row each; `n_groups`: recommended for tasks of `task_minutes`;
        `task_seconds`: time of the longest; `memory`; `scaled`: the same for `scale_to` samples in shards of the same
        size, or None.

    Raises:
        DataError: the shards hold no sample.
    """
    scratch = Path(run.out)
    found = find_shards(config.shards)
    trusted = set(trusted_shards(config.trusted, found))
    others = sorted(found.keys() - trusted)
    chosen = [*_spread(others, _n_shards(config, found, others)), *_spread(sorted(trusted), 1)]
    per_shard = math.ceil(config.n_samples / len(chosen))
    few = max(1, per_shard // 4)
    _try(config, found, chosen, trusted, few, scratch / "first")  # libraries start, files come into the page cache
    small, n_small, _ = _try(config, found, chosen, trusted, few, scratch / "small")
    large, n_large, stored = _try(config, found, chosen, trusted, per_shard, scratch / "large")
    if n_large <= n_small:
        raise DataError(
            f"{counted(n_large, 'sample')} in {counted(len(chosen), 'shard')} {are(n_large)} too few to measure on"
        )
    costs = _costs(small, large, n_large - n_small, n_large, config)
    n_bytes = sum(int(shard["size"]) for shard in fingerprint_shards(found).values())
    n = round(n_bytes / stored)
    scaled = None
    if config.scale_to is not None:
        n_shards = math.ceil(len(found) * config.scale_to / n)
        scaled = {"samples": config.scale_to, "shards": n_shards}
        scaled |= _scaled(costs, config.scale_to, n_shards, config, large)
    return {
        "data": {"shards": len(found), "bytes": n_bytes, "samples": n, "bytes_each": stored},
        "measured_on": n_large,
        "bytes_counted": large.stages[0]["read"] is not None,
        "compute": config.compute.describe(),
        "task_minutes": config.task_minutes,
        **_scaled(costs, n, len(found), config, large),
        "scaled": scaled,
    }


def _n_shards(config: PlanConfig, found: dict[str, str], names: Sequence[str]) -> int:
    """Number of shards that have about `n_samples` together, by the size of the first."""
    first = _spread(names, config.n_shards)
    most = math.ceil(config.n_samples / max(1, len(first)))
    readers = (ShardReader(found[name], config.index.limits, suffix="", digest=False) for name in first)
    n = sum(len(_first_samples(reader, most)) for reader in readers)
    return max(config.n_shards, math.ceil(config.n_samples * len(first) / n)) if n else config.n_shards


def _first_samples(reader: ShardReader, n: int) -> list[Sample]:
    return list(islice((sample for sample in reader if sample.problem is None), n))


def _try(
    config: CleanConfig, found: dict[str, str], chosen: Sequence[str], trusted: set[str], n: int, scratch: Path
) -> tuple[MeasuredRun, int, float]:
    """Clean the first `n` samples of each chosen shard; returns the run, the number of samples, bytes of a sample."""
    counts: list[int] = []
    sizes: list[int] = []

    def write(part: Part) -> None:
        for i, name in enumerate(chosen):
            reader = ShardReader(found[name], config.index.limits, digest=False)
            samples = _first_samples(reader, n + 1)
            is_whole, samples = len(samples) <= n, samples[:n]
            copied = f"{'trusted' if name in trusted else 'shard'}-{i}{plain_suffix(reader.compression)}"
            with shard_writer(part, copied) as tar:
                for member, payload in (member for sample in samples for member in sample.members):
                    tar.add(member, payload)
            counts.append(len(samples))
            if is_whole:  # padding, which is most of a tiny shard, counts
                sizes.append(reader.size)
            else:
                sizes.append(part.files[copied].size if reader.compression else samples[-1].end)

    make(Artifact, scratch / "in", Recipe(stage="plan"), write)
    run = MeasuredRun(scratch / "run", config.compute)
    clean_inside(_tried(config, scratch / "in", bool(trusted)), run)
    return run, sum(counts), sum(sizes) / max(1, sum(counts))


def _tried(config: CleanConfig, shards: Path, has_trusted: bool) -> CleanConfig:
    """Config of the run on the sample: one epoch of training, no limit on bad samples."""
    index = config.index.model_copy(update={"max_bad_fraction": 1.0, "max_bad_shards": len(list(shards.iterdir()))})
    trusted = tuple(path.name for path in shards.glob("trusted-*")) if has_trusted else ()
    return config.model_copy(
        update={
            "shards": (str(shards),),
            "trusted": trusted,
            "embedder": config.embedder.once,
            "index": index,
            "n_groups": 1,
        }
    )


def _costs(small: MeasuredRun, large: MeasuredRun, more: int, n: int, config: CleanConfig) -> list[Cost]:
    """Straight lines through two points, `more` samples apart.

    Where the larger sample costs less, the difference is noise: bytes are then fixed, and all time of a divided stage
    grows with the samples.
    """

    def each(name: str, a: dict[str, Any], b: dict[str, Any]) -> float | None:
        return None if b[name] is None else max(0.0, (b[name] - a[name]) / more)

    n_classes = json.loads((Path(large.out) / "00-index" / "dataset.json").read_text())["n_classes"]
    embedder = config.embedder
    trained_by = embedder.build().__name__
    most = {
        "fit_scorer": MAX_FITTED * n_classes,
        trained_by: getattr(embedder, "max_samples", None) or math.inf,
    }
    costs = []
    for a, b in zip(small.stages, large.stages, strict=True):
        divided = b["folder"] in large.divided
        seconds = each("seconds", a, b) or (b["seconds"] / n if divided else 0.0)
        costs.append(
            Cost(
                folder=b["folder"],
                stage=b["stage"],
                divided=divided,
                seconds_once=max(0.0, b["seconds"] - seconds * n),
                seconds_each=seconds,
                read_each=each("read", a, b),
                written_each=each("written", a, b) or 0.0,
                passes=embedder.n_passes if b["stage"] == trained_by else lambda _n: 1,
                most=most.get(b["stage"], math.inf),
            )
        )
    return costs


def _scaled(costs: Sequence[Cost], n: int, n_shards: int, config: PlanConfig, run: MeasuredRun) -> dict[str, Any]:
    """Totals for `n` samples: rows of stages, groups, memory."""
    slowest = max((cost.seconds(n) for cost in costs if cost.divided), default=0.0)
    n_groups = min(n_shards, max(1, math.ceil(slowest / (60 * config.task_minutes))))
    rows = []
    for cost in costs:
        tasks, seconds = n_groups if cost.divided else 1, cost.seconds(n)
        rows.append(
            {
                "folder": cost.folder,
                "stage": cost.stage,
                "tasks": tasks,
                "seconds": seconds,
                "task_seconds": seconds / tasks,
                "read": None if cost.read_each is None else cost.read_each * n,
                "written": cost.written_each * n,
            }
        )
    total = sum(cost.seconds(n) for cost in costs)
    return {
        "n_groups": n_groups,
        "task_seconds": slowest / n_groups,
        "seconds": total,
        "stages": rows,
        "memory": _memory(n, n_shards, config, run),
    }


def _memory(n: int, n_shards: int, config: CleanConfig, run: MeasuredRun) -> dict[str, float]:
    """Bytes of a task (measured), of the cache of training, of `select`, and of the driver's list of shards."""
    summary = (Path(run.out) / "00-index" / "dataset.json").stat().st_size
    n_sampled = len(list((Path(run.out) / "00-index" / "rows").rglob("*.parquet")))
    return {
        "task": float(_peak_bytes() or 0),
        "cache": float(config.embedder.cache_bytes),
        "select": float(n * (SELECTED_BYTES + SCORED_BYTES * len(config.scorers))),
        "driver": float(summary / n_sampled * n_shards),
    }


def _spread(names: Sequence[str], n: int) -> list[str]:
    """At most `n` of the names, evenly spaced."""
    n = min(n, len(names))
    return [names[i * len(names) // n] for i in range(n)]


def _bytes_read() -> int | None:
    """Bytes read by this process so far, page cache included; None without /proc."""
    return _proc("io", "rchar")


def _peak_bytes() -> int | None:
    peak = _proc("status", "VmHWM")
    return None if peak is None else peak * 1024


def _proc(file: str, field: str) -> int | None:
    path = Path("/proc/self") / file
    found = re.search(rf"{field}:\s+(\d+)", path.read_text()) if path.exists() else None
    return int(found[1]) if found else None
