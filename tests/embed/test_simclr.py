"""NT-Xent against two loops and its closed limits; pre-training sees images, all of them, and nothing else."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.attack import LabelNoiseConfig, poison_shards
from sanitize.augment import AugmentConfig
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.embed import SimCLRConfig, pretrain_simclr, simclr
from sanitize.embed.simclr import contrastive, similarities
from sanitize.errors import ConfigError
from sanitize.loop import Objective, OptimConfig, TrainBatch
from sanitize.models.convnet import ConvNetConfig

FAST = SimCLRConfig(
    architecture=ConvNetConfig(widths=(8, 16)),
    views=AugmentConfig(crop=0.5, brightness=0.4, contrast=0.4),
    projection=(16, 8),
    optim=OptimConfig(epochs=3, batch_size=64, learning_rate=0.01),
)


def nt_xent(z_VD: Tensor, temperature: float, compute: Compute) -> Tensor:
    """The objective's loss, of a network that gives `z_VD` whatever it is shown."""
    n = len(z_VD) // 2
    step = contrastive(temperature, compute)(nn.Identity(), TrainBatch(z_VD, torch.zeros(n)), 0)
    assert step.sums["loss"] == step.loss.detach() * n
    return step.loss


def slow_nt_xent(z_VD: Tensor, temperature: float) -> float:
    """Equation 1 of the paper, view by view."""
    views = z_VD.double().tolist()
    n = len(views) // 2

    def cosine(i: int, j: int) -> float:
        a, b = views[i], views[j]
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    def loss(i: int, j: int) -> float:
        others = sum(math.exp(cosine(i, k) / temperature) for k in range(2 * n) if k != i)
        return -math.log(math.exp(cosine(i, j) / temperature) / others)

    return sum(loss(k, k + n) + loss(k + n, k) for k in range(n)) / (2 * n)


