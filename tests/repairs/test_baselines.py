"""The baselines on digits with a patch: their effect on a backdoored and on a clean network."""

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import sklearn.datasets
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sanitize.attack import BadNetsConfig
from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.loop import OptimConfig, predict, train
from sanitize.measure import accuracy, attack_success_rate
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.repairs.anp import ANPConfig, scaled_parameters
from sanitize.repairs.channels import find_channels
from sanitize.repairs.clp import CLPConfig
from sanitize.repairs.ep import EPConfig
from sanitize.repairs.fine_pruning import FinePruningConfig
from sanitize.repairs.fine_tuning import FineTuningConfig
from sanitize.repairs.inputs import BaseRepairConfig, Repaired, RepairInputs, in_memory, split_clean
from sanitize.repairs.nad import NADConfig, attention, last_of_each_resolution
from sanitize.repairs.neural_cleanse import FoundTrigger, NeuralCleanseConfig, anomaly_index, invert

CPU = Compute(device="cpu")
TRIGGER = BadNetsConfig(rate=0.1, target=2, size=2, pattern="white")
CONFIG = ModelConfig(architecture=ConvNetConfig(widths=(16, 32)), n_classes=10, image_shape=(1, 8, 8))
TUNE = OptimConfig(optimizer="sgd", learning_rate=0.05, schedule="constant", epochs=10, batch_size=32)
GENTLE = TUNE.model_copy(update={"learning_rate": 0.02})
METHODS: dict[str, BaseRepairConfig] = {
    "fine-tuning": FineTuningConfig(optim=TUNE),
    "fine-pruning": FinePruningConfig(optim=TUNE),
    "clp": CLPConfig(),
    "ep": EPConfig(),
    "anp": ANPConfig(steps=100, batch_size=64),
    "nad": NADConfig(beta=300, teacher=GENTLE, optim=GENTLE),
    "neural cleanse": NeuralCleanseConfig(steps=120, batch_size=32, optim=TUNE),
}
# Largest share of the attack success rate that is left. The three methods that prune by a rule alone do not weaken the
# backdoor in layers of 16 and 32 channels: channels at 3 deviations, or with a mask near 0, are not the backdoor there.
# They prune planted channels in test_planted and test_channels.
LEFT = {"fine-tuning": 0.8, "fine-pruning": 0.7, "nad": 0.8, "neural cleanse": 0.4}
every_method = pytest.mark.parametrize("name", METHODS)


class Case(NamedTuple):
    """A network, the inputs of its repair, and test data."""

    model: nn.Module
    inputs: RepairInputs
    test_NCHW: Tensor
    labels_N: Tensor

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """ACC and ASR."""
        triggered_NCHW, wanted_N = TRIGGER.apply(self.test_NCHW), torch.full_like(self.labels_N, 2)
        clean_NK, triggered_NK = (
            predict(model, x_NCHW, CONFIG.normalise, CPU) for x_NCHW in (self.test_NCHW, triggered_NCHW)
        )
        return accuracy(clean_NK, self.labels_N), attack_success_rate(triggered_NK, self.labels_N, wanted_N)


def make(n_poisoned: int) -> Case:
    digits = sklearn.datasets.load_digits()
    order_N = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images_N1HW = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)[order_N, None]
    labels_N = torch.from_numpy(digits.target)[order_N].long()
    clean = split_clean(images_N1HW[1000:1250], labels_N[1000:1250], 0.3, torch.Generator().manual_seed(0))
    x_NCHW, y_N = images_N1HW[:1000].clone(), labels_N[:1000].clone()
    poisoned = (y_N != 2).nonzero()[:n_poisoned, 0]
    x_NCHW[poisoned], y_N[poisoned] = TRIGGER.apply(x_NCHW[poisoned]), 2

    CPU.activate()
    CPU.seed_global("test", "baselines")
    model = CONFIG.build()
    data = Resident(x_NCHW, y_N, 50, lambda epoch: CPU.generator("test", epoch))
    train(model, data.epoch, data.steps_per_epoch, OptimConfig(epochs=20, batch_size=50), CPU, CONFIG.normalise)
    return Case(model.eval(), RepairInputs(CONFIG, in_memory(x_NCHW, y_N), clean), images_N1HW[1250:], labels_N[1250:])


@pytest.fixture(scope="module")
def backdoored() -> Case:
    case = make(100)
    before = case.measure(case.model)
    assert before[0] > 0.9
    assert before[1] > 0.9
    return case


@pytest.fixture(scope="module")
def repaired(backdoored: Case) -> Callable[[str], Repaired]:
    """Result of a method on the backdoored network, computed once."""
    return cache(lambda name: METHODS[name].build()(backdoored.model, backdoored.inputs, CPU))


@pytest.fixture(scope="module")
def honest() -> Case:
    return make(0)


@every_method
def test_a_repair_leaves_its_model_alone_and_keeps_the_accuracy(
    backdoored: Case, repaired: Callable[[str], Repaired], name: str
) -> None:
    model = backdoored.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = repaired(name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module.training for module in found.model.modules())
    assert json.loads(json.dumps(found.done)) == found.done
    assert backdoored.measure(found.model)[0] > backdoored.measure(model)[0] - 0.08


@pytest.mark.parametrize("name", LEFT)
def test_a_repair_weakens_the_backdoor(backdoored: Case, repaired: Callable[[str], Repaired], name: str) -> None:
    assert backdoored.measure(repaired(name).model)[1] <= LEFT[name] * backdoored.measure(backdoored.model)[1]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "neural cleanse"])
