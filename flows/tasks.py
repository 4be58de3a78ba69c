"""Prefect: each stage is a task, each job a flow, as the registries have them. The only module that imports Prefect."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

import httpx
import torch
from prefect import Flow, get_client, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    get_current_settings,
    temporary_settings,
)
from prefect.states import Cancelled, Crashed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows import interrupts
from flows.pages import check_base, page_address
from flows.retry import is_transient
from flows.server import does_not_answer, temporary_server, watched
from sanitize.artifacts import Artifact
from sanitize.compute import Compute
from sanitize.errors import ConfigError, SanitizeError, StorageError
from sanitize.jobs import JOBS, Job
from sanitize.jobs.job import ShardsConfig
from sanitize.jobs.redteam import table as table_of_cases
from sanitize.jobs.run import Run
from sanitize.jobs.runner import Processes, Ray, RunnerConfig, Threads
from sanitize.plural import counted
from sanitize.stage import STAGES
from sanitize.tar.names import as_markdown, printable

A = TypeVar("A", bound=Artifact)
P = ParamSpec("P")
SCHEDULED = "{scheduled}"
MAX_NAMED = 100  # refused shards that an event or a page names; `sanitize batches` names all
PROGRESS_SECONDS = 5.0  # between two updates of the progress that the server shows
MAX_TEXT, MAX_REASONS = 2_000, 100  # characters of a text, and reasons of a batch, that the server gets


# Artifacts are the truth about what is done (`make`), so Prefect's own cache, keyed by paths, stays off. The jobs that
# are imported above have declared their stages.
TASKS: dict[str, Any] = {
    name: task(
        cast(Any, stage.function),  # whose signature Prefect reads when it is called
        name=name,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=5,
        retry_condition_fn=is_transient,
    )
    for name, stage in STAGES.items()
}


class PrefectRun(Run):
    """A run whose stages are Prefect tasks; groups of shards are submitted side by side to `runner`."""

    def __init__(self, out: str, compute: Compute, n_groups: int, runner: TaskRunner[Any]) -> None:
        super().__init__(out, compute, n_groups)
        self._runner = runner
        self._gpu = _limited_gpu(compute)

    def _task(self, function: Callable[..., A]) -> Any:
        wrapped = TASKS[function.__name__]
        if self._gpu is None or not STAGES[function.__name__].gpu:
            return wrapped
        return wrapped.with_options(tags={self._gpu})  # one task at a time is on each GPU

    def _call(self, function: Callable[..., A], *args: Any, **more: Any) -> A:
        artifact: A = self._task(function)(*args, **more)
        return artifact

    def _call_groups(self, function: Callable[..., A], groups: list[list[str]], *args: Any) -> None:
        name = function.__name__
        # Ray itself assigns GPUs to tasks; this process has no list of them.
        is_here = isinstance(self._runner, ThreadPoolTaskRunner | ProcessPoolTaskRunner)
        submitted = self._task(function) if is_here else TASKS[name]
        given = [dict(signature(function).bind(*args, shards=group).arguments) for group in groups]
        futures = [self._runner.submit(submitted, parameters) for parameters in given]
        progress: Any = create_progress_artifact(0.0, key=name.replace("_", "-"), description=f"{name}: shards")
        updated = time.monotonic()
        for done, future in enumerate(futures, start=1):
            future.wait()
            if done == len(futures) or time.monotonic() - updated > PROGRESS_SECONDS:
                update_progress_artifact(progress, 100 * done / len(futures))
                updated = time.monotonic()
        for future in futures:  # raises what failed, after all of them have ended
            future.result()

    def note_batch(self, batch: dict[str, Any]) -> None:
        """Emit an event with the status of a batch of `ingest`."""
        resource = {"prefect.resource.id": f"sanitize.batch.{batch['batch']}", "prefect.resource.name": batch["batch"]}
        pages = {name: page_address(batch[name]) for name in ("report", "drift") if batch[name]}
        reasons = {"reasons": [printable(reason)[:MAX_TEXT] for reason in batch["reasons"][:MAX_REASONS]]}
        emit_event(
            event=f"sanitize.batch.{batch['status']}",
            resource=resource | {"sanitize.store": self.out},
            payload=batch | reasons | pages,
        )

    def publish(self, name: str, result: dict[str, Any], summary: str = "") -> None:
        """Artifacts for Prefect's pages: a table of the stages, and where the report is; `summary` is Markdown."""
        where = as_markdown(self.out)
        rows = [(s["stage"], s["samples"] or "", f"{s['seconds']:.1f}") for s in self.stages]
        table = _table(("stage", "samples", "seconds"), rows)
        create_markdown_artifact(f"{summary}\n\n{table}", key=f"{name}-stages", description=where)
        if "report" in result:
            _show_report(result["report"], key=f"{name}-report", description=where)


