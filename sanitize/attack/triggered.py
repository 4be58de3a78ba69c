"""Test images with a trigger: what every stage measures the attack success rate on.

They are bit for bit the images of a shard in which `poison_shards` poisoned every sample, whatever the format was
before: a JPEG file is decoded once in either case, and what is stored then is lossless.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.attack.labels import LabelNoiseConfig
from sanitize.attack.several import AttackConfig, OneAttack, attacks_of
from sanitize.attack.stored import as_read, stored_image
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError


class TriggeredBatch(NamedTuple):
    """Samples of one shard, in its order, whose label is not the one that the attacker wants.

    Attributes:
        shard: name of the shard.
        positions: their positions in it.
        wanted_B: labels that the attacker wants, int64.
        images_BCHW: images with the trigger, at the size of the data set, uint8.
    """

    shard: str
    positions: list[int]
    wanted_B: Tensor
    images_BCHW: Tensor


def triggers_of(config: AttackConfig) -> list[OneAttack]:
    """The attacks of a config that have a trigger; label noise has none."""
    return [attack for attack in attacks_of(config) if not isinstance(attack, LabelNoiseConfig)]


def refuse_targets(attacks: Sequence[OneAttack], n_classes: int) -> None:
    """Raise ConfigError where the target of an attack is no class."""
    for target in (getattr(attack, "target", 0) for attack in attacks):
        if isinstance(target, int) and not 0 <= target < n_classes:
            raise ConfigError(f"target {target} is no class: there are {n_classes}, from 0 to {n_classes - 1}")


def triggered(config: AttackConfig, dataset: Dataset, n_classes: int, size: int = 256) -> Iterator[TriggeredBatch]:
    """Usable samples with the trigger of an attack, or with each of several, one attack after the other.

    Samples whose label is the wanted one already are left out: the attacker's label is right for them. One stored image
    and one batch are held.

    Args:
        config: the attack.
        dataset: test samples, indexed with the image size and the channels of the model.
        n_classes: K of the model.
        size: most samples in a batch; a batch never spans two shards.

    Raises:
        ConfigError: a target is no class.
        DataError: a shard is not what it was when it was indexed, or an image is damaged.
    """
    refuse_targets(attacks_of(config), n_classes)
    for trigger in triggers_of(config):
        for shard in dataset.shards:
            yield from _batches(trigger, dataset, shard, n_classes, size)


def _batches(trigger: OneAttack, dataset: Dataset, shard: str, n_classes: int, size: int) -> Iterator[TriggeredBatch]:
    positions: list[int] = []
    wanted: list[int] = []
    images: list[Tensor] = []
    for sample, row in dataset.samples(shard):
        if row["status"] != "ok":
            continue
        label = int(trigger.relabel(torch.tensor([row["label"]]), n_classes, torch.Generator()))
        if label == row["label"]:
            continue
        image_CHW = trigger.apply(stored_image(sample, dataset, shard)[None])[0]
        images.append(as_read(image_CHW, dataset.image_shape))
        positions.append(sample.position)
        wanted.append(label)
        if len(images) == size:
            yield TriggeredBatch(shard, positions, torch.tensor(wanted), torch.stack(images))
            positions, wanted, images = [], [], []
    if images:
        yield TriggeredBatch(shard, positions, torch.tensor(wanted), torch.stack(images))
