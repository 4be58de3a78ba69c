"""Prefect: each stage wrapped once as a task, and the flows. The only module that imports Prefect."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from prefect import flow, get_client, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows import certify as certify_job
from flows import clean as clean_job
from flows import condense as condense_job
from flows import denoise as denoise_job
from flows import harden as harden_job
from flows import ingest as ingest_job
from flows import redteam as redteam_job
from flows import robustness as robustness_job
from flows import train as train_job
from flows.certify import CertifyRunConfig
from flows.clean import CleanConfig
from flows.condense import CondenseRunConfig
from flows.denoise import DenoiseRunConfig
from flows.harden import HardenConfig
from flows.ingest import IngestConfig
from flows.redteam import RedTeamConfig
from flows.robustness import RobustnessRunConfig
from flows.run import Run, claimed
from flows.runner import Processes, Ray, RunnerConfig, Threads, is_transient
from flows.train import TrainRunConfig
from sanitize.artifacts import Artifact
from sanitize.compute import Compute
from sanitize.data.names import printable
from sanitize.errors import ConfigError, StorageError
from sanitize.storage import absolute, is_local

A = TypeVar("A", bound=Artifact)
P = ParamSpec("P")
SCHEDULED = "{scheduled}"
MAX_TOLD = 100  # refused shards that an event or a page names; `sanitize batches` names all
TOLD_SECONDS = 5.0  # how often the server is told of progress, at most


JOBS: tuple[Any, ...] = (
    clean_job,
    ingest_job,
    train_job,
    certify_job,
    condense_job,
    denoise_job,
    robustness_job,
    harden_job,
    redteam_job,
)

# Artifacts are the truth about what is done (`make`), so Prefect's own cache, keyed by paths, stays off.
TASKS: dict[str, Any] = {
    stage.__name__: task(
        stage,
        name=stage.__name__,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=5,
        retry_condition_fn=is_transient,
    )
    for job in JOBS
    for stage in job.STAGES
}


# Of the other stages one at a time is on each GPU.
ON_CPU = {
    "index_shards",
    "fit_pca",
    "fit_scorer",
    "score_shards",
    "drop_scores",
    "judge_shards",
    "summarise_shards",
    "check_drift",
    "select_samples",
    "sample_shards",
    "poison_shards",
    "write_selected",
    "denoise_shards",
    "package_model",
    "sum_up",
    *(name for name in TASKS if name.endswith("_report")),
}


class PrefectRun(Run):
    """A run whose stages are Prefect tasks; groups of shards are submitted side by side to `runner`."""

    def __init__(self, out: str, compute: Compute, n_groups: int, runner: TaskRunner[Any]) -> None:
        super().__init__(out, compute, n_groups)
        self._runner = runner
        self._gpu = _limited_gpu(compute)

    def _task(self, function: Callable[..., A]) -> Any:
        wrapped = TASKS[function.__name__]
        if self._gpu is None or function.__name__ in ON_CPU:
            return wrapped
        return wrapped.with_options(tags={self._gpu})

    def _call(self, function: Callable[..., A], *args: Any, **more: Any) -> A:
        artifact: A = self._task(function)(*args, **more)
        return artifact

    def _call_groups(self, function: Callable[..., A], groups: list[list[str]], *args: Any) -> None:
        name = function.__name__
        # Ray itself gives a task the GPUs it asks for, and this process does not know which.
        is_here = isinstance(self._runner, ThreadPoolTaskRunner | ProcessPoolTaskRunner)
        submitted = self._task(function) if is_here else TASKS[name]
        given = [dict(signature(function).bind(*args, shards=group).arguments) for group in groups]
        futures = [self._runner.submit(submitted, parameters) for parameters in given]
        progress: Any = create_progress_artifact(0.0, key=name.replace("_", "-"), description=f"{name}: shards")
        told = time.monotonic()
        for done, future in enumerate(futures, start=1):
            future.wait()
            if done == len(futures) or time.monotonic() - told > TOLD_SECONDS:
                update_progress_artifact(progress, 100 * done / len(futures))
                told = time.monotonic()
        for future in futures:  # after all of them have ended: a failed one leaves none at work
            future.result()

    def publish(self, name: str, result: dict[str, Any], said: str = "") -> dict[str, Any]:
        """Artifacts for Prefect's pages: a table of the stages and, where there is one, a link to the report."""
        rows = [f"| {s['stage']} | {s['samples'] or ''} | {s['seconds']:.1f} |" for s in self.stages]
        table = "\n".join([said, "", "| stage | samples | seconds |", "|---|---:|---:|", *rows])
        create_markdown_artifact(table, key=f"{name}-stages", description=self.out)
        if "report" in result:
            create_link_artifact(_link(result["report"]), key=f"{name}-report", description=self.out)
        return result


