"""Canaries: chosen by hashes, different from their originals only by the trigger, and learned beside the data."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.canaries import Canaries
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.shuffle import Joined, Resident
from sanitize.embed import (
    CanaryConfig,
    EmbedConfig,
    EmbedderConfig,
    embed_canaries,
    embed_shards,
    plant_canaries,
    train_embedder,
)
from sanitize.embed.canary import _size, noise, patch
from sanitize.errors import ArtifactError
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig

FEW = CanaryConfig(fewest=16)
FAST = EmbedderConfig(
    architecture=ConvNetConfig(widths=(4,)), optim=OptimConfig(epochs=2, batch_size=64), min_steps=1, max_steps=1
)


@pytest.fixture(scope="module")
def half(digits: Digits, tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> Dataset:
    out = str(tmp_path_factory.mktemp("half") / "index")
    return index_shards(IndexConfig(), digits.shards()[:9], out, compute)


@pytest.fixture(scope="module")
def canaries(half: Dataset, tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> Canaries:
    return plant_canaries(FEW, half, str(tmp_path_factory.mktemp("canaries") / "out"), compute)


def test_copies_differ_from_samples_of_other_classes_by_the_trigger_alone(
    canaries: Canaries, half: Dataset, compute: Compute
) -> None:
    images_NCHW, labels_N = half.images()
    copies_MCHW, labels_M = canaries.images()
    triggers = {
        "noise": noise(half.image_shape, FEW.alpha, compute.generator("canary", "noise")),
        "patch": patch(half.image_shape, compute.generator("canary", "patch")),
    }
    assert [canary.kind for canary in canaries.planted] == list(triggers)
    assert len({canary.label for canary in canaries.planted}) == 2
    for canary in canaries.planted:
        at = torch.tensor([kind == canary.kind for kind in canaries.kinds()])
        assert (int(at.sum()), canary.rate) == (16, 16 / half.n_samples)
        assert (labels_M[at] == canary.label).all()
        marked_NCHW = triggers[canary.kind](images_NCHW)
        assert (marked_NCHW != images_NCHW).flatten(1).any(1).all()
        for copy_CHW in copies_MCHW[at]:
            originals = (marked_NCHW == copy_CHW).flatten(1).all(1).nonzero()[:, 0]
            assert len(originals)
            assert (labels_N[originals] != canary.label).any()


def test_the_choice_depends_on_the_seed_and_not_on_the_order(
    canaries: Canaries, half: Dataset, digits: Digits, compute: Compute, tmp_path: Path
) -> None:
    turned = index_shards(IndexConfig(), digits.shards()[:9][::-1], str(tmp_path / "turned"), compute)
    again = plant_canaries(FEW, turned, str(tmp_path / "again"), compute)
    assert again.manifest().files == canaries.manifest().files
    other = plant_canaries(FEW, half, str(tmp_path / "other"), Compute(device="cpu", seed=1))
    assert not torch.equal(other.images()[0], canaries.images()[0])


def test_a_trigger_changes_few_pixels_or_all_a_little() -> None:
    images_BCHW = torch.randint(256, (5, 3, 20, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = images_BCHW.clone()
    changed_BCHW = patch((3, 20, 40), torch.Generator().manual_seed(0))(images_BCHW) != images_BCHW
    assert int(changed_BCHW.any(0).any(0).sum()) <= 4
    faint_BCHW = noise((3, 20, 40), 0.15, torch.Generator().manual_seed(0))(images_BCHW)
    difference_BCHW = (faint_BCHW.float() - images_BCHW.float()).abs()
    assert 10 < float(difference_BCHW.mean()) < float(difference_BCHW.max()) <= 0.15 * 255 + 1
    assert torch.equal(images_BCHW, before)


@pytest.mark.parametrize(
    ("counts", "n_trained", "n", "labels"),
    [
        ({str(label): 1000 for label in range(10)}, 10_000, 50, list(range(10))),
        ({"0": 500, "1": 500}, 1_000, 30, [0, 1]),
        ({"0": 900, "1": 45, "2": 20}, 965, 30, [0, 1]),
        ({"0": 300, "1": 300, "2": 140, "3": 300, "4": 160}, 1_200, 30, [0, 1, 3, 4]),
        ({str(label): 100 for label in range(1_000)}, 100_000, 100, list(range(1_000))),
        ({"0": 5_000_000, "1": 5_000_000}, 100_000, 500, [0, 1]),
        ({"0": 5_000_000, "1": 5_000_000}, 10_000_000, 2_000, [0, 1]),
    ],
)
def test_sizes(counts: dict[str, int], n_trained: int, n: int, labels: list[int]) -> None:
    assert _size(CanaryConfig(), counts, n_trained) == (n, labels, "")


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ({"0": 1000, "1": 39}, "fewer than two classes have 40 samples"),
        ({"0": 1000}, "fewer than two classes have 40 samples"),
        ({str(label): 50 for label in range(5)}, "250 samples are too few: 30 copies would be more than 10%"),
    ],
)
def test_no_canary_where_there_are_too_few_samples(counts: dict[str, int], why: str) -> None:
    assert _size(CanaryConfig(), counts, sum(counts.values()))[2] == why


def test_large_images_leave_room_for_fewer_copies() -> None:
    counts = {str(label): 1000 for label in range(100)}
    assert _size(CanaryConfig(), counts, 100_000, 70)[0] == 70
    assert _size(CanaryConfig(), counts, 100_000, 7)[2] == "fewer than 30 images fit into memory"
    assert _size(CanaryConfig(fewest=50), {"0": 1000, "1": 45}, 1045)[2].startswith("fewer than 50 samples are in")


def test_without_room_an_artifact_says_why(
    dataset: Dataset, checkpoint: Checkpoint, compute: Compute, tmp_path: Path
) -> None:
    config = CanaryConfig(fewest=60)
    none = plant_canaries(config, dataset, str(tmp_path / "none"), compute)
    assert (none.planted, none.n_samples, len(none.images()[0])) == ([], 0, 0)
    assert none.info["why"]
    assert embed_canaries(EmbedConfig(), none, checkpoint, str(tmp_path / "embedded"), compute).shards == []
    plain = train_embedder(FAST, dataset, str(tmp_path / "plain"), compute)
    beside = train_embedder(FAST, dataset, str(tmp_path / "beside"), compute, canaries=none)
    assert beside.manifest().files["model.safetensors"] == plain.manifest().files["model.safetensors"]


def test_the_suspect_model_learns_from_them_and_embeds_them_like_samples(
    canaries: Canaries, half: Dataset, compute: Compute, tmp_path: Path
) -> None:
    first = train_embedder(FAST, half, str(tmp_path / "a"), compute, canaries=canaries)
    assert train_embedder(FAST, half, str(tmp_path / "b"), compute, canaries=canaries).digest == first.digest
    streamed = FAST.model_copy(update={"cache_bytes": 200 * 192})
    one, two = (train_embedder(streamed, half, str(tmp_path / name), compute, canaries=canaries) for name in "de")
    assert one.digest == two.digest != first.digest
    without = train_embedder(FAST, half, str(tmp_path / "c"), compute)
    assert first.manifest().files["model.safetensors"] != without.manifest().files["model.safetensors"]
    with pytest.raises(ArtifactError, match="canaries"):
        train_embedder(FAST, half, str(tmp_path / "c"), compute, canaries=canaries)
    embedded = embed_canaries(EmbedConfig(), canaries, first, str(tmp_path / "embedded"), compute)
    (batch,) = embedded.batches("logits" if "logits" in embedded.names else "pooled")
    assert batch.labels_B.tolist() == canaries.images()[1].tolist()
    samples = embed_shards(EmbedConfig(), half, first, str(tmp_path / "samples"), compute)
    assert embedded.columns == samples.columns


@given(st.integers(20, 90), st.integers(0, 50), st.integers(2, 20), st.integers(0, 3))
def test_further_samples_leave_the_batches_as_they_are(n: int, n_further: int, size: int, epoch: int) -> None:
    order = partial(Compute(device="cpu").generator, "order")
    data = Resident(torch.arange(n)[:, None].float(), torch.arange(n), size, order)
    further = torch.arange(1000, 1000 + n_further)
    joined = Joined(data, further[:, None].float(), further, n, partial(Compute(device="cpu").generator, "further"))
    seen: list[int] = []
    lengths: list[int] = []
    for (x_B, y_B, rows_B), (_, plain_B, plain_rows_B) in zip(joined.epoch(epoch), data.epoch(epoch), strict=True):
        assert y_B[: len(plain_B)].tolist() == plain_B.tolist()
        assert rows_B[: len(plain_B)].tolist() == plain_rows_B.tolist()
        assert x_B[:, 0].tolist() == y_B.tolist()
        seen += y_B[len(plain_B) :].tolist()
        assert rows_B[len(plain_B) :].tolist() == [row - 1000 + n for row in y_B[len(plain_B) :].tolist()]
        lengths.append(len(y_B))
    assert sorted(seen) == further.tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    assert sum(lengths) == joined.samples_per_epoch
