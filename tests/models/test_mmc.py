"""Max-Mahalanobis centres, and the last layer that measures distances to them."""

import pytest
import torch

from sanitize.errors import ConfigError
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.mmc import CentreDistance, centres
from sanitize.models.taps import find_taps
from sanitize.training.losses import loss_gradient_norms, sample_losses


@pytest.mark.parametrize(("n_classes", "n_features"), [(2, 1), (2, 5), (10, 9), (10, 64)])
def test_centres_are_a_simplex(n_classes: int, n_features: int) -> None:
    mu_KD = centres(n_classes, n_features, 10.0).double()
    cosines_KK = mu_KD @ mu_KD.T / 100
    expected_KK = torch.full((n_classes, n_classes), -1 / (n_classes - 1), dtype=torch.float64)
    torch.testing.assert_close(cosines_KK, expected_KK.fill_diagonal_(1), rtol=1e-5, atol=1e-5)


def test_there_must_be_room_for_them() -> None:
    with pytest.raises(ConfigError, match="10 centres need 9 features, the embedding has 8"):
        centres(10, 8, 1.0)


def test_logits_are_distances_and_the_loss_is_that_to_the_own_centre() -> None:
    head, z_BD, y_B = CentreDistance(6, 4, 3.0), torch.randn(5, 6, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    logits_BK = head(z_BD)
    distances_BK = torch.cdist(z_BD, head.centres_KD)
    torch.testing.assert_close(logits_BK, -distances_BK.square() / 2, rtol=1e-4, atol=1e-4)
    losses_B = sample_losses(logits_BK, y_B, "mmc")
    (gradient_BD,) = torch.autograd.grad(losses_B.sum(), z_BD)
    torch.testing.assert_close(gradient_BD, z_BD.detach() - head.centres_KD[y_B])
    norms_B = loss_gradient_norms(logits_BK.detach(), y_B, "mmc")
    torch.testing.assert_close(norms_B, gradient_BD.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_a_described_network_has_it_after_a_last_linear_that_can_be_negative() -> None:
    config = ModelConfig(architecture=ConvNetConfig(widths=(4, 16)), n_classes=5, image_shape=(1, 8, 8), mmc=10.0)
    network = config.build()
    embedding, centre_distance = network.head
    assert (embedding.in_features, embedding.out_features) == (16, 16)
    assert isinstance(centre_distance, CentreDistance)
    assert network(config.example()).shape == (2, 5)
    assert find_taps(network, config.example()).penultimate == "head.0"