def _limited_gpu(compute: Compute) -> str | None:
    """Tag of this process' GPU, which one task of all runs may carry at a time; None where there is no GPU."""
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
            interrupts.prepare_workers()
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
def _run(job: Job, config: Any, out: str) -> Iterator[PrefectRun]:
    """The run of a flow. In `out`, "{scheduled}" stands for when it was due: one folder a run, for retries the same."""
    if SCHEDULED in out:
        out = out.replace(SCHEDULED, flow_run.scheduled_start_time.strftime("%Y%m%dT%H%M%SZ"))
    settings = job.settings(config)
    kind, n_groups = (settings.runner, settings.groups) if isinstance(settings, ShardsConfig) else (Threads(), 1)
    with job.claim(settings, out) as folder, _task_runner(kind) as runner:
        yield PrefectRun(folder, settings.compute, n_groups, runner)


class CalledFlow(Flow[P, dict[str, Any]]):
    """A flow that has a server while it is called: the configured one, or a temporary one of this process.

    Under a worker Prefect does not call a flow but runs it; there nothing of this happens.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the flow.

        Raises:
            SanitizeError: an error of a stage; StorageError if the server does not answer.
        """
        with _served() as url:
            try:
                return super().__call__(*args, **kwargs)
            except SanitizeError:
                raise
            except Exception as error:
                if _is_unanswered(error):
                    raise StorageError(does_not_answer(url)) from error
                raise


@contextmanager
def _served() -> Iterator[str]:
    """API URL of the server; if it dies, a command is ended, for Prefect's client would retry for minutes."""
    url = PREFECT_API_URL.value()
    if url is None and not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        raise ConfigError("no Prefect server is set, and a temporary one is not allowed: set PREFECT_API_URL")
    if url is None:
        url = temporary_server(get_current_settings().to_environment_variables(exclude_unset=True))

    def end() -> None:
        if interrupts.is_active():
            interrupts.end(1, f"failed: {does_not_answer(url)}")

    with temporary_settings({PREFECT_API_URL: url}), watched(url, end):
        yield url


