"""Every YAML in configs/ and in docs/ validates."""

import re
from pathlib import Path

import pytest
import yaml

from flows.clean import CleanConfig
from flows.condense import CondenseRunConfig
from flows.denoise import DenoiseRunConfig
from flows.harden import HardenConfig
from flows.ingest import IngestConfig
from flows.redteam import RedTeamConfig
from flows.train import TrainRunConfig

ROOT = Path(__file__).parents[1]
CONFIGS = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
EXAMPLES = {
    f"{page.name}-{number}": block
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
}


def test_there_are_configs() -> None:
    assert CONFIGS
    assert {name.partition(".")[0] for name in EXAMPLES} >= {"clean", "train", "repair", "certify", "ingest"}


@pytest.mark.parametrize("text", (CONFIGS | EXAMPLES).values(), ids=CONFIGS | EXAMPLES)
def test_config_validates(text: str) -> None:
    command = re.match(r"# sanitize (\w+)", text)  # the first line says how to use it
    kinds = {
        "train": TrainRunConfig,
        "condense": CondenseRunConfig,
        "denoise": DenoiseRunConfig,
        "repair": HardenConfig,
        "redteam": RedTeamConfig,
        "ingest": IngestConfig,
    }
    kind = kinds.get(command[1] if command else "", CleanConfig)
    config = kind.model_validate(yaml.safe_load(text))
    assert getattr(config, "clean", config).shards
