"""Write poisoned copies of shards. Every image is re-encoded as PNG, poisoned or not, so that the file format does not
give the poison away; the ground truth lies beside the shards, never inside."""

import heapq
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sanitize.artifacts import ArtifactBuilder, Part
from sanitize.attack.attack import Attack
from sanitize.attack.several import AttackConfig
from sanitize.attack.stored import OnStored, stored_image
from sanitize.compute import Compute
from sanitize.data.class_names import CLASSES_FILE
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.samples import Sample, find_image, in_format
from sanitize.data.tables import ShardTables, write_rows
from sanitize.data.writer import shard_writer, write_class_names
from sanitize.errors import ConfigError
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.pixels import OnPixels
from sanitize.plural import are, counted
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.compression import unread_suffix
from sanitize.tar.names import split_name
from sanitize.tar.write import TarWriter


class Choice(NamedTuple):
    """The label a poisoned or cover sample gets, and the number of its attack in the list.

    Attributes:
        cover: True for a cover sample, which has the trigger and its true label.
    """

    label: int
    attack: int
    cover: bool = False


class Poisoned(ShardTables):
    """`shards/SHARD` and, as rows, the truth: position, key, original_label, label, poisoned, attack (-1: none).

    Beside the shards lies `classes.json`, if the classes of the data set have names. Attacks with cover samples add the
    column `cover`; a cover sample is not `poisoned`.
    """

    def is_cover(self, shard: str) -> np.ndarray:
        """True for cover samples, (N,) bool, in the order of the rows."""
        truth = self.rows(shard, ["poisoned", "attack"])
        return (truth["attack"].to_numpy() >= 0) & ~truth["poisoned"].to_numpy()

    def shard_paths(self) -> list[str]:
        """Paths of the poisoned shards, sorted."""
        names = sorted(name for name in self.manifest().files if name.startswith("shards/"))
        return [self.url(name) for name in names if not name.endswith(f"/{CLASSES_FILE}")]


@stage(Poisoned, version=4, gpu=False)
def poison_shards(
    config: AttackConfig,
    dataset: Dataset,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
    surrogate: Checkpoint | None = None,
    exclude: Sequence[str] = (),
) -> Work:
    """Write a poisoned copy of a data set, with the truth.

    Args:
        config: the attack, or several.
        dataset: data set to poison; unreadable samples are left out.
        out: folder of the artifact.
        compute: seed of the choice of samples and of random labels; device of the surrogate.
        shards: names of the shards to write now; None writes all missing ones and finishes.
        surrogate: a network trained on such images, for attacks that need one.
        exclude: names of shards without poison; their samples count for the rate.

    Raises:
        ConfigError: the data set has no labels, an attack asks for more samples than are eligible, its target is no
            class, or a surrogate is missing, takes other images or is of no use.
    """
    if dataset.info["label"] is None:
        raise ConfigError("index.label=null reads no labels, and an attack needs them: index the shards with labels")
    if dataset.info["label"].startswith("table:"):
        raise ConfigError("an attack writes new labels into the shards, and index.label=table:... is beside them")
    config.check_classes(dataset.n_classes)
    network = _surrogate(config, surrogate, dataset)
    poisons = [attack.build(network if attack.needs_surrogate else None, compute) for attack in config.attacks]
    has_covers = any(round(attack.cover_share * dataset.n_samples) for attack in config.attacks)
    chosen: dict[str, dict[int, Choice]] = {}

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        if unread_suffix(shard):
            return  # it was not read, and a file that we write must match its suffix
        if not chosen:
            chosen.update(choose(config, dataset, compute, exclude))
        rows = []
        with shard_writer(part, f"shards/{shard}") as tar:
            for sample, row in dataset.samples(shard):
                if row["status"] == "ok":
                    image_CHW = stored_image(sample, dataset, shard)
                    choice = chosen[shard].get(sample.position)
                    if choice is not None:
                        seed = compute.seed_for("attack", "image", shard, sample.position)
                        label_1 = torch.tensor([row["label"]])
                        image_CHW = poisons[choice.attack](image_CHW[None], label_1, [seed])[0]
                    truth = _copy(sample, image_CHW, row, choice, dataset, tar)
                    rows.append(truth | ({"cover": choice is not None and choice.cover} if has_covers else {}))
                    advance(1)
        if rows:
            write_rows(part, shard, pa.Table.from_pylist(rows))
        counted = ("poisoned", "cover") if has_covers else ("poisoned",)
        part.counts.update(samples=len(rows), **{name: sum(row[name] for row in rows) for name in counted})

    def finish(part: Part, _builder: ArtifactBuilder) -> None:
        part.write_json("attack.json", config.model_dump(mode="json"))
        write_class_names(part, (f"shards/{shard}" for shard in dataset.shards), dataset.class_names)

    settings = config.model_dump(mode="json") | ({"exclude": sorted(exclude)} if exclude else {})
    bar = Bars("poison", dataset.n_samples)
    return Work(parts=dataset.shards, write_part=write_part, finish=finish, bar=bar, config=settings)


