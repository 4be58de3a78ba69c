"""Detectors that train networks, on small images and numbers for which the answer is known."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.proactive import (
    Labelled,
    asset,
    batches,
    confusion_training,
    extremes,
    features,
    likelihood_ratio,
    threshold_of_lower_half,
    train_by_sam,
    train_plainly,
)
from sanitize.compute import Compute
from sanitize.models.convnet import ConvNetConfig

N_CLASSES = 4
COMPUTE = Compute(device="cpu", seed=0)


def _network() -> nn.Module:
    return ConvNetConfig(widths=(8, 16)).build(N_CLASSES, (1, 8, 8))


def _images(n: int, seed: int, n_poison: int = 0) -> tuple[Labelled, np.ndarray]:
    """Noise with a bright quadrant that says the class; poison has a bright corner pixel and label 0."""
    random = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(N_CLASSES, (n,), generator=random)
    x_NCHW = torch.randn(n, 1, 8, 8, generator=random)
    for k in range(N_CLASSES):
        row, column = divmod(k, 2)
        x_NCHW[labels_N == k, :, 4 * row + 1 : 4 * row + 4, 4 * column + 1 : 4 * column + 4] += 1
    truth_N = torch.zeros(n, dtype=torch.bool)
    if n_poison:
        truth_N[(labels_N != 0).nonzero()[:n_poison, 0]] = True
        x_NCHW[truth_N, :, 0, :] = 6
        labels_N[truth_N] = 0
    return Labelled(x_NCHW, labels_N), truth_N.numpy()


def test_a_pass_has_every_row_once() -> None:
    rows = list(islice(batches(10, 5, torch.Generator().manual_seed(0)), 4))
    assert sorted(torch.cat(rows[:2]).tolist()) == list(range(10))
    assert sorted(torch.cat(rows[2:]).tolist()) == list(range(10))
    assert len(next(batches(3, 5, torch.Generator()))) == 3  # fewer samples than a batch


def test_features_are_the_input_of_the_head() -> None:
    model, x_NCHW = _network(), torch.randn(7, 1, 8, 8)
    z_ND = features(model, x_NCHW)
    torch.testing.assert_close(model.head(z_ND), model.eval()(x_NCHW))


def test_extremes_by_hand() -> None:
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])
    with torch.no_grad():
        norm.weight.fill_(3)  # what the layer does behind its normalisation does not matter
    x_NCHW = torch.tensor([[[[1.0, 5.0]], [[-2.0, 0.5]]]])
    (found,) = extremes(nn.Sequential(norm), x_NCHW)
    np.testing.assert_allclose(found, [[2, 0.5, 0, -2]])
    assert not norm._forward_pre_hooks


def _sam_steps(radius: float) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a linear model after five steps, and after the same steps by hand."""
    data = Labelled(
        torch.randn(6, 1, 1, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0, 1, 1, 0])
    )
    torch.manual_seed(2)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(3, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    train_by_sam(models[0], data, 5, COMPUTE, radius=radius, learning_rate=0.1, batch_size=6)
    weights = list(models[1].parameters())
    optimizer = torch.optim.AdamW(weights, 0.1, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, pct_start=0.25)
    for _ in range(5):
        stood = [weight.detach().clone() for weight in weights]
        slope = torch.autograd.grad(cross_entropy(models[1](data.x_NCHW), data.y_N), weights)
        length = torch.cat([one.flatten() for one in slope]).norm()
        with torch.no_grad():
            for weight, one in zip(weights, slope, strict=True):
                weight += radius * one / length
        optimizer.zero_grad()
        cross_entropy(models[1](data.x_NCHW), data.y_N).backward()
        with torch.no_grad():
            for weight, before in zip(weights, stood, strict=True):
                weight.copy_(before)
        optimizer.step()
        schedule.step()
    return list(models[0].parameters()), weights


@pytest.mark.parametrize("radius", [0.0, 0.05, 2.0])
def test_sam_descends_by_the_gradient_at_the_top_of_its_climb(radius: float) -> None:
    for found, wanted in zip(*_sam_steps(radius), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_climb_of_sam_matters() -> None:
    assert not torch.allclose(_sam_steps(0.0)[0][0], _sam_steps(2.0)[0][0], atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_likelihood_ratio_of_one_and_of_two_gaussians(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z_ND, trusted_MD = rng.normal(size=(500, 8)), rng.normal(size=(100, 8))
    assert likelihood_ratio(z_ND, trusted_MD) < 2
    z_ND[:50, 3] += 12
    assert likelihood_ratio(z_ND, trusted_MD) > 5
    z_ND[:50, 3] += 1e6
    assert np.isfinite(likelihood_ratio(z_ND, trusted_MD))
    assert likelihood_ratio(z_ND, trusted_MD[:1]) == 1  # nothing to compare with


def test_threshold_of_the_lower_half_ignores_the_upper() -> None:
    loss_N = np.random.default_rng(0).normal(2.0, 0.1, 4000)
    threshold = threshold_of_lower_half(loss_N)
    assert 2.3 < threshold < 2.5  # the density of N(2, .1^2) is 1e-3 at 2 + .407
    assert threshold_of_lower_half(np.concatenate([loss_N, np.full(40, 9.0)])) == pytest.approx(threshold, abs=0.02)


@pytest.mark.parametrize("run", ["ct", "asset"])
def test_poison_is_found_and_the_rest_is_left(run: str) -> None:
    data, truth_N = _images(1200, seed=0, n_poison=60)
    removed_N = _removed(run, data)
    assert removed_N[truth_N].mean() >= 0.8
    if run == "ct":  # of the class with poison, all samples go that still get their label, as in the paper
        assert not removed_N[data.y_N.numpy() != 0].any()
    else:
        assert removed_N[~truth_N].mean() <= 0.05
    np.testing.assert_array_equal(removed_N, _removed(run, data))  # the same seed, the same samples


def _removed(run: str, data: Labelled) -> np.ndarray:
    trusted, _ = _images(400, seed=1)
    if run == "ct":
        return confusion_training(
            _network, data, trusted, N_CLASSES, COMPUTE, n_first_steps=120, n_steps=60, n_confusing_steps=80
        )
    COMPUTE.seed_global("suspect")
    suspect = _network()
    train_plainly(suspect, data, 150, 3e-3, 64, COMPUTE, "suspect")
    return asset(_network, data, trusted, suspect, COMPUTE, n_passes=6)
