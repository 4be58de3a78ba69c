from functools import partial

import pytest
import torch
from torch import nn

from sanitize.compute import Compute
from sanitize.models.config import ModelConfig
from sanitize.training.adversary import AdversaryConfig, InputSpace, ascend, divergence, perturb
from sanitize.training.losses import sample_losses


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor, InputSpace, ModelConfig]:
    torch.manual_seed(0)
    described = ModelConfig(n_classes=2, image_shape=(3, 5, 5), mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 1.0))
    pixels_BCHW = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
    return pixels_BCHW, torch.randn(6, 3, 5, 5), InputSpace.images(described.mean, described.std), described


@pytest.mark.parametrize("averaged", [False, True])
def test_the_perturbation_stays_in_the_ball_and_pixels_stay_pixels(images, averaged: bool) -> None:  # type: ignore[no-untyped-def]
    pixels_BCHW, gradient_BCHW, space, described = images
    x_BCHW = described.normalise(pixels_BCHW)
    config = AdversaryConfig(kind="at", tau_x=0.1, averaged=averaged)
    moved_BCHW = perturb(config, x_BCHW, gradient_BCHW, torch.ones(6, dtype=torch.bool), space)
    mean_C11, std_C11 = (torch.tensor(v)[:, None, None] for v in (described.mean, described.std))
    found_BCHW = moved_BCHW * std_C11 + mean_C11  # back on [0, 1]
    assert found_BCHW.min() > -1e-6
    assert found_BCHW.max() < 1 + 1e-6
    assert (found_BCHW - pixels_BCHW / 255).abs().max() < 0.1 + 1e-6
    assert (found_BCHW - pixels_BCHW / 255).abs().max() > 0.05


def test_per_sample_only_trusted_samples_move_and_the_way_their_loss_grows(images) -> None:  # type: ignore[no-untyped-def]
    _, gradient_BCHW, _, _ = images
    trusted_B = torch.tensor([True, False, True, False, False, True])
    x_BCHW = torch.zeros(6, 3, 5, 5)
    config = AdversaryConfig(kind="at", tau_x=0.3)
    moved_BCHW = perturb(config, x_BCHW, gradient_BCHW, trusted_B, InputSpace.unbounded())
    assert (moved_BCHW[~trusted_B] == 0).all()
    torch.testing.assert_close(moved_BCHW[trusted_B], 0.3 * gradient_BCHW[trusted_B].sign())


def test_averaged_is_equation_5_5_over_the_trusted(images) -> None:  # type: ignore[no-untyped-def]
    _, gradient_BCHW, _, _ = images
    trusted_B = torch.tensor([True, False, True, False, False, True])
    config = AdversaryConfig(kind="at", tau_x=0.3, averaged=True)
    moved_BCHW = perturb(config, torch.zeros(6, 3, 5, 5), gradient_BCHW, trusted_B, InputSpace.unbounded())
    wanted_CHW = 0.3 / 3 * gradient_BCHW[trusted_B].sign().sum(0)
    torch.testing.assert_close(moved_BCHW, wanted_CHW.expand(6, -1, -1, -1))
    untouched = perturb(config, torch.ones(6, 3, 5, 5), gradient_BCHW, trusted_B & False, InputSpace.unbounded())
    assert (untouched == 1).all()


@pytest.mark.parametrize("kind", ["pgd", "trades"])
def test_ascent_stays_in_the_ball_moves_the_trusted_and_makes_them_worse(images, kind: str, compute: Compute) -> None:  # type: ignore[no-untyped-def]
    pixels_BCHW, _, space, described = images
    x_BCHW, trusted_B = described.normalise(pixels_BCHW), torch.tensor([True, False] * 3)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(x_BCHW[0].numel()), nn.Linear(x_BCHW[0].numel(), 4))
    network.train()
    statistics = network[1].running_mean.clone()
    config = AdversaryConfig(kind=kind, tau_x=0.05, steps=7)
    with torch.no_grad():
        before_BK = network.eval()(x_BCHW)
    network.train()
    y_B = before_BK.argmax(1)
    losses = partial(sample_losses, targets_B=y_B, loss="cross_entropy")
    if kind == "trades":
        losses = partial(divergence, from_BK=before_BK)
    moved_BCHW = ascend(config, network, x_BCHW, losses, trusted_B, space, compute.generator("test"), compute)
    assert network.training
    assert torch.equal(network[1].running_mean, statistics)
    length_BCHW = (moved_BCHW - x_BCHW).abs() / space.unit
    assert length_BCHW.max() <= 0.05 * (1 + 1e-4)
    assert (moved_BCHW >= space.low - 1e-6).all()
    assert (moved_BCHW <= space.high + 1e-6).all()
    assert torch.equal(moved_BCHW[1::2], x_BCHW[1::2])
    with torch.no_grad():
        gain_B = losses(network.eval()(moved_BCHW)) - losses(before_BK)
    assert (gain_B[::2] > 0).all()


def test_the_divergence_is_that_of_the_distributions() -> None:
    one_BK, other_BK = torch.randn(5, 3), torch.randn(5, 3)
    p_BK, q_BK = one_BK.softmax(1), other_BK.softmax(1)
    torch.testing.assert_close(divergence(other_BK, one_BK), (p_BK * (p_BK / q_BK).log()).sum(1))
