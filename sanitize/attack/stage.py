"""Write poisoned copies of shards. Every image is re-encoded as PNG, poisoned or not, so that the file format does not
give the poison away; the ground truth lies beside the shards, never inside."""

import heapq
import json
from collections.abc import Sequence
from typing import Annotated, Any

import pyarrow as pa
import torch
from pydantic import Field

from sanitize.artifacts import Part, Recipe, Workshop, make
from sanitize.attack.badnets import BadNetsConfig
from sanitize.attack.blended import BlendedConfig
from sanitize.attack.labels import LabelNoiseConfig
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig, decode, encode_png
from sanitize.data.names import split_name
from sanitize.data.samples import Sample, find_image
from sanitize.data.tables import ShardTables, write_rows
from sanitize.data.tar_write import TarWriter
from sanitize.data.writer import shard_writer
from sanitize.errors import ConfigError
from sanitize.progress import track

AttackConfig = Annotated[BadNetsConfig | BlendedConfig | LabelNoiseConfig, Field(discriminator="kind")]


class Poisoned(ShardTables):
    """`shards/SHARD` and, as rows, the truth: position, key, original_label, label, poisoned."""

    def shard_paths(self) -> list[str]:
        """Paths of the poisoned shards, sorted."""
        return [self.url(name) for name in sorted(self.manifest().files) if name.startswith("shards/")]


def poison_shards(
    config: AttackConfig, dataset: Dataset, out: str, compute: Compute, shards: Sequence[str] | None = None
) -> Poisoned:
    """Write a poisoned copy of a data set, with the truth.

    Args:
        config: the attack.
        dataset: what is poisoned; unreadable samples are left out.
        out: folder of the artifact.
        compute: seed of the choice of samples and of random labels.
        shards: names of the shards to do now; None does all that are missing and finishes.

    Raises:
        ConfigError: the attack asks for more samples than are eligible, or its target is no class.
    """
    compute.activate()
    target = getattr(config, "target", 0)
    if isinstance(target, int) and not 0 <= target < dataset.n_classes:
        raise ConfigError(f"target {target} is no class: the data set has {dataset.n_classes}")
    recipe = Recipe(
        stage="poison_shards",
        config=config.model_dump(mode="json"),
        numerics=compute.numerics,
        inputs={"dataset": dataset.digest},
    )
    chosen: dict[str, dict[int, int]] = {}

    def write_part(shard: str, part: Part) -> None:
        if not chosen:
            chosen.update(choose(config, dataset, compute))
        rows = []
        with shard_writer(part, f"shards/{shard}") as tar:
            for sample, row in dataset.samples(shard):
                if row["status"] == "ok":
                    rows.append(_copy(sample, row, chosen[shard].get(sample.position), config, dataset, tar))
                    advance(1)
        if rows:
            write_rows(part, shard, pa.Table.from_pylist(rows))
        part.counts.update(samples=len(rows), poisoned=sum(row["poisoned"] for row in rows))

    def finish(part: Part, _workshop: Workshop) -> None:
        part.write_json("attack.json", config.model_dump(mode="json"))

    with track("poison", dataset.n_samples if shards is None else None) as advance:
        return make(Poisoned, out, recipe, parts=dataset.shards, write_part=write_part, finish=finish, only=shards)


def choose(config: AttackConfig, dataset: Dataset, compute: Compute) -> dict[str, dict[int, int]]:
    """Which samples are poisoned, and the labels they get: {shard: {position: new label}}.

    round(rate * n) samples with the smallest keyed hash among those whose label changes, so that the choice does not
    depend on the order of anything.
    """
    wanted = round(config.rate * dataset.n_samples)
    candidates: list[tuple[int, str, int, int]] = []
    for shard in dataset.shards:
        table = dataset.rows(shard, ["position", "label", "status"])
        rows = [row for row in table.to_pylist() if row["status"] == "ok"]
        labels_B = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        new_B = config.relabel(labels_B, dataset.n_classes, compute.generator("attack", "labels", shard))
        for row, new in zip(rows, new_B.tolist(), strict=True):
            if new != row["label"]:
                value = compute.seed_for("attack", "choice", shard, row["position"])
                candidates.append((value, shard, row["position"], new))
    if wanted > len(candidates):
        raise ConfigError(f"rate {config.rate} asks for {wanted} samples, but only {len(candidates)} are eligible")
    chosen: dict[str, dict[int, int]] = {shard: {} for shard in dataset.shards}
    for _, shard, position, new in heapq.nsmallest(wanted, candidates):
        chosen[shard][position] = new
    return chosen


def _copy(
    sample: Sample, row: dict[str, Any], new_label: int | None, config: AttackConfig, dataset: Dataset, tar: TarWriter
) -> dict[str, Any]:
    image_name, data = find_image(sample)
    image_CHW = decode(data, ImageConfig.model_validate(dataset.info["image"]))
    if new_label is not None:
        image_CHW = config.apply(image_CHW[None])[0]
    label_suffix, _, field = dataset.info["label"].partition(":")
    for name, payload in sample.members:
        stem, suffix = split_name(name)
        if name == image_name:
            tar.add(f"{stem}.png", encode_png(image_CHW))
        elif suffix == label_suffix and new_label is not None:
            tar.add(name, _relabelled(payload, field, new_label))
        else:
            tar.add(name, payload)
    return {
        "position": sample.position,
        "key": row["key"],
        "original_label": row["label"],
        "label": row["label"] if new_label is None else new_label,
        "poisoned": new_label is not None,
    }


def _relabelled(payload: bytes, field: str, label: int) -> bytes:
    if not field:
        return str(label).encode()
    return json.dumps(json.loads(payload) | {field: label}).encode()
