"""Norms in closed form against one backward pass per sample."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.errors import ConfigError
from sanitize.models.convnet import ConvNet, ConvNetConfig
from sanitize.models.group_norm import without_batch_norm
from sanitize.models.resnet import ResNet, ResNetConfig
from sanitize.training.losses import Loss, loss_gradient_norms, sample_losses
from sanitize.training.per_sample import recorded

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 7), nn.Tanh(), nn.Linear(7, 4, bias=False)),
    "linear on a sequence": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 5), nn.ReLU(), nn.Flatten()),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Flatten()),
    "conv, few positions": lambda: nn.Sequential(nn.Conv2d(3, 40, 5, dilation=1, bias=False), nn.Flatten()),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1), nn.Flatten()),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm((6, 6)), nn.Flatten(), nn.LayerNorm(108), nn.Linear(108, 4)),
    "convnet": lambda: without_batch_norm(ConvNet(ConvNetConfig(widths=(6, 12)), 4, 3), groups=3),
    "resnet": lambda: without_batch_norm(ResNet(ResNetConfig(widths=(4, 6)), 4, 3), groups=2),
}


def perturbed(network: nn.Module) -> nn.Module:
    """GroupNorm starts at gain 1 and shift 0, where mistakes hide."""
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network


def naive(network: nn.Module, x_B: Tensor, y_B: Tensor) -> Tensor:
    norms = []
    for i in range(len(x_B)):
        network.zero_grad()
        nn.functional.cross_entropy(network(x_B[i : i + 1]), y_B[i : i + 1]).backward()
        norms.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm())
    network.zero_grad()
    return torch.stack(norms)


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_are_those_of_one_backward_pass_per_sample(name: str) -> None:
    torch.manual_seed(0)
    network = perturbed(NETWORKS[name]())
    x_B, y_B = 3 * torch.randn(9, 3, 6, 6), torch.randint(2, (9,))
    wanted_B = naive(network, x_B, y_B)
    with recorded(network) as recording:
        losses_B = sample_losses(network(x_B), y_B, "cross_entropy")
    torch.testing.assert_close(recording.norms(losses_B), wanted_B, rtol=1e-5, atol=0)
    losses_B.mean().backward()  # the graph is still there for the second pass
    assert all(p.grad is not None for p in network.parameters())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_a_convolution_of_any_shape(
    kernel: int, channels: int, stride: int, padding: int, dilation: int, bias: bool
) -> None:
    torch.manual_seed(kernel)
    conv = nn.Conv2d(2, channels, kernel, stride, padding, dilation, bias=bias)
    network = nn.Sequential(conv, nn.Flatten(), nn.LogSoftmax(1))
    x_B, y_B = torch.randn(3, 2, 7, 7), torch.zeros(3, dtype=torch.int64)
    wanted_B = naive(network, x_B, y_B)
    with recorded(network) as recording:
        losses_B = sample_losses(network(x_B), y_B, "cross_entropy")
    torch.testing.assert_close(recording.norms(losses_B), wanted_B, rtol=1e-5, atol=1e-6)


def test_weights_that_are_not_trained_do_not_count() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.Linear(7, 4))
    network[1].requires_grad_(False)
    x_B, y_B = torch.randn(5, 3, 6, 6), torch.randint(4, (5,))
    wanted_B = naive(network, x_B, y_B)
    with recorded(network) as recording:
        losses_B = sample_losses(network(x_B), y_B, "cross_entropy")
    torch.testing.assert_close(recording.norms(losses_B), wanted_B, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.BatchNorm2d(3), "BatchNorm mixes the samples.*without_batch_norm"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=1"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding in numbers"),
        (nn.Embedding(4, 4), "Embedding are not supported"),
    ],
)
def test_what_has_no_formula_is_refused_with_the_reason(network: nn.Module, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason), recorded(nn.Sequential(network)):
        pass


def test_a_layer_that_runs_twice_is_refused_and_leaves_no_hook() -> None:
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(ConfigError, match="Linear runs twice"), recorded(network):
        network(torch.randn(2, 4))
    network(torch.randn(2, 4))


def test_batch_norm_is_replaced_everywhere_and_samples_no_longer_mix() -> None:
    torch.manual_seed(0)
    network = without_batch_norm(ResNet(ResNetConfig(widths=(4, 6), blocks_per_stage=2), 4, 3)).train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert any(isinstance(module, nn.GroupNorm) and module.num_groups == 6 for module in network.modules())
    x_B = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(network(x_B)[:2], network(x_B[:2]))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared", "huber"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_norm_at_the_loss_is_the_gradient_with_respect_to_the_output(loss: Loss, soft: bool) -> None:
    torch.manual_seed(0)
    outputs_BK = (3 * torch.randn(20, 5)).requires_grad_()
    targets_B = torch.randint(5, (20,))
    if loss != "cross_entropy":
        targets_B = torch.randn(20, 5)
    elif soft:
        targets_B = torch.rand(20, 5).softmax(1)
    losses_B = sample_losses(outputs_BK, targets_B, loss, huber_delta=0.7)
    assert losses_B.shape == (20,)
    (gradient_BK,) = torch.autograd.grad(losses_B.sum(), outputs_BK)
    found_B = loss_gradient_norms(outputs_BK, targets_B, loss, huber_delta=0.7)
    torch.testing.assert_close(found_B, gradient_BK.norm(dim=1), rtol=1e-5, atol=1e-6)


@given(st.integers(2, 10), st.integers(0, 10_000))
def test_the_loss_and_its_gradient_need_not_rank_alike(n_classes: int, seed: int) -> None:
    """With two classes they do; with more, the norm also asks how the rest of the probability is spread."""
    logits_BK = 2 * torch.randn(50, n_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y_B = torch.zeros(50, dtype=torch.int64)
    losses_B = sample_losses(logits_BK, y_B, "cross_entropy")
    norms_B = loss_gradient_norms(logits_BK, y_B, "cross_entropy")
    assert (norms_B**2 <= 2 * (1 - (-losses_B).exp()) ** 2 + 1e-9).all()
    assert torch.equal(losses_B.argsort(), norms_B.argsort()) == (n_classes == 2)


def test_a_larger_loss_may_have_a_smaller_gradient() -> None:
    p_BK = torch.tensor([[0.5, 0.5, 0.0], [0.45, 0.275, 0.275]])
    logits_BK, y_B = p_BK.clamp(min=1e-9).log(), torch.zeros(2, dtype=torch.int64)
    losses_B = sample_losses(logits_BK, y_B, "cross_entropy")
    norms_B = loss_gradient_norms(logits_BK, y_B, "cross_entropy")
    torch.testing.assert_close(norms_B, torch.tensor([0.5, 0.55**2 + 2 * 0.275**2]).sqrt())
    assert losses_B[1] > losses_B[0]
    assert norms_B[1] < norms_B[0]
