"""Rules of the house that no single module can keep."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType

import pytest
from pydantic import BaseModel

import sanitize
from sanitize.artifacts import Artifact
from sanitize.attack import poison_shards
from sanitize.certify import certify_smoothing, train_partitions
from sanitize.condense import condense_dataset
from sanitize.data.index import index_shards
from sanitize.denoise import denoise_shards, fit_pca
from sanitize.drift import check_drift, fit_projection, merge_statistics, summarise_shards
from sanitize.embed import embed_shards, import_table, pretrain_simclr, train_embedder
from sanitize.measure import measure_robustness
from sanitize.redteam import measure_case, sample_shards, sum_up
from sanitize.repair import repair_model
from sanitize.report import write_report
from sanitize.score import fit_scorer, score_shards
from sanitize.select import judge_shards, restore_samples, select_samples, write_selected
from sanitize.train import drop_scores, train_robust

STAGES: list[Callable] = [
    index_shards,
    train_embedder,
    pretrain_simclr,
    embed_shards,
    import_table,
    fit_scorer,
    score_shards,
    select_samples,
    write_selected,
    restore_samples,
    judge_shards,
    fit_projection,
    summarise_shards,
    merge_statistics,
    check_drift,
    poison_shards,
    write_report,
    train_robust,
    drop_scores,
    certify_smoothing,
    train_partitions,
    fit_pca,
    denoise_shards,
    measure_robustness,
    condense_dataset,
    repair_model,
    sample_shards,
    measure_case,
    sum_up,
]
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
MODULES: list[ModuleType] = [
    importlib.import_module(module.name) for module in pkgutil.walk_packages(sanitize.__path__, "sanitize.")
]


@every_stage
def test_a_stage_takes_its_config_first_and_ends_with_out_and_compute(stage: Callable) -> None:
    parameters = list(inspect.signature(stage).parameters.values())
    names = [parameter.name for parameter in parameters]
    assert names[0] == "config"
    assert "out" in names
    after_out = names[names.index("out") + 1 :]
    assert after_out[0] == "compute", names
    assert all(parameter.default is parameter.empty for parameter in parameters[: names.index("compute") + 1])
    optional = parameters[names.index("compute") + 1 :]
    assert all(parameter.default is not parameter.empty for parameter in optional)


@every_stage
def test_a_stage_is_documented_and_typed(stage: Callable) -> None:
    assert inspect.getdoc(stage)
    signature = inspect.signature(stage)
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    returned = signature.return_annotation
    assert isinstance(returned, type), "evaluated annotations, so that this test sees the class"
    assert issubclass(returned, Artifact)


def test_every_stage_is_in_the_list() -> None:
    """A stage is a public function that takes `config`, `out` and `compute`."""
    found = {
        function
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and {"config", "out", "compute"} <= inspect.signature(function).parameters.keys()
    }
    assert found == set(STAGES)


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


def test_nothing_but_compute_asks_for_hardware_or_seeds_globally() -> None:
    for module in MODULES:
        if module.__name__ == "sanitize.compute":
            continue
        source = inspect.getsource(module)
        for words in ("torch.cuda", "torch.autocast(", "torch.manual_seed(", "np.random.", "random.random("):
            assert words not in source, f"{module.__name__} says {words}"


@pytest.mark.parametrize("name", ["train.stage", "embed.embedder", "embed.simclr"])
def test_every_stage_that_trains_on_images_adds_noise_in_pixels(name: str) -> None:
    assert "unit=model_config.pixel_unit" in inspect.getsource(importlib.import_module(f"sanitize.{name}"))
