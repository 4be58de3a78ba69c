"""Prefect: each stage wrapped once as a task, and the flows. The only module that imports Prefect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

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
from flows.run import Run
from flows.train import TrainRunConfig
from sanitize.artifacts import Artifact
from sanitize.errors import StorageError
from sanitize.storage import absolute, is_local

A = TypeVar("A", bound=Artifact)
P = ParamSpec("P")


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what storage does now and then; bad data or configuration will not get better."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, OSError | StorageError)


# Artifacts are the truth about what is done (`make`), so Prefect's own cache, keyed by paths, stays off.
TASKS: dict[str, Any] = {
    stage.__name__: task(
        stage,
        name=stage.__name__,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=5,
        retry_condition_fn=_is_transient,
    )
    for job in (
        *(clean_job, train_job, certify_job, condense_job, denoise_job),
        *(robustness_job, harden_job, ingest_job, redteam_job),
    )
    for stage in job.STAGES
}


class PrefectRun(Run):
    """A run whose stages are Prefect tasks; groups of shards are submitted side by side."""

    def _call(self, function: Callable[..., A], *args: Any, **more: Any) -> A:
        artifact: A = TASKS[function.__name__](*args, **more)
        return artifact

    def _call_groups(self, function: Callable[..., A], groups: list[list[str]], *args: Any) -> None:
        wrapped = TASKS[function.__name__]
        futures = [wrapped.submit(*args, shards=group) for group in groups]
        wait(futures)
        for future in futures:
            future.result()


def _flow(name: str) -> Callable[[Callable[P, dict[str, Any]]], Callable[P, dict[str, Any]]]:
    """A flow of this name, its runs named by their folders; groups of shards are worked on by threads."""
    runner: Any = ThreadPoolTaskRunner(max_workers=8)
    return flow(name=name, flow_run_name=f"{name} {{out}}", task_runner=runner, persist_result=False)


@_flow("clean")
def clean_flow(config: CleanConfig, out: str) -> dict[str, Any]:
    """Clean shards: index, embed, score, select, write, report."""
    run = PrefectRun(out, config.compute, config.groups)
    summary = clean_job.summary(clean_job.clean(config, run))
    create_markdown_artifact(key="clean-report", markdown=_markdown(summary, run), description=f"Cleaned {out}")
    return summary


@_flow("ingest")
def ingest_flow(config: IngestConfig, out: str) -> dict[str, Any]:
    """Sanitize what has landed, batch by batch, into the store `out`; an event tells what became of each batch."""

    def committed(batch: dict[str, Any]) -> None:
        resource = {"prefect.resource.id": f"sanitize.batch.{batch['batch']}", "prefect.resource.name": batch["batch"]}
        links = {name: _link(batch[name]) for name in ("report", "drift") if batch[name]}
        emit_event(
            event=f"sanitize.batch.{batch['status']}",
            resource=resource | {"sanitize.store": out},
            payload=batch | links,
        )

    return ingest_job.ingest(config, out, PrefectRun, committed)


@_flow("train")
def train_flow(config: TrainRunConfig, out: str) -> dict[str, Any]:
    """Train a robust model: index, pre-train where asked, train, score samples by how often they were dropped."""
    return train_job.train(config, PrefectRun(out, config.compute, config.n_groups))


@_flow("certify")
def certify_flow(config: CertifyRunConfig, out: str) -> dict[str, Any]:
    """Certify a trained model: index, certify, package, report."""
    return certify_job.certify(config, PrefectRun(out, config.compute, config.n_groups))


@_flow("harden")
def harden_flow(config: HardenConfig, out: str) -> dict[str, Any]:
    """Repair a model that may have learned a backdoor: index, repair, certify where asked, package."""
    return harden_job.harden(config, PrefectRun(out, config.compute, config.n_groups))


@_flow("condense")
def condense_flow(config: CondenseRunConfig, out: str) -> dict[str, Any]:
    """Condense shards: index, learn a few images a class, measure what networks learn from them."""
    return condense_job.condense(config, PrefectRun(out, config.compute, config.n_groups))


@_flow("denoise")
def denoise_flow(config: DenoiseRunConfig, out: str) -> dict[str, Any]:
    """Modify training images: index, principal components, PCA-noise, page."""
    return denoise_job.denoise(config, PrefectRun(out, config.compute, config.n_groups))


@_flow("robustness")
def robustness_flow(config: RobustnessRunConfig, out: str) -> dict[str, Any]:
    """Attack a trained model: index, principal components, smallest perturbations, page."""
    return robustness_job.robustness(config, PrefectRun(out, config.compute, config.n_groups))


@_flow("redteam")
def redteam_flow(config: RedTeamConfig, out: str) -> dict[str, Any]:
    """Try a pipeline: sample, plant known attacks, clean blind, train before and after, measure, page."""
    return redteam_job.redteam(config, PrefectRun(out, config.clean.compute, config.clean.groups))


def _link(url: str) -> str:
    return Path(absolute(url)).as_uri() if is_local(url) else url


def _markdown(summary: dict[str, Any], run: Run) -> str:
    counts = summary["samples"]
    rows = [f"| {s['stage']} | {s['samples'] or ''} | {s['seconds']:.1f} |" for s in run.stages]
    return "\n".join(
        [
            f"**{counts['samples']:,} samples: {counts['kept']:,} clean, {counts['quarantined']:,} quarantined, "
            f"{counts['unreadable']:,} unreadable.**",
            "",
            f"[Report]({_link(summary['report'])})",
            "",
            "| stage | samples | seconds |",
            "|---|---:|---:|",
            *rows,
        ]
    )
