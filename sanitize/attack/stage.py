"""Write poisoned copies of shards. Every image is re-encoded as PNG, poisoned or not, so that the file format does not
give the poison away; the ground truth lies beside the shards, never inside."""

import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from sanitize.artifacts import ArtifactBuilder, Part
from sanitize.attack.clean_label import CleanLabelConfig
from sanitize.attack.several import AttackConfig, OneAttack, attacks_of
from sanitize.attack.stored import OnStored, stored_image
from sanitize.attack.triggered import refuse_targets
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.samples import Sample, find_image
from sanitize.data.tables import ShardTables, write_rows
from sanitize.data.writer import shard_writer
from sanitize.errors import ConfigError
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.pixels import OnPixels
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.compression import unread_suffix
from sanitize.tar.names import split_name
from sanitize.tar.write import TarWriter

Poison = Callable[[Tensor, Tensor], Tensor]  # uint8 images (B, C, H, W), their true labels (B,) -> uint8 images


class Choice(NamedTuple):
    """What is done to a sample: the label it gets, and the number of the attack in the list (0 where there is one)."""

    label: int
    attack: int


class Poisoned(ShardTables):
    """`shards/SHARD` and, as rows, the truth: position, key, original_label, label, poisoned, attack (-1: none)."""

    def shard_paths(self) -> list[str]:
        """Paths of the poisoned shards, sorted."""
        return [self.url(name) for name in sorted(self.manifest().files) if name.startswith("shards/")]