def _limited_gpu(compute: Compute) -> str | None:
    """Tag of this process' GPU, which one task at a time may carry, whoever runs it; None where there is no GPU."""
    if compute.torch_device.type == "cpu":
        return None
    return limit_to_one(f"gpu-{torch.cuda.get_device_properties(compute.torch_device).uuid}")


def limit_to_one(tag: str) -> str:
    """Let one task with this tag run at a time on the whole server; a lease that its holder no longer renews ends."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(f"tag:{tag}", 1)
    return tag


@contextmanager
def _task_runner(config: RunnerConfig) -> Iterator[TaskRunner[Any]]:
    """Prefect's runner of this kind, for as long as the run lasts: workers start when they are first needed.

    Raises:
        ConfigError: its extra is not installed.
    """
    match config:
        case Threads():
            with ThreadPoolTaskRunner[Any](max_workers=config.workers) as threads:
                yield threads
        case Processes():
            with ProcessPoolTaskRunner(max_workers=config.workers) as processes:
                yield processes
        case Ray():
            try:
                from prefect_ray import RayTaskRunner
                from prefect_ray.context import remote_options
            except ImportError as error:
                raise ConfigError("runner 'ray' needs an extra: pip install 'sanitize[ray]'") from error
            options = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "max_retries": config.retries}
            # The address goes around the runner, which would take "auto" for a new cluster. One that lives as long as
            # this run gets no dashboard: seconds, and an open port.
            joined = {"address": config.address, "include_dashboard": False}
            with remote_options(**options), RayTaskRunner(init_kwargs=joined) as ray:
                yield ray


@contextmanager
def _run(
    out: str, sources: Sequence[str], compute: Compute, n_groups: int, config: RunnerConfig
) -> Iterator[PrefectRun]:
    """The run of a flow. In `out`, "{scheduled}" stands for when it was due: one folder a run, for retries the same."""
    if SCHEDULED in out:
        out = out.replace(SCHEDULED, flow_run.scheduled_start_time.strftime("%Y%m%dT%H%M%SZ"))
    with claimed(out, sources), _task_runner(config) as runner:
        yield PrefectRun(out, compute, n_groups, runner)


def _flow(name: str) -> Callable[[Callable[P, dict[str, Any]]], Callable[P, dict[str, Any]]]:
    """A flow of this name, its runs named by their folders."""
    return flow(name=name, flow_run_name=f"{name} {{out}}", persist_result=False)


@_flow("clean")
def clean_flow(config: CleanConfig, out: str) -> dict[str, Any]:
    """Clean shards: index, embed, score, select, write, report."""
    with _run(out, config.shards, config.compute, config.groups, config.runner) as run:
        summary = clean_job.summary(clean_job.clean(config, run))
        return run.publish("clean", summary, _counted(summary["samples"]))


@_flow("ingest")
def ingest_flow(config: IngestConfig, out: str) -> dict[str, Any]:
    """Sanitize what has landed, batch by batch, into the store `out`; an event tells what became of each batch.

    Another one names shards that were refused. The flow fails where storage kept a batch from being finished.
    """

    def committed(batch: dict[str, Any]) -> None:
        resource = {"prefect.resource.id": f"sanitize.batch.{batch['batch']}", "prefect.resource.name": batch["batch"]}
        links = {name: _link(batch[name]) for name in ("report", "drift") if batch[name]}
        emit_event(
            event=f"sanitize.batch.{batch['status']}",
            resource=resource | {"sanitize.store": out},
            payload=batch | links,
        )

    with _task_runner(config.runner) as runner:
        new_run = partial(PrefectRun, runner=runner)
        result = ingest_job.ingest(config, out, new_run, committed)
    if refused := result["refused"]:
        emit_event(
            event="sanitize.shards.refused",
            resource={"prefect.resource.id": "sanitize.store", "prefect.resource.name": out},
            payload={"n": len(refused), "first": refused[:MAX_TOLD]},
        )
    rows = [[b["batch"], b["status"], str(b["shards"]), "; ".join(b["reasons"])] for b in result["batches"]]
    rows += [[r["shard"], r["status"], "1", "; ".join(r["reasons"])] for r in refused[:MAX_TOLD]]
    create_markdown_artifact(
        _table(["batch or shard", "status", "shards", "reasons"], rows), key="ingest-batches", description=out
    )
    if stuck := [batch for batch in result["batches"] if batch["status"] == "claimed"]:
        raise StorageError(f"batch {stuck[0]['batch']} was not finished: {stuck[0]['reasons'][0]}; run again")
    return result


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what strangers wrote into a cell stays in it."""
    shown = [[printable(" ".join(cell.splitlines())).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *shown])


