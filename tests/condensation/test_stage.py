"""The stage: what it writes can be read by others, and a run that is killed goes on to the same digest."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import webdataset

import sanitize
from sanitize.artifacts import verify
from sanitize.compute import Compute
from sanitize.condensation import CondenseConfig, CondensedSet, EvaluateConfig, MatchingConfig, condense_dataset
from sanitize.condensation.pool import Pool, fill_pool
from sanitize.condensation.stage import SHARD
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ConfigError, DataError
from sanitize.loop import OptimConfig
from sanitize.models.instance_convnet import InstanceConvNetConfig
from sanitize.siamese import SiameseConfig
from tests.killed import kill_after_snapshot

DIGITS = SiameseConfig(flip=False)
SMALL = CondenseConfig(
    matching=MatchingConfig(
        images_per_class=2,
        iterations=60,
        learning_rate=5,
        batch_size=32,
        architecture=InstanceConvNetConfig(widths=(16, 16)),
        augment=DIGITS,
    ),
    evaluate=EvaluateConfig(
        optim=OptimConfig(optimizer="sgd", learning_rate=0.02, schedule="cosine", epochs=100),
        augment=DIGITS,
        n_networks=2,
    ),
    snapshot_every=20,
)


@pytest.fixture(scope="module")
def condensed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> CondensedSet:
    out = tmp_path_factory.mktemp("condensed") / "condensed"
    return condense_dataset(SMALL, dataset, str(out), compute, test=dataset)


def test_twenty_images_teach_digits(condensed: CondensedSet) -> None:
    assert verify(condensed.path) == []
    info = condensed.info
    assert info["labels"] == {str(label): 2 for label in range(10)}
    assert info["image"] == {"shape": [3, 8, 8], "mean": [0.5], "std": [0.25]}
    assert info["matching"]["aggregate"]["kind"] == "calibrated"
    assert len(info["utility"]["test_accuracy"]) == 2
    assert min(info["utility"]["test_accuracy"]) > 0.5  # guessing: 0.1
    losses = [row["loss"] for row in condensed.read_json("history.json")]
    assert losses[-1] < 0.5 * losses[0]


def test_others_read_the_same_pixels(condensed: CondensedSet) -> None:
    images_NCHW, labels_N = sanitize.load_condensed(condensed.path)
    assert images_NCHW.shape == (20, 3, 8, 8)
    assert images_NCHW.dtype == torch.float32
    assert labels_N.tolist() == [label for label in range(10) for _ in range(2)]
    samples = list(webdataset.WebDataset(condensed.url(SHARD), shardshuffle=False))
    assert len(samples) == 20
    for sample, image_CHW, label in zip(samples, images_NCHW, labels_N, strict=True):
        assert int(sample["cls"]) == label
        exact_CHW = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        np.testing.assert_array_equal(exact_CHW, image_CHW.numpy())
        png_CHW = torchvision.io.decode_png(torch.frombuffer(bytearray(sample["png"]), dtype=torch.uint8))
        assert png_CHW.dtype == torch.uint8
        wanted_CHW = ((image_CHW * 0.25 + 0.5) * 255).clamp(0, 255)
        assert float((png_CHW.float() - wanted_CHW).abs().max()) <= 0.501


def test_hugging_face_reads_the_same_pixels(
    condensed: CondensedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "webdataset", data_files={"train": condensed.url(SHARD)}, split="train", cache_dir=str(tmp_path)
    )
    images_NCHW, labels_N = sanitize.load_condensed(condensed.path)
    assert [row["cls"] for row in rows] == labels_N.tolist()
    for row, image_CHW in zip(rows, images_NCHW, strict=True):
        np.testing.assert_array_equal(np.asarray(row["npy"], np.float32), image_CHW.numpy())
        assert row["png"].size == (8, 8)


def test_the_grid_has_a_class_a_row(condensed: CondensedSet) -> None:
    grid_CHW = torchvision.io.decode_png(torch.frombuffer(bytearray(condensed.read("grid.png")), dtype=torch.uint8))
    assert grid_CHW.shape == (3, 100, 20)
    first_CHW = torchvision.io.decode_png(
        torch.frombuffer(
            bytearray(next(iter(webdataset.WebDataset(condensed.url(SHARD), shardshuffle=False)))["png"]),
            dtype=torch.uint8,
        )
    )
    assert torch.equal(grid_CHW[:, 1:9, 1:9], first_CHW)
    assert list(condensed.frames) == [0, 15, 30, 45, 60]
    assert condensed.frames[60] == condensed.read("grid.png")  # no more than ten classes


CONDENSE = """
from sanitize.condensation import CondenseConfig, condense_dataset
condense_dataset(CondenseConfig.model_validate_json(config), dataset, out, compute, test=dataset)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_digest(
    condensed: CondensedSet, dataset: Dataset, compute: Compute, tmp_path: Path
) -> None:
    out = tmp_path / "condensed"
    kill_after_snapshot(2, CONDENSE, dataset, SMALL, out)
    assert not out.exists()
    found = condense_dataset(SMALL, dataset, str(out), compute, test=dataset)
    assert found.digest == condensed.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["condensed"]


