from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from sanitize.errors import ConfigError
from sanitize.models.convnet import ConvNet, ConvNetConfig
from sanitize.models.resnet import ResNet, ResNetConfig
from sanitize.models.taps import EARLY_CHANNELS, Tapped, Taps, find_taps


def pooled(maps_BCHW: Tensor) -> Tensor:
    return torch.cat([maps_BCHW.flatten(2).max(2).values, maps_BCHW.flatten(2).mean(2)], 1)


def vit_class_token(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """torchvision's forward pass up to the head, written out."""
    tokens = model._process_input(x_BCHW)  # type: ignore[operator]
    tokens = torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], 1)  # type: ignore[operator, union-attr]
    return model.encoder(tokens)[:, 0]  # type: ignore[operator]


def build(name: str) -> nn.Module:
    """A torchvision network with random weights, drawn at once: its own initialisation takes seconds."""
    with torch.device("meta"):
        if name == "vit":  # vit_b_16, smaller
            model: nn.Module = torchvision.models.VisionTransformer(
                image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=7
            )
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=7)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        nn.init.uniform_(parameter, -1.7 * fan_in**-0.5, 1.7 * fan_in**-0.5, generator=generator)
    for buffer_name, buffer in model.named_buffers():
        buffer.fill_(1 if buffer_name.endswith("running_var") else 0)
    return model.eval()


# name -> (image size, name of the head, its input by hand, feature maps by hand)
BY_HAND: dict[str, tuple[int, str, Callable, Callable | None]] = {
    "resnet18": (
        64,
        "fc",
        lambda m, x: nn.Sequential(*list(m.children())[:-1])(x).flatten(1),
        None,  # the last BatchNorm lies inside a block: checked below
    ),
    "vgg11_bn": (
        64,
        "classifier.6",
        lambda m, x: m.classifier[:6](m.avgpool(m.features(x)).flatten(1)),
        lambda m, x: m.features[:27](x),
    ),
    "densenet121": (
        64,
        "classifier",
        lambda m, x: m.features(x).relu().mean((2, 3)),
        lambda m, x: m.features(x),
    ),
    "mobilenet_v3_small": (
        64,
        "classifier.3",
        lambda m, x: m.classifier[:3](m.features(x).mean((2, 3))),
        lambda m, x: m.features[-1][1](m.features[-1][0](m.features[:-1](x))),
    ),
    "vit": (32, "heads.head", vit_class_token, None),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_penultimate_layer_is_the_input_of_the_head(name: str) -> None:
    size, head, by_hand, maps_by_hand = BY_HAND[name]
    model = build(name)
    x_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    taps = find_taps(model, x_BCHW)
    assert taps.penultimate == head
    with torch.inference_mode():
        seen = Tapped(model, taps)(x_BCHW)
        wanted_BD = by_hand(model, x_BCHW)
        assert wanted_BD.std() > 1e-2  # or the comparisons below say nothing
        torch.testing.assert_close(seen["penultimate"], wanted_BD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.get_submodule(head)(wanted_BD), seen["logits"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen["logits"], model(x_BCHW))
        if maps_by_hand is not None:
            torch.testing.assert_close(seen["pooled"], pooled(maps_by_hand(model, x_BCHW)), rtol=1e-4, atol=1e-5)
        elif name == "vit":
            assert taps.feature_maps is None
            assert "pooled" not in seen
        else:
            assert taps.feature_maps == "layer4.1.bn2"


EARLY: dict[str, tuple[str, Callable]] = {
    "resnet18": ("layer2.0.bn2", lambda m, x: m.layer2[0].bn2(resnet_second(m, x))),
    "vgg11_bn": ("features.9", lambda m, x: m.features[:10](x)),
}


def resnet_second(m: Any, x_BCHW: Tensor) -> Tensor:
    """What the second BatchNorm of the first block of the second stage of a ResNet-18 reads, written out."""
    y_BCHW = m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x_BCHW)))))
    block = m.layer2[0]
    return block.conv2(block.relu(block.bn1(block.conv1(y_BCHW))))


@pytest.mark.parametrize("name", EARLY)
def test_early_features_are_a_third_of_the_way_in_and_of_64_channels_at_most(name: str) -> None:
    model, (layer, by_hand) = build(name), EARLY[name]
    x_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    taps = find_taps(model, x_BCHW)
    assert taps.early == layer
    with torch.inference_mode():
        seen = Tapped(model, taps)(x_BCHW)
        maps_BCHW = by_hand(model, x_BCHW)
    assert maps_BCHW.shape[1] > EARLY_CHANNELS
    torch.testing.assert_close(seen["early"], pooled(maps_BCHW[:, :EARLY_CHANNELS]), rtol=1e-4, atol=1e-5)


