"""Stacked networks give the same outputs and gradients as each network alone."""

import pytest
import torch
from torch import nn

from sanitize.errors import ConfigError
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.stacked import Plurality, Stacked

ARCHITECTURES = {"mlp": MLPConfig(widths=(8,)), "convnet": ConvNetConfig(widths=(4, 8))}


def networks(name: str, n: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    config = ModelConfig(architecture=ARCHITECTURES[name], group_norm=True, n_classes=4, image_shape=(1, 8, 8))
    return [config.build_one() for _ in range(n)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_each_network_alone(name: str) -> None:
    alone = networks(name)
    stacked = Stacked.of(alone)
    x_BMCHW = torch.randn(5, 3, 1, 8, 8)
    outputs_BMK = stacked(x_BMCHW)
    outputs_BMK.square().sum().backward()
    for m, network in enumerate(alone):
        outputs_BK = network(x_BMCHW[:, m])
        torch.testing.assert_close(outputs_BMK[:, m], outputs_BK, rtol=1e-4, atol=1e-5)
        outputs_BK.square().sum().backward()
        for key, parameter in network.named_parameters():
            gradient = stacked.get_parameter(key.replace(".", "__")).grad
            assert gradient is not None
            torch.testing.assert_close(gradient[m], parameter.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stacked(x_BMCHW[:, 0], shared=True)[:, 0], outputs_BMK[:, 0], rtol=1e-4, atol=1e-5)


def test_a_vote_counts_what_each_network_says() -> None:
    alone = networks("mlp", 7)
    x_BCHW = torch.randn(20, 1, 8, 8)
    said_BM = torch.stack([network(x_BCHW).argmax(1) for network in alone], 1)
    votes_BK = Plurality(Stacked.of(alone))(x_BCHW)
    assert torch.equal(votes_BK, torch.stack([(said_BM == k).sum(1) for k in range(4)], 1).float())


def test_networks_with_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match="running_mean"):
        Stacked.of([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)])
