"""Distribution matching: against a plain loop over classes, and what poison does to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.condensation import distribution_matching
from sanitize.condensation.aggregate import AggregateConfig
from sanitize.condensation.distribution_matching import MatchingConfig, condense, to_pixels
from sanitize.condensation.pool import Pool
from sanitize.errors import NumericsError
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig
from sanitize.siamese import SiameseConfig
from sanitize.snapshots import Snapshots

MEAN = AggregateConfig(kind="mean")
SMALL = MatchingConfig(
    images_per_class=2,
    iterations=8,
    learning_rate=5,
    batch_size=16,
    architecture=InstanceConvNetConfig(widths=(8, 8)),
    aggregate=MEAN,
)


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Three classes of noisy 8 x 8 pictures, bright in another place each; 40, 50 and 60 of them."""
    g = torch.Generator().manual_seed(0)
    counts = torch.tensor([40, 50, 60])
    images = []
    for label, count in enumerate(counts.tolist()):
        x_N1HW = torch.randint(0, 80, (count, 1, 8, 8), generator=g)
        x_N1HW[..., 2 * label : 2 * label + 3, 1:7] += 150
        images.append(x_N1HW.to(torch.uint8))
    return Pool(torch.cat(images), counts.cumsum(0) - counts, counts)


def slowly(config: MatchingConfig, pool: Pool, compute: Compute) -> tuple[Tensor, list[float]]:
    """Class by class, the update written out; for the mean."""
    shape, n_classes = tuple(pool.images_NCHW.shape[1:]), len(pool.count_K)
    start = compute.generator("condense", "start")
    s = [x.clone() for x in torch.randn(n_classes, config.images_per_class, *shape, generator=start)]
    velocity = [torch.zeros_like(x) for x in s]
    losses = []
    for iteration in range(config.iterations):
        draws = compute.generator("condense", "draws", iteration)
        network = InstanceConvNet(config.architecture, n_classes, shape)  # type: ignore[arg-type]
        network.redraw(compute.generator("condense", "extractor", iteration))
        rows = pool.draw(config.batch_size, draws)
        change = config.augment.draw(n_classes, (8, 8), draws)
        losses.append(0.0)
        for c in range(n_classes):
            of_class = change.of(slice(c, c + 1))
            real = (pool.images_NCHW[rows[c]].float() / 255 - 0.5) / 0.25
            mine = s[c].requires_grad_()
            target = network.features(of_class(real[None])[0]).mean(0).detach()
            loss = (network.features(of_class(mine[None])[0]).mean(0) - target).square().sum()
            (gradient,) = torch.autograd.grad(loss, mine)
            velocity[c] = config.momentum * velocity[c] + gradient
            s[c] = mine.detach() - config.learning_rate * velocity[c]
            losses[-1] += float(loss.detach())
    return torch.stack(s), losses


