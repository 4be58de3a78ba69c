import pytest
import torch

from sanitize.models.checkpoint import ModelConfig
from sanitize.train.adversary import AdversaryConfig, InputSpace, perturb


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