@stage(Poisoned, version=3, gpu=False)
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
        dataset: what is poisoned; unreadable samples are left out.
        out: folder of the artifact.
        compute: seed of the choice of samples and of random labels; device of the surrogate.
        shards: names of the shards to do now; None does all that are missing and finishes.
        surrogate: a network trained on such images, for clean-label attacks alone.
        exclude: names of shards in which nothing is poisoned; their samples count for the rate.

    Raises:
        ConfigError: an attack asks for more samples than are eligible, its target is no class, or a surrogate is
            missing, takes other images or is of no use.
    """
    attacks = attacks_of(config)
    refuse_targets(attacks, dataset.n_classes)
    model = _surrogate(attacks, surrogate, dataset)
    poisons = [_poison(attack, model, compute) for attack in attacks]
    chosen: dict[str, dict[int, Choice]] = {}

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        if unread_suffix(shard):
            return  # nothing was read, and a file of ours must be what its name says
        if not chosen:
            chosen.update(choose(config, dataset, compute, exclude))
        rows = []
        with shard_writer(part, f"shards/{shard}") as tar:
            for sample, row in dataset.samples(shard):
                if row["status"] == "ok":
                    image_CHW = stored_image(sample, dataset, shard)
                    choice = chosen[shard].get(sample.position)
                    rows.append(_copy(sample, image_CHW, row, choice, poisons, dataset.info["label"], tar))
                    advance(1)
        if rows:
            write_rows(part, shard, pa.Table.from_pylist(rows))
        part.counts.update(samples=len(rows), poisoned=sum(row["poisoned"] for row in rows))

    def finish(part: Part, _builder: ArtifactBuilder) -> None:
        part.write_json("attack.json", config.model_dump(mode="json"))

    settings = config.model_dump(mode="json") | ({"exclude": sorted(exclude)} if exclude else {})
    bar = Bars("poison", dataset.n_samples)
    return Work(parts=dataset.shards, write_part=write_part, finish=finish, bar=bar, config=settings)


def choose(
    config: AttackConfig, dataset: Dataset, compute: Compute, exclude: Sequence[str] = ()
) -> dict[str, dict[int, Choice]]:
    """Which samples are poisoned, how, and the labels they get: {shard: {position: choice}}.

    Of each attack round(rate * n) samples with the smallest keyed hash among those that are eligible and not taken, so
    that the choice does not depend on the order of anything but the attacks.
    """
    chosen: dict[str, dict[int, Choice]] = {shard: {} for shard in dataset.shards}
    for number, attack in enumerate(attacks_of(config)):
        wanted = round(attack.rate * dataset.n_samples)
        candidates = [
            (compute.seed_for("attack", "choice", shard, position), shard, position, new)
            for shard, position, new in _eligible(attack, dataset, compute)
            if position not in chosen[shard] and shard not in exclude
        ]
        if wanted > len(candidates):
            raise ConfigError(
                f"{attack.kind}: rate {attack.rate} asks for {wanted} samples, but only {len(candidates)} are eligible"
            )
        for _, shard, position, new in heapq.nsmallest(wanted, candidates):
            chosen[shard][position] = Choice(new, number)
    return chosen


def _eligible(attack: OneAttack, dataset: Dataset, compute: Compute) -> Iterator[tuple[str, int, int]]:
    """Shard, position and new label of every sample whose label changes; for clean labels, of those where it stays."""
    for shard in dataset.shards:
        table = dataset.rows(shard, ["position", "label", "status"])
        rows = [row for row in table.to_pylist() if row["status"] == "ok"]
        labels_B = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        new_B = attack.relabel(labels_B, dataset.n_classes, compute.generator("attack", "labels", shard))
        for row, new in zip(rows, new_B.tolist(), strict=True):
            if (new == row["label"]) == isinstance(attack, CleanLabelConfig):
                yield shard, row["position"], new


def _surrogate(attacks: Sequence[OneAttack], checkpoint: Checkpoint | None, dataset: Dataset) -> OnStored | None:
    needed = any(isinstance(attack, CleanLabelConfig) for attack in attacks)
    if checkpoint is None:
        if needed:
            raise ConfigError("clean_label needs a surrogate: a network trained on such images")
        return None
    if not needed:
        raise ConfigError("only clean_label has use for a surrogate")
    if checkpoint.config.image_shape != dataset.image_shape:
        raise ConfigError(f"the surrogate takes images {checkpoint.config.image_shape}, not {dataset.image_shape}")
    return OnStored(OnPixels(checkpoint.model(), checkpoint.config), dataset.image_shape)


def _poison(attack: OneAttack, surrogate: OnStored | None, compute: Compute) -> Poison:
    """How an attack changes training images: by its trigger, and clean labels by more."""
    if isinstance(attack, CleanLabelConfig) and surrogate is not None:
        return partial(attack.poison, surrogate=surrogate, compute=compute)
    return lambda images_BCHW, _labels_B: attack.apply(images_BCHW)


def _copy(
    sample: Sample,
    image_CHW: Tensor,
    row: dict[str, Any],
    choice: Choice | None,
    poisons: Sequence[Poison],
    label: str,
    tar: TarWriter,
) -> dict[str, Any]:
    """Write a sample, poisoned where it was chosen; its row of the truth. `label` is `IndexConfig.label`."""
    if choice is not None:
        image_CHW = poisons[choice.attack](image_CHW[None], torch.tensor([row["label"]]))[0]
    image_name, (label_suffix, _, field) = find_image(sample)[0], label.partition(":")
    for name, payload in sample.members:
        stem, suffix = split_name(name)
        if name == image_name:
            tar.add(f"{stem}.png", encode_png(image_CHW))
        elif suffix == label_suffix.lower() and choice is not None:
            tar.add(name, _relabelled(payload, field, choice.label))
        else:
            tar.add(name, payload)
    return {
        "position": sample.position,
        "key": row["key"],
        "original_label": row["label"],
        "label": row["label"] if choice is None else choice.label,
        "poisoned": choice is not None,
        "attack": -1 if choice is None else choice.attack,
    }


def _relabelled(payload: bytes, field: str, label: int) -> bytes:
    if not field:
        return str(label).encode()
    return json.dumps(json.loads(payload) | {field: label}).encode()