def test_early_features_of_networks_without_maps() -> None:
    vit = build("vit")
    x_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    taps = find_taps(vit, x_BCHW)
    kept: list[Tensor] = []
    vit.get_submodule(taps.early or "").register_forward_hook(lambda _m, _x, y: kept.append(y.clone()))
    with torch.inference_mode():
        early_BD = Tapped(vit, taps)(x_BCHW)["early"]
    (y_BTC,) = kept  # tokens
    torch.testing.assert_close(early_BD, torch.cat([y_BTC.max(1).values, y_BTC.mean(1)], 1))

    mlp = nn.Sequential(nn.Flatten(), nn.Linear(16, 80), nn.ReLU(inplace=True), nn.Linear(80, 3)).eval()
    x_BCHW = torch.randn(2, 1, 4, 4)
    with torch.inference_mode():
        early_BD = Tapped(mlp, find_taps(mlp, x_BCHW))(x_BCHW)["early"]
        torch.testing.assert_close(early_BD, mlp[:2](x_BCHW)[:, :EARLY_CHANNELS])
    assert early_BD.min() < 0  # not overwritten by the ReLU

    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    assert find_taps(linear, x_BCHW) == Taps("1", None, None)
    with torch.inference_mode():
        assert "early" not in Tapped(linear, find_taps(linear, x_BCHW))(x_BCHW)


@pytest.mark.parametrize("convs_per_block", [1, 2])
def test_the_pooled_maps_are_taken_before_the_in_place_relu_overwrites_them(convs_per_block: int) -> None:
    torch.manual_seed(0)
    model = ConvNet(ConvNetConfig(widths=(4, 6), convs_per_block=convs_per_block), 3, 1).eval()
    with torch.inference_mode():
        last = list(model.features)[-2]
        nn.init.normal_(last.weight)  # type: ignore[arg-type]
        nn.init.normal_(last.bias)  # type: ignore[arg-type]
        x_BCHW = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        taps = find_taps(model, x_BCHW)
        assert taps == Taps("head", f"features.norm1_{convs_per_block - 1}", f"features.norm0_{convs_per_block - 1}")
        seen = Tapped(model, taps)(x_BCHW)
        maps_BCHW = model.features[:-1](x_BCHW)
        assert (maps_BCHW < 0).any()
        torch.testing.assert_close(seen["pooled"], pooled(maps_BCHW))
        torch.testing.assert_close(seen["penultimate"], maps_BCHW.relu().mean((2, 3)))
        assert seen["pooled"].min() < 0


def test_our_resnet() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(widths=(4, 6)), 3, 3).eval()
    x_BCHW = torch.randn(2, 3, 8, 8)
    taps = find_taps(model, x_BCHW)
    assert taps == Taps("head", "blocks.1.norm2", "blocks.0.norm1")
    with torch.inference_mode():
        seen = Tapped(model, taps)(x_BCHW)
        torch.testing.assert_close(seen["penultimate"], model.blocks(model.stem(x_BCHW)).mean((2, 3)))


def test_a_linear_on_maps_with_channels_last_makes_no_feature_maps() -> None:
    x_BCHW = torch.randn(2, 3, 32, 32)
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=7)
    assert find_taps(swin, x_BCHW) == Taps("head", None, "features.1.0.mlp.3")
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    taps = find_taps(torchvision.models.ConvNeXt(blocks, num_classes=7), x_BCHW)
    assert taps == Taps("classifier.2", "features.3.0.block.0", "features.1.0.block.0")  # the last convolution


def test_tapping_leaves_no_hook_and_does_not_change_the_model() -> None:
    model = ConvNet(ConvNetConfig(widths=(4,)), 3, 1).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x_BCHW = torch.randn(2, 1, 8, 8)
    tapped = Tapped(model, find_taps(model, x_BCHW))
    with torch.inference_mode():
        tapped(x_BCHW)
        with pytest.raises(RuntimeError):
            tapped(torch.randn(2, 5, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_named_head_is_taken_and_a_wrong_one_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x_BCHW = torch.randn(2, 1, 4, 4)
    assert find_taps(model, x_BCHW) == Taps("3", None, "1")
    taps = find_taps(model, x_BCHW, "1")
    with torch.inference_mode():
        torch.testing.assert_close(Tapped(model, taps)(x_BCHW)["penultimate"], x_BCHW.flatten(1))
    for name in ("2", "head", ""):
        with pytest.raises(ConfigError, match="it has 1, 3"):
            find_taps(model, x_BCHW, name)


def test_a_model_without_a_linear_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no Linear"):
        find_taps(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), torch.randn(2, 1, 4, 4))
