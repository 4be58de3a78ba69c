"""Test images with a trigger, to measure the attack success rate on.

They are bit for bit the images of a shard in which `poison_shards` poisoned every sample, in any format: a JPEG file is
decoded once in either case, and the poisoned copy is lossless.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.attack.attack import Attack
from sanitize.attack.several import AttackConfig
from sanitize.attack.stored import as_read, stored_image
from sanitize.data.dataset import Dataset


class TriggeredBatch(NamedTuple):
    """Samples of one shard, in its order, on which the trigger is to work (`Attack.attacked`).

    Attributes:
        shard: name of the shard.
        positions: positions of the samples in the shard.
        wanted_B: labels the attacker wants, int64.
        images_BCHW: images with the trigger, at the size of the data set, uint8.
    """

    shard: str
    positions: list[int]
    wanted_B: Tensor
    images_BCHW: Tensor


def triggered(config: AttackConfig, dataset: Dataset, n_classes: int, size: int = 256) -> Iterator[TriggeredBatch]:
    """Usable samples with the trigger of an attack, or with each of several, one attack after the other.

    Samples that have the attacker's label already, or are of no source class, are left out. One stored image and one
    batch are in memory.

    Args:
        config: the attack.
        dataset: test samples, indexed with the image size and the channels of the model.
        n_classes: number of classes of the model.
        size: largest number of samples in a batch; a batch never spans two shards.

    Raises:
        ConfigError: a target is no class.
        DataError: a shard is not what it was when it was indexed, or an image is damaged.
    """
    config.check_classes(n_classes)
    for trigger in (attack for attack in config.attacks if attack.has_trigger):
        for shard in dataset.shards:
            yield from _batches(trigger, dataset, shard, n_classes, size)


def _batches(trigger: Attack, dataset: Dataset, shard: str, n_classes: int, size: int) -> Iterator[TriggeredBatch]:
    positions: list[int] = []
    wanted: list[int] = []
    images: list[Tensor] = []
    for sample, row in dataset.samples(shard):
        if row["status"] != "ok":
            continue
        label_1 = torch.tensor([row["label"]])
        wanted_1 = trigger.relabel(label_1, n_classes, torch.Generator())
        if not trigger.attacked(label_1, wanted_1):
            continue
        image_CHW = trigger.apply(stored_image(sample, dataset, shard)[None])[0]
        images.append(as_read(image_CHW, dataset.image_shape, dataset.info["image"].get("crop", True)))
        positions.append(sample.position)
        wanted.append(int(wanted_1))
        if len(images) == size:
            yield TriggeredBatch(shard, positions, torch.tensor(wanted), torch.stack(images))
            positions, wanted, images = [], [], []
    if images:
        yield TriggeredBatch(shard, positions, torch.tensor(wanted), torch.stack(images))
