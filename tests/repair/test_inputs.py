"""The frame of all repairs: clean images are split without overlap, and what is missing is asked for."""

import pytest
import torch

from sanitize.errors import ConfigError
from sanitize.models.config import ModelConfig
from sanitize.repair import RepairInputs, split_clean


def test_clean_images_are_split_without_overlap_and_by_the_seed_alone() -> None:
    images_NCHW = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 1, 2, 2)
    clean, again = (
        split_clean(images_NCHW, torch.arange(20), 0.25, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert (len(clean.labels_N), len(clean.held_out_labels_M)) == (15, 5)
    assert sorted(clean.labels_N.tolist() + clean.held_out_labels_M.tolist()) == list(range(20))
    assert torch.equal(clean.images_NCHW[:, 0, 0, 0].long(), clean.labels_N)
    assert torch.equal(clean.held_out_labels_M, again.held_out_labels_M)


def test_what_is_missing_is_asked_for() -> None:
    inputs = RepairInputs(ModelConfig(n_classes=2, image_shape=(1, 8, 8)))
    with pytest.raises(ConfigError, match="trained on"):
        inputs.untrusted_batches()
    with pytest.raises(ConfigError, match="clean images"):
        inputs.clean_images()
