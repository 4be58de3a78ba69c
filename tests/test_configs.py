"""Every YAML in configs/ validates."""

import re
from pathlib import Path

import pytest
import yaml

from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.condense import CondenseRunConfig
from sanitize.jobs.denoise import DenoiseRunConfig
from sanitize.jobs.ingest import IngestConfig
from sanitize.jobs.redteam import RedTeamConfig
from sanitize.jobs.repair import RepairRunConfig
from sanitize.jobs.train import TrainRunConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert CONFIGS


def test_the_readmes_config_validates() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert len(CleanConfig.model_validate(yaml.safe_load(example)).scorers) == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_validates(path: Path) -> None:
    text = path.read_text()
    command = re.match(r"# sanitize (\w+)", text)  # the first line says how to use it
    kinds = {
        "train": TrainRunConfig,
        "condense": CondenseRunConfig,
        "denoise": DenoiseRunConfig,
        "repair": RepairRunConfig,
        "redteam": RedTeamConfig,
        "ingest": IngestConfig,
    }
    kind = kinds.get(command[1] if command else "", CleanConfig)
    config = kind.model_validate(yaml.safe_load(text))
    assert getattr(config, "clean", config).shards
