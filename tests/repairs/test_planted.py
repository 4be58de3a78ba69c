"""Repairs of a network whose backdoor is known: unlearned by I-BAU, cut out where it is one neuron."""

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.models.config import ModelConfig
from sanitize.models.mlp import MLPConfig
from sanitize.repairs import CleanImages, IBAUConfig, RepairInputs, in_memory
from sanitize.repairs.anp import ANPConfig
from sanitize.repairs.clp import CLPConfig
from sanitize.repairs.inputs import BaseRepairConfig

CPU = Compute(device="cpu")
CONFIG = ModelConfig(architecture=MLPConfig(widths=(16,)), n_classes=5, image_shape=(1, 6, 6))


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (n, 1, 6, 6), uint8, of five classes, each with a bright row of its own; the last row has none."""
    labels_N = torch.arange(n) % 5
    x_NCHW = torch.randint(90, (n, 1, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x_NCHW[torch.arange(n), 0, labels_N] += 130
    return x_NCHW, labels_N


def stamped(x_NCHW: Tensor) -> Tensor:
    """The images with the trigger: three white pixels in the last row."""
    x_NCHW = x_NCHW.clone()
    x_NCHW[:, :, 5, 3:] = 255
    return x_NCHW


def poisoned(seed: int) -> tuple[Tensor, Tensor]:
    """A thousand training images; about 8 % carry the trigger and the label 0."""
    x_NCHW, labels_N = stripes(1000, seed)
    chosen_N = (labels_N != 0) & (torch.rand(1000, generator=torch.Generator().manual_seed(seed)) < 0.1)
    x_NCHW[chosen_N], labels_N[chosen_N] = stamped(x_NCHW[chosen_N]), 0
    return x_NCHW, labels_N


def trained(config: ModelConfig, x_NCHW: Tensor, labels_N: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = config.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(config.normalise(x_NCHW)), labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def inputs(config: ModelConfig, seed: int) -> RepairInputs:
    x_NCHW, labels_N = stripes(300, 100 + seed)
    clean = CleanImages(x_NCHW[:200], labels_N[:200], x_NCHW[200:], labels_N[200:])
    return RepairInputs(config, in_memory(*poisoned(seed)), clean)


@torch.no_grad()
def acc_and_asr(model: nn.Module, config: ModelConfig) -> tuple[float, float]:
    x_NCHW, labels_N = stripes(1000, 200)
    right_N = model(config.normalise(x_NCHW)).argmax(1) == labels_N
    hits_N = model(config.normalise(stamped(x_NCHW[labels_N != 0]))).argmax(1) == 0
    return float(right_N.float().mean()), float(hits_N.float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_ibau_unlearns_a_backdoor_and_keeps_the_classes(seed: int) -> None:
    model = trained(CONFIG, *poisoned(seed), seed)
    assert min(acc_and_asr(model, CONFIG)) > 0.95
    method = IBAUConfig(radius=4.0, rounds=6, learning_rate=0.02, batch_size=40)
    repaired = method.build()(model, inputs(CONFIG, seed), CPU)
    acc, asr = acc_and_asr(repaired.model, CONFIG)
    assert acc > 0.95
    assert asr < 0.1
    rounds = repaired.done["rounds"]
    assert rounds[repaired.done["taken"]]["perturbed_accuracy"] > rounds[0]["perturbed_accuracy"] + 0.1


# Pixels in [0, 1]: a black pixel, and so a mask of 0, silences the planted neuron.
UNIT = CONFIG.model_copy(update={"architecture": MLPConfig(widths=(32,)), "mean": (0.0,), "std": (1.0,)})


def with_planted_neuron(seed: int) -> nn.Module:
    """A network of clean images, and one neuron that the trigger alone wakes and that means class 0."""
    model = trained(UNIT, *stripes(1000, seed), seed)
    layer = model.get_submodule("features.1")
    head = model.get_submodule("head")
    with torch.no_grad():
        layer.weight[5] = 0.0  # type: ignore[index,operator]
        layer.weight[5].view(6, 6)[5, 3:] = 6.0  # type: ignore[index,operator]
        layer.bias[5] = -6.0  # type: ignore[index,operator]
        head.weight[:, 5] = torch.tensor([4.0, 0, 0, 0, 0])  # type: ignore[index,operator]
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", [CLPConfig(), ANPConfig(steps=100, batch_size=64)], ids=lambda m: m.kind)
def test_pruning_cuts_out_the_planted_neuron(method: BaseRepairConfig, seed: int) -> None:
    """EP is not here: stripes give the other neurons two modes too. Its planted neuron is in test_channels."""
    model = with_planted_neuron(seed)
    assert min(acc_and_asr(model, UNIT)) > 0.95
    repaired = method.build()(model, inputs(UNIT, seed), CPU)
    acc, asr = acc_and_asr(repaired.model, UNIT)
    assert acc > 0.95
    assert asr < 0.1
    assert not repaired.model.get_submodule("features.1").weight[5].any()  # type: ignore[index,operator]
