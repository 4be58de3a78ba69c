"""How stages become tasks."""

import inspect
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.importtools import import_object

from flows import tasks
from sanitize.artifacts import Artifact, Recipe, make
from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.jobs import JOBS
from sanitize.jobs.runner import Ray
from sanitize.stage import Stage


@pytest.mark.prefect
def test_one_task_at_a_time_is_on_a_gpu(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: Compute
) -> None:
    at_work: list[str] = []
    together: dict[str, int] = {"on_gpu": 0, "on_cpu": 0}
    lock = threading.Lock()

    def stage(name: str, out: str, shards: Sequence[str] | None) -> Artifact:
        if shards is not None:
            with lock:
                at_work.append(name)
                together[name] = max(together[name], at_work.count(name))
            time.sleep(1)
            with lock:
                at_work.remove(name)
        return make(Artifact, out, Recipe(stage=name), parts=("a", "b"), write_part=lambda *_: None, only=shards)

    def on_gpu(out: str, compute: Compute, shards: Sequence[str] | None = None) -> Artifact:
        return stage("on_gpu", out, shards)

    def on_cpu(out: str, compute: Compute, shards: Sequence[str] | None = None) -> Artifact:
        return stage("on_cpu", out, shards)

    monkeypatch.setattr(tasks, "_limited_gpu", lambda _compute: tasks.limit_to_one("gpu-of-a-test"))
    for function in (on_gpu, on_cpu):
        monkeypatch.setitem(tasks.TASKS, function.__name__, task(function))
        declared = Stage(function, Artifact, version=1, sharded=True, gpu=function is on_gpu, draws="nothing")
        monkeypatch.setitem(tasks.STAGES, function.__name__, declared)

    @flow
    def both() -> None:
        with ThreadPoolTaskRunner[object](max_workers=2) as runner:
            run = tasks.PrefectRun(str(tmp_path), compute, 2, runner)
            for function in (on_gpu, on_cpu):
                run.sharded(function.__name__, function, ["a", "b"])

    both()
    assert together == {"on_gpu": 1, "on_cpu": 2}


def test_jobs_that_are_called_directly_have_no_flow() -> None:
    assert tasks.FLOWS.keys() == {name for name, job in JOBS.items() if job.has_flow}
    assert {"clean", "demo"} < tasks.FLOWS.keys() < JOBS.keys()
    assert not hasattr(tasks, "refit_flow")


@pytest.mark.parametrize("name", tasks.FLOWS)
def test_a_job_is_a_flow_that_a_deployment_can_name(name: str) -> None:
    flow = import_object(f"flows.tasks.{name}_flow")  # as Prefect finds it
    assert flow is tasks.FLOWS[name]
    assert flow.name == name
    assert flow.description.startswith(inspect.getdoc(JOBS[name].function).splitlines()[0])
    assert get_type_hints(flow.fn) == {"config": JOBS[name].config, "out": str, "return": dict[str, Any]}
    assert list(flow.parameters.properties) == ["config", "out"]


def test_no_gpu_no_limit(compute: Compute) -> None:
    assert tasks._limited_gpu(compute) is None


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)  # as the import finds it where it is missing
    with pytest.raises(ConfigError, match=r"sanitize\[ray\]"), tasks._task_runner(Ray()):
        pass
