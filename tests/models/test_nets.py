from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sanitize.models.architectures import Architecture
from sanitize.models.cnn9 import CNN9, CNN9Config
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.factory import FactoryConfig
from sanitize.models.mlp import MLP, MLPConfig
from sanitize.models.resnet import ResNet, ResNetConfig
from sanitize.models.torchvision import TorchvisionConfig

ARCHITECTURES = [kind for kind in get_args(get_args(Architecture)[0]) if kind is not FactoryConfig]
SETTINGS = {TorchvisionConfig: {"name": "resnet18"}}
CONFIGS = [
    ConvNetConfig(widths=(4,)),
    ConvNetConfig(widths=(4, 6, 8), convs_per_block=2),
    ResNetConfig(widths=(4,)),
    ResNetConfig(widths=(4, 6, 8), blocks_per_stage=2),
]


def build(config: ConvNetConfig | ResNetConfig, n_classes: int = 3, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return config.build(n_classes, (channels, 8, 8))


@pytest.mark.parametrize("kind", ARCHITECTURES, ids=lambda kind: kind.__name__)
def test_every_architecture_builds_itself_without_allocating(kind: type) -> None:
    with torch.device("meta"):
        network = kind(**SETTINGS.get(kind, {})).build(5, (3, 32, 32))
        logits_BK = network(torch.zeros(2, 3, 32, 32))
    assert logits_BK.shape == (2, 5)
    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (9, 13)), (3, (28, 28)), (1, (1, 1))])
def test_any_image_size_gives_logits(
    config: ConvNetConfig | ResNetConfig, channels: int, size: tuple[int, int]
) -> None:
    logits_BK = build(config, 5, channels).eval()(torch.randn(2, channels, *size))
    assert logits_BK.shape == (2, 5)
    assert logits_BK.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_sample_in_eval_mode_does_not_see_the_rest_of_its_batch(config: ConvNetConfig | ResNetConfig) -> None:
    model, x_BCHW = build(config).eval(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x_BCHW)[1:2], model(x_BCHW[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_gets_a_gradient(config: ConvNetConfig | ResNetConfig) -> None:
    model = build(config)
    model(torch.randn(8, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_depth_and_width_are_what_the_config_says() -> None:
    convs = [m for m in build(CONFIGS[1]).modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(3, 4), (4, 4), (4, 6), (6, 6), (6, 8), (8, 8)]
    resnet = build(CONFIGS[3])
    assert isinstance(resnet, ResNet)
    assert len(resnet.blocks) == 6
    assert resnet.blocks(resnet.stem(torch.randn(2, 3, 32, 32))).shape == (2, 8, 8, 8)
    assert resnet.head.in_features == 8


@pytest.mark.parametrize("wrong", [{"widths": ()}, {"convs_per_block": 0}, {"depth": 3}])
def test_impossible_networks_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ConvNetConfig(**wrong)


def test_the_nine_layer_network_is_the_papers() -> None:
    """4.4 million weights at width 128; a spatial map of 2 x 2 at 32 pixels, for the last block has no padding."""
    convs = [m for m in CNN9(CNN9Config(), 10, 3).modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [128] * 3 + [256] * 3 + [512, 256, 128]
    small = CNN9(CNN9Config(width=4), 10, 3)
    assert small.features(torch.randn(2, 3, 32, 32)).shape == (2, 4, 2, 2)
    assert small(torch.randn(2, 3, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("shape", [(784,), (1, 28, 28)])
def test_a_perceptron_takes_tables_and_images(shape: tuple[int, ...]) -> None:
    mlp = MLP(MLPConfig(widths=(16, 8), negative_slope=0.01), 10, 784)
    assert [m.out_features for m in mlp.modules() if isinstance(m, nn.Linear)] == [16, 8, 10]
    x_B = torch.randn(3, *shape)
    assert mlp(x_B).shape == (3, 10)
    torch.testing.assert_close(mlp(x_B), mlp(x_B.flatten(1)))