@pytest.mark.parametrize("at_once", [5, 16, 32, 1000])
def test_it_is_the_loop_over_classes_however_classes_are_grouped(
    pool: Pool, compute: Compute, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setitem(distribution_matching._AT_ONCE, "cpu", at_once)
    found = condense(SMALL, pool, compute)
    images_KMCHW, losses = slowly(SMALL, pool, compute)
    torch.testing.assert_close(found.images_KMCHW, images_KMCHW, rtol=1e-3, atol=1e-3)
    assert found.history == [{"iteration": 8, "loss": pytest.approx(sum(losses) / 8, rel=1e-4)}]


def test_images_become_those_of_their_class(pool: Pool, compute: Compute) -> None:
    config = SMALL.model_copy(update={"iterations": 150, "augment": SiameseConfig(flip=False)})
    found = condense(config, pool, compute)
    assert found.history[-1]["loss"] < 0.3 * found.history[0]["loss"]
    real_KD = torch.stack([x.float().mean(0).flatten() for x in pool.images_NCHW.split(pool.count_K.tolist())])
    mine_KD = found.images_KMCHW.mean(1).flatten(1)
    nearest_K = torch.corrcoef(torch.cat([mine_KD, real_KD]))[:3, 3:].argmax(1)
    assert nearest_K.tolist() == [0, 1, 2]


def poisoned(pool: Pool, n: int) -> Pool:
    """`n` of the 40 images of class 0 are one and the same picture, bright where class 2 is."""
    images_NCHW = pool.images_NCHW.clone()
    images_NCHW[:n] = 0
    images_NCHW[:n, :, 4:7, 1:7] = 255
    return pool._replace(images_NCHW=images_NCHW)


@pytest.mark.slow
def test_poison_moves_what_plain_matching_learns_more_than_what_calibrated_matching_learns(
    pool: Pool, compute: Compute
) -> None:
    moved = {}
    for kind in ("mean", "calibrated"):
        aggregate = AggregateConfig(kind=kind, eps=0.1)  # type: ignore[arg-type]
        update = {"aggregate": aggregate, "iterations": 100, "batch_size": 64, "augment": SiameseConfig(flip=False)}
        config = SMALL.model_copy(update=update)
        clean, dirty = (
            condense(config, source, compute).images_KMCHW[0].mean(0) for source in (pool, poisoned(pool, 4))
        )
        moved[kind] = float((dirty - clean)[0, 4:7, 1:7].mean())
    assert moved["mean"] > 0.1
    assert moved["calibrated"] < 0.5 * moved["mean"]


def test_a_run_that_was_killed_goes_on_to_the_same_bits(pool: Pool, compute: Compute, tmp_path: Path) -> None:
    whole = condense(SMALL, pool, compute)
    snapshots = Snapshots(tmp_path / "snapshot", 3)

    class Killed(Exception):
        pass

    def killer(stop: int) -> Iterator[None]:
        done = 0
        while True:
            done += 1
            if done == stop:
                raise Killed
            yield

    for stop in (5, 5):
        steps = killer(stop)
        with pytest.raises(Killed):
            condense(SMALL, pool, compute, snapshots, lambda _n, steps=steps: next(steps))
    steps_done: list[int] = []
    resumed = condense(SMALL, pool, compute, snapshots, steps_done.append)
    assert steps_done == [6, 1, 1]
    assert torch.equal(resumed.images_KMCHW, whole.images_KMCHW)
    assert resumed.history == whole.history
    assert resumed.frames.keys() == whole.frames.keys() == {0, 2, 4, 6, 8}
    assert all(torch.equal(resumed.frames[iteration], frame) for iteration, frame in whole.frames.items())


def test_frames_lead_from_the_noise_to_the_images(pool: Pool, compute: Compute) -> None:
    found = condense(SMALL, pool, compute)
    start = torch.randn(3, 2, 1, 8, 8, generator=compute.generator("condense", "start"))
    assert torch.equal(found.frames[0], to_pixels(start, SMALL))
    assert torch.equal(found.frames[8], to_pixels(found.images_KMCHW, SMALL))
    halfway = condense(SMALL.model_copy(update={"iterations": 4}), pool, compute)
    assert torch.equal(found.frames[4], halfway.frames[4])
    shortest = condense(SMALL.model_copy(update={"iterations": 1}), pool, compute)
    assert sorted(shortest.frames) == [0, 1]


def test_poison_in_one_class_leaves_the_images_of_the_others_as_they_are(pool: Pool, compute: Compute) -> None:
    clean, dirty = (condense(SMALL, source, compute).images_KMCHW for source in (pool, poisoned(pool, 4)))
    assert torch.equal(clean[1:], dirty[1:])
    assert not torch.equal(clean[0], dirty[0])


def test_a_loss_that_is_not_finite_is_an_error(pool: Pool, compute: Compute) -> None:
    with pytest.raises(NumericsError, match="learning_rate"):
        condense(SMALL.model_copy(update={"learning_rate": 1e38, "iterations": 20}), pool, compute)