@given(
    n=st.integers(1, 6),
    d=st.integers(1, 5),
    temperature=st.floats(0.1, 3),
    seed=st.integers(0, 2**16),
    scale=st.just(7),
)
def test_nt_xent_is_what_two_loops_say(n: int, d: int, temperature: float, seed: int, scale: float) -> None:
    z_VD = torch.randn(2 * n, d, generator=torch.Generator().manual_seed(seed))
    compute = Compute(device="cpu")
    loss = nt_xent(z_VD, temperature, compute)
    assert float(loss) == pytest.approx(slow_nt_xent(z_VD, temperature), rel=1e-4, abs=1e-5)
    order_n = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    changed_VD = 7 * torch.cat([z_VD[n:][order_n], z_VD[:n][order_n]])  # length, order and side say nothing
    torch.testing.assert_close(nt_xent(changed_VD, temperature, compute), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_identical_views_of_images_that_differ_are_the_best_there_is(temperature: float, compute: Compute) -> None:
    n = 4
    apart_VD = torch.eye(n).repeat(2, 1)
    wanted = math.log(math.exp(1 / temperature) + 2 * n - 2) - 1 / temperature
    assert float(nt_xent(apart_VD, temperature, compute)) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    same_VD = torch.ones(2 * n, n)  # collapsed: any of the others may be the partner
    assert float(nt_xent(same_VD, temperature, compute)) == pytest.approx(math.log(2 * n - 1), rel=1e-5)


def test_a_view_is_never_compared_with_itself() -> None:
    logits_VV, other_V = similarities(torch.randn(6, 3), 0.5)
    assert (logits_VV.diagonal() == -torch.inf).all()
    assert other_V.tolist() == [3, 4, 5, 0, 1, 2]


def test_it_learns_to_tell_images_apart(tmp_path: Path, dataset: Dataset, compute: Compute) -> None:
    optim = FAST.optim.model_copy(update={"epochs": 20})
    checkpoint = pretrain_simclr(FAST.model_copy(update={"optim": optim}), dataset, str(tmp_path / "a"), compute)
    history = checkpoint.read_json("history.json")
    assert len(history) == 20
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["matched"] > 0.2  # chance is 1 of 127
    assert checkpoint.config.n_classes == dataset.n_classes
    head = checkpoint.model().head
    assert (head.weight == 0).all()
    assert (head.bias == 0).all()


def test_labels_do_not_reach_it(tmp_path: Path, dataset: Dataset, compute: Compute) -> None:
    flipped = poison_shards(LabelNoiseConfig(rate=0.5), dataset, str(tmp_path / "flipped"), compute)
    other = index_shards(IndexConfig(n_classes=10), flipped.shard_paths(), str(tmp_path / "index"), compute)
    assert not torch.equal(other.images()[1], dataset.images()[1])
    first, second = (
        pretrain_simclr(FAST, of, str(tmp_path / name), compute).manifest().files["model.safetensors"]
        for name, of in (("a", dataset), ("b", other))
    )
    assert first == second


@pytest.mark.parametrize("cache_bytes", [2**30, 200 * 192], ids=["resident", "streamed"])
def test_the_same_seed_gives_the_same_digest_and_another_seed_another_encoder(
    tmp_path: Path, dataset: Dataset, compute: Compute, cache_bytes: int
) -> None:
    config = FAST.model_copy(update={"cache_bytes": cache_bytes})
    first = pretrain_simclr(config, dataset, str(tmp_path / "a"), compute)
    torch.rand(7)  # the global generator is no part of it
    assert pretrain_simclr(config, dataset, str(tmp_path / "b"), Compute(device="cpu")).digest == first.digest
    other = pretrain_simclr(config, dataset, str(tmp_path / "c"), Compute(device="cpu", seed=1))
    assert other.manifest().files["model.safetensors"] != first.manifest().files["model.safetensors"]


class Stopped(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path, dataset: Dataset, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAST.model_copy(update={"snapshot_every": 2})
    whole = pretrain_simclr(config, dataset, str(tmp_path / "whole"), compute)

    def stopping(temperature: float, compute: Compute) -> Objective:
        objective, steps = contrastive(temperature, compute), iter(range(11))

        def stop(model: nn.Module, batch: TrainBatch, epoch: int):  # type: ignore[no-untyped-def]
            if next(steps, None) is None:
                raise Stopped
            return objective(model, batch, epoch)

        return stop

    monkeypatch.setattr(simclr, "contrastive", stopping)
    with pytest.raises(Stopped):
        pretrain_simclr(config, dataset, str(tmp_path / "killed"), compute)
    assert list(tmp_path.glob(".killed.partial/snapshot*"))
    monkeypatch.undo()
    resumed = pretrain_simclr(config, dataset, str(tmp_path / "killed"), compute)
    assert resumed.manifest().files == whole.manifest().files


# --- more images --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def unlabelled(home: Path, digits: Digits, compute: Compute) -> Dataset:
    return index_shards(IndexConfig(label=None), digits.shards()[4:6], str(home / "unlabelled"), compute)


@pytest.mark.parametrize("check", ["decode", "headers"])
def test_shards_without_labels_can_be_indexed(
    tmp_path: Path, make_tar: Callable, make_png: Callable, compute: Compute, check: str
) -> None:
    path = make_tar(tmp_path / "a.tar", [(f"{i}.png", make_png(i)) for i in range(5)])
    config = IndexConfig(label=None, check=check, image={"size": (6, 6)})
    dataset = index_shards(config, [path], str(tmp_path / "index"), compute)
    images_NCHW, labels_N = dataset.images()
    assert images_NCHW.shape == (5, 3, 6, 6)
    assert labels_N.tolist() == [0] * 5
    assert dataset.n_classes == 1


def test_each_batch_holds_of_both_data_sets(
    tmp_path: Path, dataset: Dataset, unlabelled: Dataset, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a batch shows its origin; all steps of the run are checked."""
    seen: list[int] = []

    def watching(temperature: float, compute: Compute) -> Objective:
        objective = contrastive(temperature, compute)

        def watch(model: nn.Module, batch: TrainBatch, epoch: int):  # type: ignore[no-untyped-def]
            assert len(batch.x_B) == 2 * len(batch.y_B)
            seen.append(len(batch.y_B))
            return objective(model, batch, epoch)

        return watch

    monkeypatch.setattr(simclr, "contrastive", watching)
    more = pretrain_simclr(FAST, dataset, str(tmp_path / "a"), compute, unlabelled=unlabelled)
    n, m = dataset.n_samples, unlabelled.n_samples
    n_steps = math.ceil((n + m) / 64)
    assert seen == [n // n_steps + m // n_steps] * (3 * n_steps)
    assert more.manifest().counts["samples"] == n + m
    alone = pretrain_simclr(FAST, dataset, str(tmp_path / "b"), compute)
    assert alone.manifest().files["model.safetensors"] != more.manifest().files["model.safetensors"]


def test_images_of_another_shape_and_too_few_of_them_are_refused(
    tmp_path: Path, dataset: Dataset, make_tar: Callable, good: Callable, compute: Compute
) -> None:
    path = make_tar(tmp_path / "a.tar", good(2))
    odd, few = (
        index_shards(IndexConfig(label=None, image={"size": size}), [path], str(tmp_path / f"index{size}"), compute)
        for size in ((6, 6), (8, 8))
    )
    with pytest.raises(ConfigError, match=r"\(3, 6, 6\)"):
        pretrain_simclr(FAST, dataset, str(tmp_path / "b"), compute, unlabelled=odd)
    with pytest.raises(ConfigError, match="2 samples for"):
        pretrain_simclr(FAST, dataset, str(tmp_path / "c"), compute, unlabelled=few)
