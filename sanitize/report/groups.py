"""The groups of a cleaning run with pictures of some of their samples, so that a person sees what each group is."""

from collections.abc import Sequence
from typing import Any

from sanitize.data.dataset import Dataset
from sanitize.data.tables import Selection
from sanitize.errors import ArtifactError
from sanitize.report.pictures import Thumbnail, pictures, written
from sanitize.select.write import Shards

BUDGET = 800_000  # bytes of the pictures of all groups together, before base64
SIDES = (80, 64, 48, 40, 32, 24)  # of a picture in pixels
MAX_PICTURES, MIN_PICTURES = 240, 4  # of all groups together, as long as each has the fewest


def with_examples(groups: Sequence[dict[str, Any]], selection: Selection, most: int) -> list[dict[str, Any]]:
    """The groups; of each, `examples` become a few samples with shard, position, key and status.

    Args:
        groups: groups of `scorer.json`; those of older runs have no examples.
        selection: verdict on each sample.
        most: most samples of a group.

    Raises:
        ArtifactError: an example names no sample, or one that is not in the selection.
    """
    n_shown = min(most, max(MIN_PICTURES, MAX_PICTURES // max(1, len(groups))))
    examples = [group.get("examples", [])[:n_shown] for group in groups]
    wanted: dict[str, set[int]] = {}
    for one in (one for some in examples for one in some):
        if not (isinstance(one, dict) and type(one.get("shard")) is str and type(one.get("position")) is int):
            raise ArtifactError(f"scorer.json names {one!r:.100} as a sample of a group; it has no shard and position")
        wanted.setdefault(one["shard"], set()).add(one["position"])
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for shard, positions in sorted(wanted.items()):
        if shard not in selection.shards:
            raise ArtifactError(f"{selection.path} has no shard {shard}, which holds samples of a group")
        table = selection.rows(shard, ["key", "status"])
        if not 0 <= min(positions) <= max(positions) < len(table):
            raise ArtifactError(f"{selection.path}: shard {shard} has no sample {max(positions)}, which is in a group")
        rows = table.take(sorted(positions)).to_pylist()
        found |= {(shard, position): row for position, row in zip(sorted(positions), rows, strict=True)}
    return [
        group | {"examples": [one | found[one["shard"], one["position"]] for one in some]}
        for group, some in zip(groups, examples, strict=True)
    ]


def pictures_of(groups: Sequence[dict[str, Any]], dataset: Dataset, shards: Shards) -> list[list[Thumbnail | None]]:
    """A picture of each example of each group; None if its image is not found."""
    examples = [one for group in groups for one in group["examples"]]
    found = iter(pictures(examples, dataset, written(shards), BUDGET, SIDES))
    return [[next(found) for _ in group["examples"]] for group in groups]