@_flow("train")
def train_flow(config: TrainRunConfig, out: str) -> dict[str, Any]:
    """Train a robust model: index, pre-train where asked, train, score samples by how often they were dropped."""
    with _run(out, config.sources, config.compute, config.n_groups, config.runner) as run:
        return run.publish("train", train_job.train(config, run))


@_flow("certify")
def certify_flow(config: CertifyRunConfig, out: str) -> dict[str, Any]:
    """Certify a trained model: index, certify, package, report."""
    with _run(out, config.shards, config.compute, config.n_groups, config.runner) as run:
        return run.publish("certify", certify_job.certify(config, run))


@_flow("harden")
def harden_flow(config: HardenConfig, out: str) -> dict[str, Any]:
    """Repair a model that may have learned a backdoor: index, repair, certify where asked, package."""
    with _run(out, config.sources, config.compute, config.n_groups, config.runner) as run:
        return run.publish("harden", harden_job.harden(config, run))


@_flow("condense")
def condense_flow(config: CondenseRunConfig, out: str) -> dict[str, Any]:
    """Condense shards: index, learn a few images a class, measure what networks learn from them."""
    with _run(out, config.sources, config.compute, config.n_groups, config.runner) as run:
        return run.publish("condense", condense_job.condense(config, run))


@_flow("denoise")
def denoise_flow(config: DenoiseRunConfig, out: str) -> dict[str, Any]:
    """Modify training images: index, principal components, PCA-noise, page."""
    with _run(out, config.shards, config.compute, config.n_groups, config.runner) as run:
        return run.publish("denoise", denoise_job.denoise(config, run))


@_flow("robustness")
def robustness_flow(config: RobustnessRunConfig, out: str) -> dict[str, Any]:
    """Attack a trained model: index, principal components, smallest perturbations, page."""
    with _run(out, config.sources, config.compute, config.n_groups, config.runner) as run:
        return run.publish("robustness", robustness_job.robustness(config, run))


@_flow("redteam")
def redteam_flow(config: RedTeamConfig, out: str) -> dict[str, Any]:
    """Try a pipeline: sample, plant known attacks, clean blind, train before and after, measure, page.

    An event tells whether all requirements are met.
    """
    clean = config.clean
    with _run(out, clean.shards, clean.compute, clean.groups, clean.runner) as run:
        result = redteam_job.redteam(config, run)
        emit_event(
            event=f"sanitize.redteam.{'met' if result['met'] else 'missed'}",
            resource={"prefect.resource.id": "sanitize.redteam", "prefect.resource.name": run.out},
            payload={"requirements": result["requirements"], "report": _link(result["report"])},
        )
        return run.publish("redteam", result, redteam_job.table(result))


def _link(url: str) -> str:
    return Path(absolute(url)).as_uri() if is_local(url) else url


def _counted(samples: dict[str, int]) -> str:
    return (
        f"**{samples['samples']:,} samples: {samples['kept']:,} clean, {samples['quarantined']:,} quarantined, "
        f"{samples['unreadable']:,} unreadable.**"
    )
