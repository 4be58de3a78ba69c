"""Shuffled batches: every sample once, in an order that the number of the epoch decides, in bounded memory."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.shuffle import Order, Resident, Streamed, shuffled

IMAGE_BYTES = 3 * 8 * 8


def seeded(seed: int) -> Order:
    return lambda epoch: torch.Generator().manual_seed(1000 * seed + epoch)


def shuffler(dataset: Dataset, batch_size: int, capacity: int, seed: int = 0) -> Resident | Streamed:
    return shuffled(dataset, batch_size, capacity * IMAGE_BYTES, seeded(seed))


def names_of(dataset: Dataset) -> dict[bytes, int]:
    """Images by content: the digits hold no two that are equal, so a picture is a name."""
    images_NCHW, _ = dataset.images()
    return {image.numpy().tobytes(): i for i, image in enumerate(images_NCHW)}


@pytest.mark.parametrize(("capacity", "batch_size"), [(10**6, 32), (10**6, 100), (200, 32), (0, 32), (0, 100)])
def test_an_epoch_gives_every_sample_at_most_once_and_all_but_the_last_batch(
    dataset: Dataset, capacity: int, batch_size: int
) -> None:
    names, (_, labels_N) = names_of(dataset), dataset.images()
    assert len(names) == dataset.n_samples
    data = shuffler(dataset, batch_size, capacity)
    assert isinstance(data, Streamed) == (capacity < dataset.n_samples)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        n_steps = 0
        for images_BCHW, labels_B, rows_B in data.epoch(epoch):
            assert images_BCHW.shape == (batch_size, 3, 8, 8)
            for image, label, row in zip(images_BCHW, labels_B.tolist(), rows_B.tolist(), strict=True):
                i = names[image.numpy().tobytes()]
                assert i == row
                assert label == labels_N[i]
                seen[i] += 1
            n_steps += 1
        assert n_steps == data.steps_per_epoch == dataset.n_samples // batch_size
        assert set(seen.values()) == {1}
        assert len(seen) == n_steps * batch_size


@pytest.mark.parametrize("capacity", [10**6, 200])
def test_the_order_is_new_in_every_epoch_and_depends_on_no_other(dataset: Dataset, capacity: int) -> None:
    def epochs(seed: int) -> list[list[int]]:
        data = shuffler(dataset, 64, capacity, seed)
        return [torch.cat([rows_B for *_, rows_B in data.epoch(number)]).tolist() for number in (0, 1, 0)]

    first = epochs(0)
    assert first == epochs(0)
    assert first[0] != first[1]
    assert first[0] == first[2]
    assert first != epochs(1)


@pytest.mark.parametrize(("capacity", "batch_size"), [(0, 32), (100, 32), (300, 50), (70, 35)])
def test_streaming_holds_no_more_images_than_it_may(
    dataset: Dataset, capacity: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in bytes of storage: a view of one image keeps the whole batch it was cut from."""
    held = []
    real = Streamed._draw

    def draw(self: Streamed, images: list, *more: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        held.append(sum({i.untyped_storage().data_ptr(): i.untyped_storage().nbytes() for i in images}.values()))
        return real(self, images, *more)

    monkeypatch.setattr(Streamed, "_draw", draw)
    data = shuffler(dataset, batch_size, capacity)
    list(data.epoch(0))
    assert len(held) == data.steps_per_epoch
    assert max(held) <= max(capacity, 2 * batch_size) * IMAGE_BYTES


def test_a_streamed_batch_mixes_shards(dataset: Dataset) -> None:
    """With room for half of the data, most batches hold samples of several shards."""
    names, bounds = names_of(dataset), np.cumsum([dataset.rows(shard).num_rows for shard in dataset.shards])
    mixed = []
    for images_BCHW, *_ in shuffler(dataset, 25, 200).epoch(0):
        at = [names[image.numpy().tobytes()] for image in images_BCHW]
        mixed.append(len(set(np.searchsorted(bounds, at, side="right").tolist())))
    assert np.mean(np.array(mixed) >= 2) > 0.7


def test_a_data_set_smaller_than_a_batch_is_one_batch(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> None:
    dataset = index_shards(IndexConfig(), make_tar(tmp_path / "x.tar", good(5)), str(tmp_path / "out"), compute)
    for cache_bytes in (1, 10**6):
        data = shuffled(dataset, 128, cache_bytes, seeded(0))
        assert [len(labels_B) for _, labels_B, _ in data.epoch(0)] == [5]
