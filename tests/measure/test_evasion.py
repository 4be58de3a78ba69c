"""Projected gradient descent against a linear classifier, where the worst image is known, and its exact budgets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.measure import EvasionConfig, evade, smallest_perturbation

NORMS = ("l2", "linf")
CPU = Compute(device="cpu")


def linear(n_pixels: int = 12, scale: float = 1.0) -> nn.Module:
    """Two classes, divided by a plane through the grey image."""
    torch.manual_seed(0)
    w_D = torch.randn(n_pixels) * scale
    model = nn.Sequential(nn.Flatten(), nn.Linear(n_pixels, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-w_D, w_D]))
        model[1].bias.copy_(torch.stack([w_D.sum(), -w_D.sum()]) / 2)
    return model


def at_distance(model: nn.Module, distance_N: Tensor, norm: str) -> Tensor:
    """Images (N, 3, 2, 2) so far from the plane: in l2 along w, in l_inf along its signs, which is the shortest way."""
    w_D = model[1].weight[1].detach()
    way_D = w_D / w_D.norm() if norm == "l2" else w_D.sign()
    return (0.5 + distance_N[:, None] * way_D).view(-1, 3, 2, 2)


def wrong(model: nn.Module, images_NX: Tensor, labels_N: Tensor) -> Tensor:
    return model(images_NX).argmax(1) != labels_N


def lengths(d_NX: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(d_NX.double().flatten(1), ord=2 if norm == "l2" else torch.inf, dim=1)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_classifier_falls_exactly_within_its_distance(norm: str, random_start: bool, loss: str) -> None:
    model, distance_N = linear(), torch.linspace(-0.09, 0.09, 46)
    images_NX, labels_N = at_distance(model, distance_N, norm), (distance_N > 0).long()
    assert not wrong(model, images_NX, labels_N).any()
    config = EvasionConfig(norm=norm, radius=0.05, random_start=random_start, loss=loss)
    found_NX = evade(model, images_NX, labels_N, config, CPU)
    falls_N = wrong(model, found_NX, labels_N)
    assert falls_N[distance_N.abs() < 0.05 * 0.998].all()
    assert not falls_N[distance_N.abs() >= 0.05].any()


@given(
    norm=st.sampled_from(NORMS),
    radius=st.floats(0, 2),
    seed=st.integers(0, 2**31),
    n_pixels=st.sampled_from([1, 12, 784]),
    random_start=st.booleans(),
    step_size=st.sampled_from([None, 1e-3, 100.0]),
)
def test_neither_the_radius_nor_the_box_is_left(
    norm: str, radius: float, seed: int, n_pixels: int, random_start: bool, step_size: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Many pixels on the borders of the box, where sums round most coarsely and clipping cuts.
    images_NX = (torch.rand(5, 1, 1, n_pixels, generator=generator) * 1.5 - 0.25).clamp(0, 1)
    labels_N = torch.randint(0, 2, (5,), generator=generator)
    config = EvasionConfig(norm=norm, radius=radius, steps=3, random_start=random_start, step_size=step_size)
    found_NX = evade(linear(n_pixels), images_NX, labels_N, config, CPU)
    assert found_NX.dtype == torch.float32
    assert (lengths(found_NX.double() - images_NX.double(), norm) <= radius).all()
    assert ((found_NX >= 0) & (found_NX <= 1)).all()


def test_the_radius_is_used_up() -> None:
    images_NX = torch.full((4, 3, 2, 2), 0.5)
    for norm in NORMS:
        config = EvasionConfig(norm=norm, radius=0.03)
        found_NX = evade(linear(), images_NX, torch.tensor([0, 1, 0, 1]), config, CPU)
        used_N = lengths(found_NX - images_NX, norm)
        assert (used_N > 0.03 * 0.999).all()


def test_one_step_without_random_start_is_the_gradient_sign() -> None:
    model, images_NX = linear(), torch.full((1, 3, 2, 2), 0.5)
    label_N = (~wrong(model, images_NX, torch.tensor([1]))).long()
    config = EvasionConfig(radius=0.1, steps=1, step_size=0.1, random_start=False)
    found_NX = evade(model, images_NX, label_N, config, CPU)
    away_D = (model[1].weight[1 - label_N] - model[1].weight[label_N])[0].sign()
    torch.testing.assert_close(found_NX.flatten(), 0.5 + 0.1 * away_D)


def test_a_network_that_is_sure_has_a_margin_but_no_gradient() -> None:
    model, distance_N = linear(scale=1e4), torch.tensor([-0.04, 0.04])
    images_NX, labels_N = at_distance(model, distance_N, "l2"), (distance_N > 0).long()
    plain = EvasionConfig(norm="l2", radius=0.05, random_start=False)
    assert not wrong(model, evade(model, images_NX, labels_N, plain, CPU), labels_N).any()
    margin = plain.model_copy(update={"loss": "margin"})
    assert wrong(model, evade(model, images_NX, labels_N, margin, CPU), labels_N).all()


class Wells(nn.Module):
    """Wrong in a small ball away from the image, and flat but for a slope that leads the other way."""

    def forward(self, x_BX: Tensor) -> Tensor:
        x_B = x_BX.flatten(1)[:, 0]
        margin_B = torch.maximum(0.1 * (0.5 - x_B) - 1, 4 * (x_B - 0.7))
        return torch.stack([-margin_B, margin_B], 1)


def test_restarts_find_what_one_start_misses_and_never_lose() -> None:
    model, images_NX = Wells(), torch.full((64, 1, 1, 1), 0.5)
    labels_N = torch.zeros(64, dtype=torch.int64)
    fallen = []
    for restarts in (1, 8):
        config = EvasionConfig(radius=0.3, steps=10, restarts=restarts)
        fallen.append(int(wrong(model, evade(model, images_NX, labels_N, config, CPU), labels_N).sum()))
    assert 0 < fallen[0] < 45
    assert fallen[1] > 60


def test_what_is_wrong_already_comes_back_and_the_model_is_left_alone() -> None:
    model = linear()
    images_NX = torch.randint(0, 256, (30, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels_N = model(images_NX / 255).argmax(1)
    labels_N[::3] = 1 - labels_N[::3]
    found_NX = evade(model, images_NX, labels_N, EvasionConfig(radius=0.3, batch_size=7), CPU)
    assert torch.equal(found_NX[::3], images_NX[::3] / 255)
    assert (found_NX != images_NX / 255).flatten(1).any(1)[1::3].all()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    again_NX = evade(model, images_NX, labels_N, EvasionConfig(radius=0.3, batch_size=7), CPU)
    assert torch.equal(found_NX, again_NX)


def test_images_off_the_scale_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not on \[0, 1\]"):
        evade(linear(), torch.full((1, 3, 2, 2), 255.0), torch.tensor([0]), EvasionConfig(radius=0.1), CPU)


@pytest.mark.parametrize("norm", NORMS)
def test_the_smallest_perturbation_of_a_linear_classifier_is_its_distance(norm: str) -> None:
    model, distance_N = linear(), torch.tensor([-0.08, -0.03, -0.001, 0.01, 0.05, 0.09])
    images_NX, labels_N = at_distance(model, distance_N, norm), (distance_N > 0).long()
    labels_N[2] = 1  # wrong as it is
    config = EvasionConfig(norm=norm, radius=0.06, loss="margin")
    found_N = smallest_perturbation(model, images_NX, labels_N, config, CPU, searches=14)
    assert found_N[2] == 0
    assert torch.isinf(found_N[[0, 5]]).all()  # beyond the radius
    within = torch.tensor([1, 3, 4])
    assert (found_N[within] >= distance_N[within].abs().double() * (1 - 1e-5)).all()
    torch.testing.assert_close(found_N[within], distance_N[within].abs().double(), rtol=0.03, atol=0)


def test_what_it_finds_does_not_hang_on_the_other_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    images_NX, labels_N = torch.rand(20, 3, 2, 2), torch.randint(3, (20,))
    config = EvasionConfig(norm="l2", radius=1.0, random_start=False)
    together_N = smallest_perturbation(model, images_NX, labels_N, config, CPU)
    alone_N = smallest_perturbation(model, images_NX[7:8], labels_N[7:8], config, CPU)
    torch.testing.assert_close(together_N[7:8], alone_N, rtol=1e-4, atol=1e-5)


class Corner(nn.Module):
    """Class 1 begins .05 to the right of the grey image, class 2 begins .2 above it."""

    def forward(self, x_BX: Tensor) -> Tensor:
        right_B, up_B = (10 * (x_BX.flatten(1) - torch.tensor([0.55, 0.7]))).unbind(1)
        return torch.stack([torch.zeros_like(right_B), right_B, up_B], 1)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_a_targeted_attack_goes_where_it_is_sent(loss: str) -> None:
    images_NX, labels_N = torch.full((200, 1, 1, 2), 0.5), torch.zeros(200, dtype=torch.int64)
    for targeted in (False, True):
        config = EvasionConfig(norm="l2", radius=0.3, loss=loss, targeted=targeted, random_start=False, batch_size=64)
        went_N = Corner()(evade(Corner(), images_NX, labels_N, config, CPU)).argmax(1)
        assert set(went_N.tolist()) == ({1, 2} if targeted else {1})
    assert 70 < int((went_N == 2).sum()) < 130  # of 200 at a half: more than four standard deviations
    length_N = smallest_perturbation(Corner(), images_NX, labels_N, config, CPU, searches=14)
    expected_N = torch.where(went_N == 2, 0.2, 0.05).double()
    if loss == "margin":  # the same stream of targets, so the same targets
        torch.testing.assert_close(length_N, expected_N, rtol=0.03, atol=0)
