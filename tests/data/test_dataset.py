import gc
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ConfigError, DataError


def by_hand(digits: Digits, read_tar: Callable[..., list]) -> list[tuple[str, str, int, np.ndarray]]:
    """(shard, key, label, pixels (H, W, 3)) of every sample, by tarfile and Pillow alone."""
    samples = []
    for path in digits.shards()[:4]:
        members = dict(read_tar(path))
        for name, data in members.items():
            if name.endswith(".png"):
                pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                key = name.removesuffix(".png")
                samples.append((Path(path).name, key, int(members[f"{key}.cls"]), pixels))
    return samples


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_batches_are_what_one_reads_by_hand(
    dataset: Dataset, digits: Digits, read_tar: Callable[..., list], size: int
) -> None:
    wanted = by_hand(digits, read_tar)
    assert dataset.n_samples == len(wanted)
    seen = 0
    for batch in dataset.batches(size):
        assert 1 <= len(batch.keys) <= size
        assert batch.images_BCHW.dtype == torch.uint8
        for i, key in enumerate(batch.keys):
            shard, wanted_key, label, pixels = wanted[seen]
            assert (batch.shard, key, int(batch.labels_B[i])) == (shard, wanted_key, label)
            np.testing.assert_array_equal(batch.images_BCHW[i].permute(1, 2, 0).numpy(), pixels)
            seen += 1
        positions = batch.positions_B.tolist()
        assert positions == list(range(positions[0], positions[0] + len(positions)))
    assert seen == len(wanted)


def decoding() -> int:
    return sum(thread.name.startswith("sanitize-decode") for thread in threading.enumerate())


def test_no_thread_is_left_when_the_reader_stops_early(dataset: Dataset) -> None:
    batches = dataset.batches(16)
    next(batches)
    assert decoding() > 0
    batches.close()
    assert decoding() == 0
    for _ in dataset.batches(16):
        break
    gc.collect()
    assert decoding() == 0


@pytest.mark.parametrize(("ahead", "chunk"), [(1, 1), (1, 1 << 20), (5000, 700), (1 << 20, 1)])
def test_batches_do_not_depend_on_how_much_is_under_way(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, ahead: int, chunk: int
) -> None:
    wanted = list(dataset.batches(50))
    monkeypatch.setattr("sanitize.data.dataset._BYTES_AHEAD", ahead)
    monkeypatch.setattr("sanitize.data.dataset._CHUNK_BYTES", chunk)
    for ours, theirs in zip(dataset.batches(50), wanted, strict=True):
        assert (ours.shard, ours.keys) == (theirs.shard, theirs.keys)
        assert torch.equal(ours.images_BCHW, theirs.images_BCHW)


@pytest.mark.parametrize("check", ["digest", "headers"])
def test_what_comes_before_a_damaged_image_that_the_index_did_not_decode(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute, check: Any
) -> None:
    members = [*good(6), ("bad.png", b"no image"), ("bad.cls", b"0"), *good(3, "z")]
    config = IndexConfig(check=check, image=ImageConfig(size=(8, 8)))
    dataset = index_shards(config, make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    batches = dataset.batches(2)
    assert [next(batches).positions_B.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(DataError, match=rf"bad of shard .*x\.tar cannot be used: not a jpeg.*index\.check={check}"):
        next(batches)


def test_without_decoding_the_size_must_be_said(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> None:
    dataset = index_shards(
        IndexConfig(check="headers"), make_tar(tmp_path / "x.tar", good(3)), str(tmp_path / "out"), compute
    )
    with pytest.raises(ConfigError, match=r"set index\.image\.size: with index\.check=headers"):
        next(dataset.batches(2))


def test_some_shards_in_any_order(dataset: Dataset) -> None:
    chosen = dataset.shards[2:0:-1]
    assert list(dict.fromkeys(batch.shard for batch in dataset.batches(100, chosen))) == chosen


def test_only_some_positions(dataset: Dataset) -> None:
    shard = dataset.shards[1]
    (whole,) = dataset.batches(1000, [shard])
    positions = [0, 3, 4, 70, len(whole.keys) - 1]
    batches = list(dataset.batches(2, [shard], {shard: set(positions) | {10**6}}))
    assert [len(batch.keys) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.positions_B for batch in batches]).tolist() == positions
    assert [key for batch in batches for key in batch.keys] == [whole.keys[i] for i in positions]
    assert torch.equal(torch.cat([batch.images_BCHW for batch in batches]), whole.images_BCHW[positions])
    assert list(dataset.batches(2, [shard], {shard: []})) == []


def test_all_images_at_once_are_the_batches_in_a_row(dataset: Dataset) -> None:
    images_NCHW, labels_N = dataset.images()
    batches = list(dataset.batches(64))
    assert torch.equal(images_NCHW, torch.cat([batch.images_BCHW for batch in batches]))
    assert torch.equal(labels_N, torch.cat([batch.labels_B for batch in batches]))


def test_unusable_samples_are_left_out_of_batches_and_not_of_samples(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> None:
    members = [("a.cls", b"0"), *good(3), ("m.cls", b"0"), *good(2, "other"), ("z.cls", b"0")]
    config = IndexConfig(max_bad_fraction=0.5)
    dataset = index_shards(config, make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute)
    batches = list(dataset.batches(2))
    assert [batch.positions_B.tolist() for batch in batches] == [[1, 2], [3, 5], [6]]
    samples = list(dataset.samples("x.tar"))
    assert [sample.key for sample, _ in samples] == [row["key"] for _, row in samples]
    assert len(samples) == 8


def test_a_shard_that_was_swapped_for_one_of_the_same_layout_is_noticed(
    tmp_path: Path,
    make_tar: Callable[..., str],
    make_png: Callable[..., bytes],
    good: Callable[..., list],
    compute: Compute,
) -> None:
    members = good(4)
    path = make_tar(tmp_path / "x.tar", members)
    dataset = index_shards(IndexConfig(), path, str(tmp_path / "out"), compute)
    members[1] = (members[1][0], b"1")  # the label 0 becomes 1: no size changes
    make_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"x\.tar has changed since it was indexed"):
        list(dataset.batches(2))
