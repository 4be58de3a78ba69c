"""What tests of stores share: how shards land, and what a store says."""

import json
import shutil
from pathlib import Path
from typing import Any

from sanitize.compute import Compute
from sanitize.jobs.ingest import IngestConfig
from sanitize.jobs.store import FEED

CPU = Compute(device="cpu")
LEVEL = 0.01  # of about 400 rows that thresholds are calibrated on


def land(shards: list[str], incoming: Path, prefix: str = "") -> None:
    for shard in shards:
        shutil.copy2(shard, incoming / f"{prefix}{Path(shard).name}")


def config_of(incoming: Path, **more: Any) -> IngestConfig:
    return IngestConfig(shards=(str(incoming),), compute=CPU, **more)


def feed_of(store: Path) -> list[dict[str, Any]]:
    return json.loads((store / FEED).read_text())["shards"]
