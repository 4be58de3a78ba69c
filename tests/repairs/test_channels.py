"""Channels of networks, the effect of pruning, and the criteria that find a planted channel."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.models.architectures import Architecture
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.resnet import ResNetConfig
from sanitize.models.torchvision import TorchvisionConfig
from sanitize.models.trace import last_linear, trace
from sanitize.repairs.channels import find_channels, prune, prune_in_order, scaled_by, spatial_max
from sanitize.repairs.clp import CLPConfig, lipschitz_bounds
from sanitize.repairs.ep import EPConfig, Histogram
from sanitize.repairs.inputs import RepairInputs, held_out_accuracy, in_memory, split_clean
from sanitize.repairs.sites import Site, watching

CPU = Compute(device="cpu")
NETWORKS: list[Any] = [  # architecture, size of images, layers, those with a norm
    (ConvNetConfig(widths=(8, 16)), 8, 2, 2),
    (ResNetConfig(widths=(8, 16)), 8, 6, 5),
    (MLPConfig(widths=(16, 8)), 8, 2, 0),
    (TorchvisionConfig(name="resnet18"), 32, 20, 20),
    pytest.param(TorchvisionConfig(name="vgg11_bn"), 32, 10, 8, marks=pytest.mark.slow),  # 129 million weights
]


def network(architecture: Architecture, size: int) -> tuple[nn.Module, ModelConfig]:
    """Random weights, and BatchNorms with random statistics and weights."""
    torch.manual_seed(0)
    config = ModelConfig(architecture=architecture, n_classes=10, image_shape=(3, size, size))
    model = config.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval(), config


@pytest.mark.parametrize(
    ("architecture", "size", "n", "n_normed"), NETWORKS, ids=lambda v: getattr(v, "name", getattr(v, "kind", ""))
)
def test_a_pruned_channel_is_constant_and_the_others_are_as_they_were(
    architecture: Architecture, size: int, n: int, n_normed: int
) -> None:
    model, config = network(architecture, size)
    sites = find_channels(model, config.example())
    assert (len(sites), sum(site.norm is not None for site in sites)) == (n, n_normed)
    site = sites[len(sites) // 2]
    x_BCHW = torch.randn(3, 3, size, size)

    def output() -> Tensor:
        seen: list[Tensor] = []
        with torch.inference_mode(), watching(model, [site], lambda _site, y_BCX: seen.append(y_BCX.clone())):
            model(x_BCHW)
        return seen[0]

    before = output()
    assert before.shape[1] == site.n_features
    chosen_C = torch.zeros(site.n_features, dtype=torch.bool)
    chosen_C[[1, 4]] = True
    bias: Any = model.get_submodule(scaled_by(model, site)).bias
    wanted = bias[chosen_C].detach().clone()
    for keep_bias in (True, False):
        prune(model, site, chosen_C, keep_bias)
        after = output()
        assert torch.equal(after[:, ~chosen_C], before[:, ~chosen_C])
        constant = (wanted if keep_bias else 0 * wanted).view(1, 2, *[1] * (after.dim() - 2))
        assert torch.equal(after[:, chosen_C], constant.expand_as(after[:, chosen_C]))


class PreActivation(nn.Module):
    """A pre-activation residual network of constant width: all norms but `norms2` normalise a sum."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms1, self.norms2 = (nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2)) for _ in range(2))
        self.convs1, self.convs2 = (
            nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2)) for _ in range(2)
        )
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(x_BCHW)
        for norm1, conv1, norm2, conv2 in zip(self.norms1, self.convs1, self.norms2, self.convs2, strict=True):
            y_BCHW = conv2(norm2(conv1(norm1(x_BCHW).relu())).relu())
            if self.in_place:
                y_BCHW += x_BCHW
                x_BCHW = y_BCHW
            else:
                x_BCHW = x_BCHW + y_BCHW
        return self.head(self.norm(x_BCHW).relu().mean((2, 3)))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_norm_of_a_sum_belongs_to_no_layer(in_place: bool) -> None:
    torch.manual_seed(0)
    model, x_BCHW = PreActivation(in_place).eval(), torch.randn(2, 3, 8, 8)
    sites = find_channels(model, torch.zeros(2, 3, 8, 8))
    assert [(site.linear, site.norm) for site in sites] == [
        ("stem", None),
        ("convs1.0", "norms2.0"),
        ("convs2.0", None),
        ("convs1.1", "norms2.1"),
        ("convs2.1", None),
    ]
    calls = {call.name: call.x.clone() for call in trace(model, x_BCHW)}
    prune(model, sites[2], torch.tensor([3]), keep_bias=False)
    pruned = {call.name: call.x.clone() for call in trace(model, x_BCHW)}
    assert torch.equal(pruned["norms1.1"][:, 3], pruned["norms1.0"][:, 3]), "the shortcut alone is left"
    assert not torch.equal(calls["norms1.1"][:, 3], calls["norms1.0"][:, 3])


def test_spatial_maxima() -> None:
    y_BCHW = torch.randn(2, 3, 4, 5)
    assert torch.equal(spatial_max(y_BCHW), y_BCHW.amax((2, 3)))
    assert torch.equal(spatial_max(y_BCHW[..., 0, 0]), y_BCHW[..., 0, 0])


# --- CLP --------------------------------------------------------------------------------------------------------


