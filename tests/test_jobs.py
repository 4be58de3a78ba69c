"""Jobs are declared once, on one base config, and know nothing of Prefect; no import ring is left."""

import inspect
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from typing import Any, get_type_hints

import grimp
import pytest
from pydantic import BaseModel, ValidationError

from flows.cli.command import COMMANDS
from sanitize.compute import Compute
from sanitize.jobs import JOBS, CleanConfig, CleanRun, Job, JobConfig, RedTeamConfig, run_job
from sanitize.jobs.job import ShardsConfig, job, job_of
from sanitize.jobs.run import Run

NEEDED = {
    "package": {"model": {"weights": "w.pt", "architecture": "mlp", "size": 8, "mean": [0.5], "std": [0.25]}},
    "certify": {"model": "model"},
    "denoise": {"denoise": {"dims": 1}},
    "reference": {"run": "run"},
    "repair": {"model": "model"},
    "restore": {"keys": ["a"]},
    "robustness": {"model": "model"},
}
every_job = pytest.mark.parametrize("declared", JOBS.values(), ids=JOBS.keys())


def packages_of(module: str) -> set[str]:
    """Packages that a module is in: of `a.b.c`, `a` and `a.b`."""
    parts = module.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


def test_no_module_imports_another_in_a_ring() -> None:
    """Imports inside of functions and for type checking count too, and so does the `__init__.py` of each package on the
    way to a module. A module is imported after the packages that it is in, so those count only where it names them."""
    graph = grimp.build_graph("sanitize", "flows", cache_dir=None)
    imports = {}
    for module in graph.modules:
        named = graph.find_modules_directly_imported_by(module)
        run_first = {package for other in named for package in packages_of(other)}
        imports[module] = named | (run_first - packages_of(module) - {module})
    assert "sanitize.jobs.clean" in imports["sanitize.jobs.redteam"]
    assert "sanitize.data" in imports["sanitize.jobs.clean"]
    assert [module for module in imports if "sanitize.api" in imports[module]] == ["sanitize"]  # at first use
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_importing_the_jobs_does_not_import_prefect() -> None:
    code = "import sys, sanitize.jobs; print(sorted({'flows', 'prefect', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@every_job
def test_a_job_has_a_file_of_its_name_and_takes_its_config(declared: Job) -> None:
    assert declared.function.__module__ == f"sanitize.jobs.{declared.name}"
    assert list(inspect.signature(declared.function).parameters) == ["config", "run"]
    assert get_type_hints(declared.function) == {"config": declared.config, "run": Run, "return": dict[str, Any]}
    assert inspect.getdoc(declared.function)


@every_job
def test_settings_of_the_run_are_in_one_base_config(declared: Job) -> None:
    is_wrapped = "clean" in declared.config.model_fields  # the section of a red team
    given = {"shards": ["a.tar"]} if declared.reads_shards else {}
    given = {"clean": given} if is_wrapped else given | NEEDED.get(declared.name, {})
    config = declared.config.model_validate(given)
    settings = declared.settings(config)
    assert isinstance(settings, JobConfig)
    assert isinstance(settings, ShardsConfig) == declared.reads_shards
    assert settings.sources == (("a.tar",) if declared.reads_shards else ())
    assert job_of(config) is declared
    with pytest.raises(ValidationError):
        declared.config.model_validate(given | {"nothing_of_the_kind": 1})


@every_job
def test_a_command_knows_what_the_registry_says(declared: Job) -> None:
    command = COMMANDS[declared.name]
    assert command.has_flow == declared.has_flow
    assert ("out" in command.parameters()) != declared.is_temporary
    assert ("shards" in command.parameters()) == declared.reads_shards


def test_a_job_is_declared_once_and_says_where_its_settings_are() -> None:
    def clean(config: CleanConfig, run: Run) -> dict[str, Any]:
        return {}

    with pytest.raises(TypeError, match="already"):
        job(CleanConfig, CleanRun)(clean)
    with pytest.raises(TypeError, match="settings of all jobs"):
        job(BaseModel, CleanRun)
    with pytest.raises(TypeError, match="settings of all jobs"):
        job(RedTeamConfig, CleanRun, section="sample")
    with pytest.raises(TypeError, match="no job takes a Compute"):
        run_job(Compute(), "nowhere")
    assert JOBS["clean"].function is not clean
