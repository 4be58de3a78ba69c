"""Rules of the house that no single module can keep."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import sanitize
from sanitize.artifacts import Artifact
from sanitize.attack.several import OneAttack
from sanitize.compute import Compute
from sanitize.embed import AnyEmbedderConfig
from sanitize.models.architectures import Architecture
from sanitize.repairs import RepairConfig
from sanitize.score import ScorerConfig
from sanitize.select import Rule
from sanitize.stage import STAGES, Work, stage

MODULES: list[ModuleType] = [
    importlib.import_module(module.name) for module in pkgutil.walk_packages(sanitize.__path__, "sanitize.")
]


DECLARED = [declared.function for declared in STAGES.values()]  # importing the modules has declared them
every_stage = pytest.mark.parametrize("function", DECLARED, ids=lambda function: function.__name__)


@every_stage
def test_a_stage_takes_its_config_first_and_ends_with_out_and_compute(function: Callable) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    names = [parameter.name for parameter in parameters]
    assert "config" not in names[1:]
    after_out = names[names.index("out") + 1 :]
    assert after_out[0] == "compute", names
    assert all(parameter.default is parameter.empty for parameter in parameters[: names.index("compute") + 1])
    optional = parameters[names.index("compute") + 1 :]
    assert all(parameter.default is not parameter.empty for parameter in optional)


@every_stage
def test_a_stage_is_documented_and_typed(function: Callable) -> None:
    assert inspect.getdoc(function)
    signature = inspect.signature(function)
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    assert issubclass(signature.return_annotation, Artifact)


def test_every_stage_is_declared() -> None:
    """A stage is a public function that takes `out` and `compute`; nothing else calls `make`."""
    found = {
        function
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_")
        and {"out", "compute"} <= inspect.signature(function).parameters.keys()
        and function.__module__.startswith("sanitize.")
        and "progress" not in inspect.signature(function).parameters  # a job as a Python function
    }
    assert found == set(DECLARED)
    for module in MODULES:
        if not module.__name__.startswith(
            ("sanitize.artifacts", "sanitize.stage", "sanitize.jobs.plan")
        ):  # plan copies samples
            assert not hasattr(module, "make"), module.__name__


def test_what_is_no_stage_cannot_be_declared() -> None:
    def without_compute(out: str) -> Work:
        return Work()

    with pytest.raises(TypeError, match="out, compute"):
        stage(Artifact)(without_compute)
    taken = next(iter(STAGES))

    def again(out: str, compute: Compute) -> Work:
        return Work()

    again.__name__ = taken
    with pytest.raises(TypeError, match=f"two stages {taken}"):
        stage(Artifact)(again)


def configs() -> list[type[BaseModel]]:
    models = {
        model
        for module in MODULES
        for _, model in inspect.getmembers(module, inspect.isclass)
        if issubclass(model, BaseModel) and model.__module__.startswith("sanitize.")
    }
    suffixes = ("Config", "Rule", "Limits", "Compute")
    return sorted((m for m in models if m.__name__.endswith(suffixes)), key=lambda m: m.__name__)


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.__name__)
def test_a_config_is_frozen_documented_and_refuses_unknown_fields(config: type[BaseModel]) -> None:
    assert config.model_config.get("frozen") is True
    assert config.model_config.get("extra") == "forbid"
    assert inspect.getdoc(config)


METHODS: dict[str, Any] = {
    "architecture": Architecture,
    "attack": OneAttack,
    "embedder": AnyEmbedderConfig,
    "repair": RepairConfig,
    "rule": Rule,
    "scorer": ScorerConfig,
}


def members(union: Any) -> list[type[BaseModel]]:
    """Configs in a union; the members of some unions are annotated."""
    return [get_args(one)[0] if get_args(one) else one for one in get_args(get_args(union)[0])]


@pytest.mark.parametrize("union", METHODS.values(), ids=METHODS)
def test_methods_are_plugged_in_in_one_way(union: Any) -> None:
    """A config with a kind of its own, that is data: all it does is build the method, by that name."""
    configs = members(union)
    kinds = [kind for config in configs for kind in get_args(config.model_fields["kind"].annotation)]
    assert len(set(kinds)) == len(kinds) >= len(configs) > 1
    for config in configs:
        assert inspect.isfunction(config.build)
        assert next(iter(inspect.signature(config.build).parameters)) == "self"
        assert not getattr(config.build, "__isabstractmethod__", False)
        assert not {"fit", "repair", "score", "stage", "thresholds", "__call__"} & set(dir(config))


def test_an_embedder_builds_a_stage_of_its_own_file() -> None:
    for config in members(AnyEmbedderConfig):
        stage = config().build()
        assert STAGES[stage.__name__].function is stage
        assert stage.__module__ == config.__module__
        assert next(iter(inspect.signature(stage).parameters.values())).annotation is config


def test_nothing_but_compute_asks_for_hardware_or_seeds_globally() -> None:
    for module in MODULES:
        if module.__name__ == "sanitize.compute":
            continue
        source = inspect.getsource(module)
        for words in ("torch.cuda", "torch.autocast(", "torch.manual_seed(", "np.random.", "random.random("):
            assert words not in source, f"{module.__name__} says {words}"


@pytest.mark.parametrize("name", ["fit", "embed.simclr"])
def test_every_stage_that_trains_on_images_adds_noise_in_pixels(name: str) -> None:
    assert "unit=model_config.pixel_unit" in inspect.getsource(importlib.import_module(f"sanitize.{name}"))