# --- the pool -----------------------------------------------------------------------------------------------------


def by_class(pool: Pool) -> list[torch.Tensor]:
    rows = zip(pool.first_K.tolist(), pool.count_K.tolist(), strict=True)
    return [pool.images_NCHW[first : first + count] for first, count in rows]


def test_a_pool_with_room_holds_every_image_once(dataset: Dataset, compute: Compute) -> None:
    pool = fill_pool(dataset, 2**20, compute)
    images_NCHW, labels_N = dataset.images()
    for label, held_NCHW in enumerate(by_class(pool)):
        wanted = {bytes(image.numpy()) for image in images_NCHW[labels_N == label]}
        assert len(held_NCHW) == len(wanted)
        assert {bytes(image.numpy()) for image in held_NCHW} == wanted


def test_a_pool_keeps_to_its_bytes_and_does_not_depend_on_the_order_of_shards(
    digits: Digits, dataset: Dataset, compute: Compute, tmp_path: Path
) -> None:
    small = fill_pool(dataset, 10 * 7 * 192 + 191, compute)  # seven images a class
    assert small.images_NCHW.nbytes == 10 * 7 * 192
    assert small.count_K.tolist() == [7] * 10
    renamed = []
    for i, shard in enumerate(reversed(digits.shards()[:4])):
        (tmp_path / f"other-{i}.tar").write_bytes(Path(shard).read_bytes())
        renamed.append(str(tmp_path / f"other-{i}.tar"))
    other = index_shards(IndexConfig(), renamed, str(tmp_path / "index"), compute)
    assert torch.equal(fill_pool(other, 10 * 7 * 192, compute).images_NCHW, small.images_NCHW)
    everything = {bytes(image.numpy()) for image in fill_pool(dataset, 2**20, compute).images_NCHW}
    assert {bytes(image.numpy()) for image in small.images_NCHW} < everything
    of_other_seed = fill_pool(dataset, 10 * 7 * 192, compute.model_copy(update={"seed": 1}))
    assert not torch.equal(of_other_seed.images_NCHW, small.images_NCHW)


def test_draws_stay_in_their_class_and_reach_all_of_it(dataset: Dataset, compute: Compute) -> None:
    pool = fill_pool(dataset, 2**20, compute)
    rows_Kn = pool.draw(2000, torch.Generator().manual_seed(0))
    for rows_n, first, count in zip(rows_Kn, pool.first_K.tolist(), pool.count_K.tolist(), strict=True):
        assert set(rows_n.tolist()) == set(range(first, first + count))


def test_a_pool_that_cannot_hold_an_image_of_each_class_is_an_error(dataset: Dataset, compute: Compute) -> None:
    with pytest.raises(ConfigError, match="pool_bytes"):
        fill_pool(dataset, 1919, compute)


def test_a_class_without_samples_is_an_error(digits: Digits, compute: Compute, tmp_path: Path) -> None:
    dataset = index_shards(IndexConfig(n_classes=11), digits.shards()[:1], str(tmp_path / "index"), compute)
    with pytest.raises(DataError, match="class 10"):
        fill_pool(dataset, 2**20, compute)


def test_held_out_images_are_never_drawn_and_are_a_tenth_of_a_class_at_most(dataset: Dataset, compute: Compute) -> None:
    pool = fill_pool(dataset, 2**20, compute)
    rest, images_MCHW, labels_M = pool.hold_out(3)
    assert labels_M.bincount().tolist() == [3] * 10
    drawn = {
        bytes(image.numpy())
        for image in rest.images_NCHW[rest.draw(3000, torch.Generator().manual_seed(0))].flatten(0, 1)
    }
    held = {bytes(image.numpy()) for image in images_MCHW}
    assert len(held) == 30
    assert not drawn & held
    assert drawn | held == {bytes(image.numpy()) for image in pool.images_NCHW}
    for of_class, label in zip(by_class(pool), range(10), strict=True):
        assert torch.equal(of_class[-3:], images_MCHW[labels_M == label])
    count_K = pool.count_K
    assert pool.hold_out(10**6)[2].bincount().tolist() == (count_K // 10).tolist()
    assert len(pool.hold_out(0)[1]) == 0
