"""An import, and what it wrote."""

import json
import tarfile
from pathlib import Path
from typing import Any

from sanitize.compute import Compute
from sanitize.importing import ImportConfig, Imported, import_data

Samples = dict[str, dict[str, bytes]]


def run(source: Any, out: Path, seed: int = 0, **settings: Any) -> Imported:
    places = [str(one) for one in source] if isinstance(source, list) else str(source)
    return import_data(ImportConfig(**settings), places, str(out), Compute(device="cpu", seed=seed))


def samples(made: Imported) -> Samples:
    """Members of each sample by key and suffix, in the order of the shards."""
    found: Samples = {}
    for shard in made.shards():
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def by_file(made: Imported) -> dict[str, dict[str, Any]]:
    """The record of each sample by the name of its file, with its other members."""
    records = [json.loads(members["json"]) | {"members": members} for members in samples(made).values()]
    return {record["file"]: record for record in records}


def reasons(made: Imported) -> dict[str, int]:
    return {one["reason"]: one["n"] for one in made.summary()["refused_by_reason"]}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
