"""The protocol of all repairs and their inputs."""

import inspect
from functools import partial
from typing import get_args

import pytest
import torch

from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.models.config import ModelConfig
from sanitize.repairs import BaseRepairConfig, CleanImages, Repair, RepairConfig, RepairInputs, split_clean
from sanitize.repairs.inputs import Needs

CONFIGS: tuple[type[BaseRepairConfig], ...] = get_args(get_args(RepairConfig)[0])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config().kind)
def test_every_repair_has_the_protocol(config: type[BaseRepairConfig]) -> None:
    assert config.needs in get_args(Needs)
    built = config().build()
    _, *wanted = inspect.signature(Repair.__call__).parameters.values()  # without self
    assert [*inspect.signature(built).parameters.values()] == wanted
    assert isinstance(built, partial)
    assert built.func.__module__ == config.__module__  # a method is one file
    assert built.func.__doc__


def test_clean_batches_are_shuffled_epochs_of_the_images_to_learn_from(compute: Compute) -> None:
    images_NCHW, labels_N = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)
    clean = CleanImages(images_NCHW[:8], labels_N[:8], images_NCHW[8:], labels_N[8:])
    inputs = RepairInputs(ModelConfig(n_classes=10, image_shape=(1, 1, 1)), clean=clean)
    batches = list(inputs.clean_batches(5, 4, compute, "test"))
    assert len(batches) == 5
    assert all(torch.equal(x_BCHW.flatten().long(), y_B) for x_BCHW, y_B in batches)
    first, second = (torch.cat([y_B for _, y_B in batches[i : i + 2]]).tolist() for i in (0, 2))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    again = inputs.clean_batches(5, 4, compute, "test")
    assert all(torch.equal(y_B, other_B) for (_, y_B), (_, other_B) in zip(batches, again, strict=True))


def test_clean_images_are_split_without_overlap_and_by_the_seed_alone() -> None:
    images_NCHW = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 1, 2, 2)
    clean, again = (
        split_clean(images_NCHW, torch.arange(20), 0.25, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert (len(clean.labels_N), len(clean.held_out_labels_M)) == (15, 5)
    assert sorted(clean.labels_N.tolist() + clean.held_out_labels_M.tolist()) == list(range(20))
    assert torch.equal(clean.images_NCHW[:, 0, 0, 0].long(), clean.labels_N)
    assert torch.equal(clean.held_out_labels_M, again.held_out_labels_M)


def test_missing_data_is_a_config_error() -> None:
    inputs = RepairInputs(ModelConfig(n_classes=2, image_shape=(1, 8, 8)))
    with pytest.raises(ConfigError, match="trained on"):
        inputs.untrusted_batches()
    with pytest.raises(ConfigError, match="clean images"):
        inputs.clean_images()