def test_lipschitz_bounds_are_those_of_the_definition() -> None:
    model, config = network(ResNetConfig(widths=(8, 16)), 8)
    for site in find_channels(model, config.example()):
        if site.norm is None:
            continue
        linear, norm = model.get_submodule(site.linear), model.get_submodule(site.norm)
        for channel, bound in enumerate(lipschitz_bounds(model, site)):
            kernel = linear.weight[channel].flatten(1)  # type: ignore[union-attr,index]
            gain = norm.weight[channel] / (norm.running_var[channel] + norm.eps).sqrt()  # type: ignore[index,operator]
            assert float(bound) == pytest.approx(float(torch.linalg.svdvals(kernel * gain)[0].detach()), rel=1e-5)


@pytest.mark.parametrize("where", ["kernel", "norm"])
def test_clp_prunes_the_one_channel_that_is_too_sensitive(where: str) -> None:
    model, config = network(ConvNetConfig(widths=(32, 64)), 8)
    linear: Any = model.get_submodule("features.conv1_0" if where == "kernel" else "features.norm1_0")
    with torch.no_grad():
        linear.weight[7] *= -12
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = CLPConfig().build()(model, RepairInputs(config), CPU)
    assert found.done == {"pruned": {"features.norm0_0": 0, "features.norm1_0": 1}}
    norm: Any = found.model.get_submodule("features.norm1_0")
    assert norm.weight[7] == norm.bias[7] == 0
    assert norm.weight.count_nonzero() == 63
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_clp_leaves_a_network_of_equal_channels_alone() -> None:
    model, config = network(ConvNetConfig(widths=(32, 64)), 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.ones_(module.running_var)  # type: ignore[arg-type]
    assert CLPConfig().build()(model, RepairInputs(config), CPU).done["pruned"] == {
        "features.norm0_0": 0,
        "features.norm1_0": 0,
    }


# --- EP ---------------------------------------------------------------------------------------------------------


def histogram(y_NC: Tensor, batch: int) -> Histogram:
    y_NC = y_NC.double()
    counted = Histogram(y_NC.mean(0), y_NC.std(0, correction=0), 0.1)
    for y_BC in y_NC.split(batch):
        counted.add(y_BC)
    return counted


def test_entropy_is_that_of_the_distribution_whatever_its_scale_and_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    gauss_N, uniform_N = torch.randn(200_000, generator=generator), torch.rand(200_000, generator=generator)
    y_NC = torch.stack([gauss_N, 1e-3 * gauss_N - 40, uniform_N], 1)
    entropy_C = histogram(y_NC, 7_001).entropy()
    gauss = 0.5 * math.log(2 * math.pi * math.e) - math.log(0.1)
    assert entropy_C.tolist() == pytest.approx([gauss, gauss, math.log(12**0.5) - math.log(0.1)], abs=0.03)
    assert torch.equal(entropy_C, histogram(y_NC.flip(0), 100).entropy())


def test_a_small_second_mode_far_off_lowers_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    plain_N = torch.randn(20_000, generator=generator)
    y_NC = torch.stack([plain_N, torch.where(torch.arange(20_000) < 1_000, plain_N + 30, plain_N)], 1)
    entropy_C = histogram(y_NC, 500).entropy()
    assert entropy_C[1] < entropy_C[0] - 1


def test_a_channel_that_never_changes_has_no_entropy() -> None:
    assert histogram(torch.full((100, 1), 3.7), 10).entropy().tolist() == [0]


def test_ep_prunes_the_one_neuron_that_waits_for_the_trigger() -> None:
    model, config = network(MLPConfig(widths=(32,)), 8)
    images_NCHW = torch.randint(0, 200, (1000, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images_NCHW[:50, :, :2, :2] = 255
    first: Any = next(module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        first.weight[5] = torch.zeros(3, 8, 8).index_fill(1, torch.tensor([0, 1]), 3.0).flatten()
    labels_N = torch.zeros(1000, dtype=torch.int64)

    found, again = (
        EPConfig().build()(model, RepairInputs(config, in_memory(images_NCHW, labels_N, batch_size=size)), CPU)
        for size in (1000, 64)
    )
    assert sum(found.done["pruned"].values()) == 1
    pruned: Any = next(module for module in found.model.modules() if isinstance(module, nn.Linear))
    assert pruned.weight.abs().sum(1).argmin() == 5
    assert torch.equal(pruned.bias, first.bias)
    assert again.done == found.done


# --- pruning in order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_bias", [False, True])
def test_pruning_in_order_is_pruning_copies_until_one_is_too_bad(keep_bias: bool) -> None:
    model, config = network(ResNetConfig(widths=(8, 16)), 8)
    generator = torch.Generator().manual_seed(3)
    images_NCHW = torch.randint(0, 256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        head: Any = model.get_submodule(str(last_linear(trace(model, config.example()))))
        head.bias -= model(config.normalise(images_NCHW)).mean(0)  # predictions of all classes
        labels_N = model(config.normalise(images_NCHW)).argmax(1)
    inputs = RepairInputs(config, clean=split_clean(images_NCHW, labels_N, 0.5, generator))
    sites = find_channels(model, config.example())
    order = [(site, channel) for channel in range(8) for site in reversed(sites)]

    kept: list[tuple[Site, int]] = []
    wanted = copy.deepcopy(model)
    for site, channel in order:
        trial = copy.deepcopy(wanted)
        prune(trial, site, torch.tensor([channel]), keep_bias)
        if held_out_accuracy(trial, inputs, CPU) < 0.5:
            break
        wanted, kept = trial, [*kept, (site, channel)]
    assert 0 < len(kept) < len(order)

    pruned = prune_in_order(model, order, 0.5, keep_bias, inputs, CPU)
    assert pruned == {site.name: [c for other, c in kept if other is site] for site in sites}
    assert all(map(torch.equal, model.state_dict().values(), wanted.state_dict().values()))