def test_the_same_again_gives_the_same_network(
    backdoored: Case, repaired: Callable[[str], Repaired], name: str
) -> None:
    again = METHODS[name].build()(backdoored.model, backdoored.inputs, CPU)
    assert again.done == repaired(name).done
    wanted = repaired(name).model.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in again.model.state_dict().items())


@every_method
def test_a_network_without_a_backdoor_stays_about_as_good(honest: Case, name: str) -> None:
    found = METHODS[name].build()(honest.model, honest.inputs, CPU)
    acc, acc_before = (honest.measure(network)[0] for network in (found.model, honest.model))
    print(f"{name}: ACC {acc_before:.3f} -> {acc:.3f}, {found.done}")
    # EP: one channel of 16 is a sixteenth of the layer. NAD: so strong a pull to the teacher costs some of the network.
    assert acc > acc_before - {"ep": 0.15, "nad": 0.2}.get(name, 0.05)


# --- parts ------------------------------------------------------------------------------------------------------


def test_channels_pruned_by_fine_pruning_stay_pruned(repaired: Callable[[str], Repaired]) -> None:
    found = repaired("fine-pruning")
    n_pruned = found.done["pruned"]["features.norm1_0"]
    assert n_pruned > 0
    norm = found.model.get_submodule("features.norm1_0")
    is_zero_C = (norm.weight == 0) & (norm.bias == 0)
    assert is_zero_C.sum() == n_pruned


def test_without_weight_on_attention_distillation_is_fine_tuning(backdoored: Case) -> None:
    nad, tuning = (
        method.build()(backdoored.model, backdoored.inputs, CPU).model.state_dict()
        for method in (NADConfig(beta=0, teacher=TUNE, optim=TUNE), FineTuningConfig(optim=TUNE))
    )
    for name, tensor in tuning.items():
        torch.testing.assert_close(nad[name], tensor, atol=1e-4, rtol=1e-3)


def test_attention_maps_have_length_one_and_ignore_scale_and_order_of_channels() -> None:
    y_BCHW = torch.randn(5, 4, 3, 3)
    map_BN = attention(y_BCHW)
    assert map_BN.shape == (5, 9)
    torch.testing.assert_close(map_BN.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(attention(7 * y_BCHW.flip(1)), map_BN)
    by_hand = y_BCHW[0].clamp(min=0).pow(2).sum(0)
    torch.testing.assert_close(map_BN[0].view(3, 3), by_hand / by_hand.norm())


def test_maps_are_taken_once_at_each_resolution(backdoored: Case) -> None:
    names = [site.name for site in find_channels(backdoored.model, CONFIG.example())]
    assert [site.name for site in last_of_each_resolution(backdoored.model, CONFIG)] == [names[-1]]
    deeper = CONFIG.model_copy(update={"architecture": ConvNetConfig(widths=(4, 4, 8), convs_per_block=2)})
    found = last_of_each_resolution(deeper.build(), deeper)
    assert [site.name for site in found] == ["features.norm0_0", "features.norm1_0", "features.norm2_1"]


def test_factors_of_channels_are_those_of_a_network_whose_parameters_are_multiplied(backdoored: Case) -> None:
    sites = find_channels(backdoored.model, CONFIG.example())
    factors = [[torch.rand(site.n_features) for site in sites] for _ in range(2)]
    scaled = copy.deepcopy(backdoored.model)
    with torch.no_grad():
        for site, weight_C, bias_C in zip(sites, *factors, strict=True):
            norm = scaled.get_submodule(site.name)
            norm.weight *= weight_C
            norm.bias *= bias_C
        x_BCHW = CONFIG.normalise(backdoored.test_NCHW[:20])
        parameters = scaled_parameters(backdoored.model, sites, *map(tuple, factors))
        torch.testing.assert_close(functional_call(backdoored.model, parameters, (x_BCHW,)), scaled(x_BCHW))


def test_neural_cleanse_finds_the_target_class_and_a_small_trigger(
    backdoored: Case, repaired: Callable[[str], Repaired]
) -> None:
    method = METHODS["neural cleanse"]
    assert isinstance(method, NeuralCleanseConfig)
    done = repaired("neural cleanse").done
    assert done["suspicious"] == [2]
    assert done["sizes"][2] == min(done["sizes"])
    trigger = invert(method, backdoored.model, 2, backdoored.inputs, CPU)
    assert trigger.size == done["sizes"][2]
    stamped_NCHW = (255 * trigger.stamp(backdoored.test_NCHW / 255)).round().to(torch.uint8)
    assert predict(backdoored.model, stamped_NCHW, CONFIG.normalise, CPU).argmax(1).eq(2).float().mean() > 0.9


def test_a_stamp_is_a_mixture() -> None:
    x_BCHW = torch.rand(2, 3, 4, 4)
    trigger = FoundTrigger(torch.rand(4, 4), torch.rand(3, 4, 4))
    stamped = trigger.stamp(x_BCHW)
    i, j = 1, 2
    m = trigger.mask_HW[i, j]
    torch.testing.assert_close(stamped[1, :, i, j], x_BCHW[1, :, i, j] * (1 - m) + trigger.pattern_CHW[:, i, j] * m)


def test_the_anomaly_index_is_that_of_the_paper() -> None:
    sizes_K = torch.tensor([10.0, 11, 12, 13, 2], dtype=torch.float64)  # median 11, deviations 1 0 1 2 9, median 1
    assert anomaly_index(sizes_K).tolist() == pytest.approx([x / 1.4826 for x in (1, 0, -1, -2, 9)])
    assert anomaly_index(torch.ones(4, dtype=torch.float64)).tolist() == [0, 0, 0, 0]
