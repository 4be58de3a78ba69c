"""A few samples of a data set: always the same ones, whatever other shards there are."""

from pathlib import Path

import torch

from sanitize.compute import Compute
from sanitize.data.chosen import choose_samples, chosen_images
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards

CPU = Compute(device="cpu")


def test_the_smallest_hashes_are_taken_from_all_shards_together(digits: Digits, tmp_path: Path) -> None:
    config = IndexConfig.model_validate({"n_classes": 10, "image": {"size": [8, 8], "channels": 1}})
    dataset = index_shards(config, digits.shards()[:3], str(tmp_path / "3"), CPU)
    fewer = index_shards(config, digits.shards()[:2], str(tmp_path / "2"), CPU)
    chosen, of_fewer = choose_samples(dataset, 60, CPU), choose_samples(fewer, 60, CPU)
    assert sum(map(len, chosen.values())) == sum(map(len, of_fewer.values())) == 60
    assert len(chosen) == 3
    for shard, positions in chosen.items():  # other shards only push out
        assert positions <= of_fewer.get(shard, positions)
    everything = choose_samples(dataset, None, CPU)
    assert sum(map(len, everything.values())) == dataset.n_samples
    assert choose_samples(dataset, 60, Compute(device="cpu", seed=1)) != chosen


def test_images_are_those_of_the_positions(digits: Digits, tmp_path: Path) -> None:
    config = IndexConfig.model_validate({"n_classes": 10, "image": {"size": [8, 8], "channels": 1}})
    dataset = index_shards(config, digits.shards()[:2], str(tmp_path / "index"), CPU)
    chosen = chosen_images(dataset, 25, CPU)
    for shard in dataset.shards:
        for batch in dataset.batches(16, [shard]):
            for image_CHW, label, key, at in zip(
                batch.images_BCHW, batch.labels_B, batch.keys, batch.positions_B.tolist(), strict=True
            ):
                if (shard, at) in zip(chosen.shards, chosen.positions, strict=True):
                    i = list(zip(chosen.shards, chosen.positions, strict=True)).index((shard, at))
                    assert (chosen.keys[i], chosen.labels_N[i]) == (key, label)
                    assert torch.equal(chosen.images_NCHW[i], image_CHW)
    assert len(chosen.keys) == 25
