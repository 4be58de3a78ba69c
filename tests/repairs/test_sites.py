"""Folding is exact: the folded network equals the network with explicit projections, for every architecture."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models import VGG

from sanitize.models.architectures import Architecture
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.resnet import ResNetConfig
from sanitize.models.torchvision import TorchvisionConfig
from sanitize.repairs.sites import Projection, Site, channels_last, find_sites, fold, watching

NETWORKS: list[tuple[Architecture, int]] = [
    (ConvNetConfig(widths=(8, 16), convs_per_block=2), 16),
    (ResNetConfig(widths=(8, 16)), 16),
    (MLPConfig(widths=(16, 8)), 8),
    (TorchvisionConfig(name="resnet18"), 32),
    (TorchvisionConfig(name="vgg11_bn"), 32),
    (TorchvisionConfig(name="densenet121"), 32),
    (TorchvisionConfig(name="mobilenet_v3_small"), 64),
    (TorchvisionConfig(name="efficientnet_b0"), 64),
    (TorchvisionConfig(name="shufflenet_v2_x0_5"), 64),
    (TorchvisionConfig(name="squeezenet1_1"), 64),
    (TorchvisionConfig(name="swin_t"), 64),
    (TorchvisionConfig(name="vit_b_32"), 224),
]
named = lambda v: getattr(v, "name", getattr(v, "kind", ""))  # noqa: E731
SITES = {"resnet18": 21, "resnet50": 54, "vit_b_32": 2}


def network(architecture: Architecture, size: int) -> nn.Module:
    """Random weights, and BatchNorms with random statistics and weights; float64."""
    torch.manual_seed(0)
    model = ModelConfig(architecture=architecture, n_classes=10, image_shape=(3, size, size)).build()
    if isinstance(model, VGG):  # the same layers, on narrow features: half a gigabyte less
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        for layer, sizes in ((0, (512, 64)), (3, (64, 64)), (6, (64, 10))):
            model.classifier[layer] = nn.Linear(*sizes)
    model.double()
    unsettle(model)
    model.train()
    with torch.no_grad():
        model(torch.randn(64 if size < 32 else 4, 3, size, size, dtype=torch.float64))  # running statistics
    return model.eval()


def unsettle(model: nn.Module) -> None:
    """Give every BatchNorm a random weight and bias, and switch dropout off."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.Linear):  # torchvision starts some heads at zero
            nn.init.xavier_uniform_(module.weight)


def projection(n_features: int, oblique: bool, mean_D: Tensor | None = None) -> Projection:
    removed_Dk = torch.linalg.qr(torch.randn(n_features, 3, dtype=torch.float64)).Q
    read_Dk = removed_Dk
    if oblique:
        read_Dk = removed_Dk + 0.3 * torch.randn(n_features, 3, dtype=torch.float64)
        read_Dk = read_Dk @ torch.linalg.inv(removed_Dk.T @ read_Dk)
    mean_D = torch.randn(n_features).double() if mean_D is None else mean_D
    return Projection(removed_Dk, read_Dk, mean_D, torch.rand(n_features).double().diag())


def folded_and_explicit(model: nn.Module, sites: list[Site], x_BCHW: Tensor, oblique: bool) -> tuple[Tensor, Tensor]:
    """Outputs with a projection at every site: folded into the weights, and applied to the activations."""
    torch.manual_seed(1)
    projections = {site.name: projection(site.n_features, oblique) for site in sites}
    folded = copy.deepcopy(model)
    for site in sites:
        fold(folded, site, projections[site.name])
    with torch.inference_mode(), watching(model, sites, lambda site, y_B: projections[site.name](y_B)):
        explicit_BK = model(x_BCHW)
    with torch.inference_mode():
        return folded(x_BCHW), explicit_BK


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize(("architecture", "size"), NETWORKS[:4], ids=named)
def test_the_folded_network_is_the_network_with_explicit_projections(
    architecture: Architecture, size: int, oblique: bool
) -> None:
    _compare(architecture, size, oblique)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "size"), NETWORKS[4:], ids=named)
def test_no_site_of_a_torchvision_network_is_a_false_one(architecture: Architecture, size: int) -> None:
    _compare(architecture, size, oblique=True)


def _compare(architecture: Architecture, size: int, oblique: bool) -> None:
    model = network(architecture, size)
    x_BCHW = torch.randn(2, 3, size, size, dtype=torch.float64)
    sites = find_sites(model, x_BCHW)
    assert len(sites) == SITES.get(getattr(architecture, "name", ""), len(sites)) > 0
    folded_BK, explicit_BK = folded_and_explicit(model, sites, x_BCHW, oblique)
    with torch.inference_mode():
        before_BK = model(x_BCHW)
    scale = (explicit_BK - before_BK).abs().max()
    assert scale > 1e-3, "the projections change something"
    assert (folded_BK - explicit_BK).abs().max() < 1e-8 * scale


@pytest.mark.parametrize(("name", "n_sites"), [("resnet18", 21), pytest.param("resnet50", 54, marks=pytest.mark.slow)])
def test_all_of_a_residual_network_is_found_on_black_images(name: str, n_sites: int) -> None:
    """torchvision adds the shortcut in place, into the output of a block's last norm."""
    config = ModelConfig(architecture=TorchvisionConfig(name=name), n_classes=10, image_shape=(3, 32, 32))
    sites = find_sites(config.build(), config.example())
    assert len(sites) == n_sites
    assert sum(site.norm is not None for site in sites) == n_sites - 1