def _is_unanswered(error: BaseException | None) -> bool:
    """True if the error, or one that it came from, is that of a request without an answer."""
    while error is not None:
        if isinstance(error, httpx.TransportError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flow(name: str) -> Callable[[Callable[P, dict[str, Any]]], Callable[P, dict[str, Any]]]:
    """A flow of this name, its runs named by their folders; an interrupted command reports to the server."""

    def decorate(function: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
        @wraps(function)
        def interruptible(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
            check_base()
            interrupts.take_signals()
            # The context holds the server's URL; without it, Prefect would start another server for this report.
            context, run_id = copy_context(), flow_run.id
            with interrupts.before_end(lambda signum: context.run(_report_interrupt, run_id, signum)):
                return function(*args, **kwargs)

        return CalledFlow(interruptible, name=name, flow_run_name=f"{name} {{out}}", persist_result=False)

    return decorate


def _report_interrupt(run_id: str, signum: int) -> None:
    """Set the state of the run, which would stay "Running" on the server for good."""
    how = Cancelled if signum == signal.SIGINT else Crashed
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, how(message=f"interrupted by signal {signum}"), force=True)


def _publish_clean(run: PrefectRun, summary: dict[str, Any]) -> None:
    samples = summary["samples"]
    counts = (
        f"**{counted(samples['samples'], 'sample')}: {samples['kept']:,} clean, "
        f"{samples['quarantined']:,} quarantined, {samples['unreadable']:,} unreadable.**"
    )
    run.publish("clean", summary, counts)


def _publish_redteam(run: PrefectRun, result: dict[str, Any]) -> None:
    """The table, and an event: all requirements met, or one missed."""
    emit_event(
        event=f"sanitize.redteam.{'met' if result['met'] else 'missed'}",
        resource={"prefect.resource.id": "sanitize.redteam", "prefect.resource.name": run.out},
        payload={"requirements": result["requirements"], "report": page_address(result["report"])},
    )
    run.publish("redteam", result, table_of_cases(result))


def _publish_ingest(run: PrefectRun, result: dict[str, Any]) -> None:
    """A table of batches, and an event that names refused shards; `PrefectRun.note_batch` has sent one event a batch.

    Raises:
        StorageError: storage kept a batch from being finished.
    """
    refused = result["refused"]
    if refused:
        emit_event(
            event="sanitize.shards.refused",
            resource={"prefect.resource.id": "sanitize.store", "prefect.resource.name": printable(run.out)},
            payload={"n": len(refused), "first": refused[:MAX_NAMED]},
        )
    rows = [(b["batch"], b["status"], b["shards"], "; ".join(b["reasons"])) for b in result["batches"]]
    rows += [(r["shard"], r["status"], 1, "; ".join(r["reasons"])) for r in refused[:MAX_NAMED]]
    table = _table(("batch or shard", "status", "shards", "reasons"), rows)
    create_markdown_artifact(table, key="ingest-batches", description=as_markdown(run.out))
    if stuck := [batch for batch in result["batches"] if batch["status"] == "claimed"]:
        raise StorageError(f"batch {stuck[0]['batch']} was not finished: {stuck[0]['reasons'][0]}; run again")


# What the server shows of a finished job, where it is more than its stages and its report.
PUBLISHED: dict[str, Callable[[PrefectRun, dict[str, Any]], None]] = {
    "clean": _publish_clean,
    "ingest": _publish_ingest,
    "redteam": _publish_redteam,
}


def _flow_of(job: Job) -> Callable[..., dict[str, Any]]:
    def flow(config: Any, out: str) -> dict[str, Any]:
        with _run(job, config, out) as run:
            result = job.function(config, run)
            if job.name in PUBLISHED:
                PUBLISHED[job.name](run, result)
            else:
                run.publish(job.name, result)
            return result

    # Prefect has its parameters and its entrypoint from these.
    flow.__name__ = flow.__qualname__ = f"{job.name}_flow"
    flow.__doc__ = job.function.__doc__
    flow.__annotations__["config"] = job.config
    return _flow(job.name)(flow)


FLOWS = {name: _flow_of(job) for name, job in JOBS.items() if job.has_flow}
globals().update({f"{name}_flow": flow for name, flow in FLOWS.items()})  # flows.tasks.clean_flow is an entrypoint


def _show_report(url: str, key: str, description: str) -> None:
    """A link to a page, or its place in words where no web server is known that shows it."""
    address = page_address(url)
    if address.startswith(("http://", "https://")):
        create_link_artifact(address, link_text="report", key=key, description=description)
    else:
        create_markdown_artifact(f"Report: {as_markdown(address)}", key=key, description=description)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; cells may come from data."""
    cells = [[as_markdown(str(cell), MAX_TEXT) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells])