def choose(
    config: AttackConfig, dataset: Dataset, compute: Compute, exclude: Sequence[str] = ()
) -> dict[str, dict[int, Choice]]:
    """The samples to poison, and cover samples: {shard: {position: choice}}.

    Each attack takes the round(rate * n) samples with the smallest keyed hash among those that are eligible and not
    taken yet, then its cover samples in the same way. So the choice depends on no order but that of the attacks.
    """
    chosen: dict[str, dict[int, Choice]] = {shard: {} for shard in dataset.shards}
    for number, attack in enumerate(config.attacks):
        for cover, rate in ((False, attack.rate), (True, attack.cover_share)):
            wanted = round(rate * dataset.n_samples)
            candidates = [
                (compute.seed_for("attack", "choice", shard, position), shard, position, new)
                for shard, position, new in _eligible(attack, cover, dataset, compute)
                if position not in chosen[shard] and shard not in exclude
            ]
            if wanted > len(candidates):
                setting = "cover_rate" if cover else "rate"
                raise ConfigError(
                    f"{attack.kind}: {setting} {rate} asks for {counted(wanted, 'sample')}, but only "
                    f"{len(candidates):,} {are(len(candidates))} eligible"
                )
            for _, shard, position, new in heapq.nsmallest(wanted, candidates):
                chosen[shard][position] = Choice(new, number, cover)
    return chosen


def _eligible(attack: Attack, cover: bool, dataset: Dataset, compute: Compute) -> Iterator[tuple[str, int, int]]:
    """Shard, position and new label of every sample that can be poisoned, or be a cover sample."""
    if cover and not attack.cover_share:
        return
    for shard in dataset.shards:
        table = dataset.rows(shard, ["position", "label", "status"])
        rows = [row for row in table.to_pylist() if row["status"] == "ok"]
        labels_B = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        new_B = attack.relabel(labels_B, dataset.n_classes, compute.generator("attack", "labels", shard))
        eligible_B = (attack.coverable if cover else attack.eligible)(labels_B, new_B)
        for i in eligible_B.nonzero()[:, 0].tolist():
            yield shard, rows[i]["position"], int(labels_B[i] if cover else new_B[i])


def _surrogate(config: AttackConfig, checkpoint: Checkpoint | None, dataset: Dataset) -> OnStored | None:
    if checkpoint is None:
        return None
    if not config.needs_surrogate:
        raise ConfigError(f"attack {config.kind} uses no surrogate: leave it out")
    if checkpoint.config.image_shape != dataset.image_shape:
        raise ConfigError(f"the surrogate takes images {checkpoint.config.image_shape}, not {dataset.image_shape}")
    crop = dataset.info["image"].get("crop", True)
    return OnStored(OnPixels(checkpoint.model(), checkpoint.config), dataset.image_shape, crop)


def _copy(
    sample: Sample,
    image_CHW: Tensor,
    row: dict[str, Any],
    choice: Choice | None,
    dataset: Dataset,
    tar: TarWriter,
) -> dict[str, Any]:
    """Write a sample with its new image, and the label of `choice`. Returns its row of the truth."""
    image_name = find_image(sample, dataset.image_member)[0]
    label_suffix, _, field = dataset.info["label"].partition(":")
    for name, payload in sample.members:
        suffix = split_name(name)[1]
        if name == image_name:
            tar.add(in_format(name, "png"), encode_png(image_CHW))
        elif suffix == label_suffix.lower() and choice is not None and not choice.cover:
            tar.add(name, _relabelled(payload, field, _written(choice.label, dataset)))
        else:
            tar.add(name, payload)
    return {
        "position": sample.position,
        "key": row["key"],
        "original_label": row["label"],
        "label": row["label"] if choice is None else choice.label,
        "poisoned": choice is not None and not choice.cover,
        "attack": -1 if choice is None else choice.attack,
    }


def _written(label: int, dataset: Dataset) -> int | str:
    """The label as shards have it: an integer, or the name of the class."""
    return label if dataset.classes is None else dataset.classes[label]


def _relabelled(payload: bytes, field: str, label: int | str) -> bytes:
    if not field:
        return str(label).encode()
    record = json.loads(payload)
    *path, last = [field] if field in record else field.split(".")
    inner = record
    for name in path:
        inner = inner[name]
    inner[last] = label
    return json.dumps(record).encode()