# --- networks at random ------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """A network of drawn steps on maps of 6 channels; some of them write into the tensors of others."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        made: list[nn.Module] = []
        for step in steps:
            if step.startswith("conv"):
                groups = 2 if step == "conv grouped" else 1
                made.append(nn.Conv2d(6, 6, 3, padding=1, bias=step == "conv bias", groups=groups))
            elif step == "again":
                made.append(next((layer for layer in reversed(made) if isinstance(layer, nn.Conv2d)), nn.Identity()))
            elif step == "tied":
                conv = nn.Conv2d(6, 6, 3, padding=1)
                conv.weight = next((layer.weight for layer in made if isinstance(layer, nn.Conv2d)), conv.weight)
                made.append(conv)
            else:
                layers = {"norm": nn.BatchNorm2d(6), "relu": nn.ReLU(), "relu_": nn.ReLU(inplace=True)}
                layers |= {"dropout_": nn.Dropout(inplace=True), "pool": nn.AvgPool2d(3, 1, 1)}
                made.append(layers.get(step, nn.Identity()))
        self.layers, self.head = nn.ModuleList(made), nn.Linear(6, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = kept = x_BCHW.repeat(1, 2, 1, 1)
        for step, layer in zip(self.steps, self.layers, strict=True):
            if step == "keep":
                kept = x_BCHW
            elif step == "add":
                x_BCHW = x_BCHW + kept
            elif step == "add_":
                x_BCHW += kept
            elif step == "add to kept_":
                kept += 0.5 * x_BCHW
            else:
                x_BCHW = layer(x_BCHW)
        return self.head(x_BCHW.mean((2, 3)))


STEPS = ["conv", "conv bias", "conv grouped", "again", "tied", "norm", "relu", "relu_", "dropout_", "pool"]
STEPS += ["keep", "add", "add_", "add to kept_"]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=12), st.booleans())
@example(
    ["conv", "relu_", "norm"], False
)  # the norm is given the same object as the convolution gave, with other values
@example(["conv bias", "keep", "norm", "add_"], False)
@example(["conv", "keep", "norm", "conv bias", "norm", "add_", "relu_"], True)
@example(["conv bias", "conv", "tied"], False)
def test_every_site_folds_whatever_is_written_in_place(steps: list[str], is_black: bool) -> None:
    torch.manual_seed(0)
    model = Drawn(steps).double().eval()
    unsettle(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    x_BCHW = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    sites = find_sites(model, torch.zeros_like(x_BCHW) if is_black else x_BCHW)
    assert sites[-1].name == "head"
    for some in (sites, *([site] for site in sites)):
        folded_BK, explicit_BK = folded_and_explicit(model, some, x_BCHW, oblique=True)
        torch.testing.assert_close(folded_BK, explicit_BK, atol=1e-9, rtol=1e-9)


def test_the_folded_network_gives_the_same_in_training_mode() -> None:
    """On the batch whose mean and variance are the ones it was folded with, BatchNorm's two modes agree."""
    model = network(ResNetConfig(widths=(8, 16)), 16)
    x_BCHW = torch.randn(32, 3, 16, 16, dtype=torch.float64)
    site = find_sites(model, x_BCHW)[0]
    seen: list[Tensor] = []
    with torch.no_grad(), watching(model, [site], lambda _site, y_B: seen.append(y_B)):
        model(x_BCHW)
    y_ND = channels_last(seen[0]).flatten(0, -2).double()
    there = projection(site.n_features, True, y_ND.mean(0))
    fold(model, site, there._replace(covariance_DD=y_ND.T.cov(correction=0)))
    outputs: list[Tensor] = []
    with torch.no_grad(), watching(model, [site], lambda _site, y_B: outputs.append(y_B)):
        model(x_BCHW)
        model.get_submodule(site.name).train()
        model(x_BCHW)
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_folded_is_no_site() -> None:
    model = network(ConvNetConfig(widths=(8, 16)), 16)
    assert [site.name for site in find_sites(model, torch.randn(2, 3, 16, 16).double())] == [
        "features.norm1_0",
        "head",
    ], "a pool lies between the first convolution and its norm"


class PreActivation(nn.Module):
    """The first convolution is read by its norm and, past it, by the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(x_BCHW)
        y_BCHW = self.norm2(self.conv(self.norm(x_BCHW).relu()))
        return self.head((x_BCHW + y_BCHW).relu().mean((2, 3)))


def test_a_convolution_that_is_read_past_its_norm_is_no_site() -> None:
    assert [site.name for site in find_sites(PreActivation(), torch.randn(2, 3, 8, 8))] == ["norm2", "head"]


def test_a_weight_that_is_computed_is_no_site() -> None:
    """A weight written by `fold` would be lost: it is computed again for every forward pass."""
    model = network(MLPConfig(widths=(16, 8)), 8)
    names = [site.name for site in find_sites(model, torch.randn(2, 3, 8, 8).double())]
    parametrize.register_parametrization(model.get_submodule(names[-1]), "weight", nn.Identity())
    assert [site.name for site in find_sites(model, torch.randn(2, 3, 8, 8).double())] == names[:-1]
