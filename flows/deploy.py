"""A step of `prefect deploy`: the parameters of a deployment are a file of `configs/`, read when it is deployed."""

from pathlib import Path
from typing import Any

import yaml


def read_config(path: str) -> dict[str, Any]:
    """Settings of a YAML file; in prefect.yaml they are `{{ ID.settings }}`, ID being the step's."""
    return {"settings": yaml.safe_load(Path(path).read_text())}
