"""Every YAML in configs/ and in docs/ validates."""

import re
from pathlib import Path

import pytest
import yaml

from sanitize.jobs import JOBS, CleanConfig

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
    kind = JOBS[command[1]].config if command and command[1] in JOBS else CleanConfig
    config = kind.model_validate(yaml.safe_load(text))
    assert getattr(config, "clean", config).shards
