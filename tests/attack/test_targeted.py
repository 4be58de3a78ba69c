"""Targeted attacks: within their bound to the pixel, on the images they were given only, and closer to the target."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.attack import DMPoisoningConfig, GradientMatchingConfig, dm_poison, match_gradients
from sanitize.attack.targeted import PerturbConfig, direct_attack, perturb, plant
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError, NumericsError
from sanitize.loop import OptimConfig, train
from sanitize.models.config import ModelConfig
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig
from sanitize.siamese import SiameseConfig

SMALL = InstanceConvNetConfig(widths=(8, 8))
DIGITS = SiameseConfig(flip=False)
SHORT = PerturbConfig(eps=64, step=4, iterations=30, restarts=2, n_judges=4)
MODEL = ModelConfig(architecture=SMALL, n_classes=10, image_shape=(3, 8, 8))
Craft = Callable[[Tensor, Tensor, Compute], Tensor]


@pytest.fixture(scope="module")
def samples(dataset: Dataset) -> tuple[Tensor, Tensor]:
    return dataset.images()


@pytest.fixture(scope="module")
def network(samples: tuple[Tensor, Tensor]) -> nn.Module:
    compute = Compute(device="cpu")
    compute.seed_global("test")
    model = MODEL.build()
    batches = list(zip(samples[0].split(32), samples[1].split(32), strict=True))
    train(
        model,
        lambda _epoch: iter(batches),
        len(batches),
        OptimConfig(epochs=8, batch_size=32),
        compute,
        MODEL.normalise,
    )
    return model


@pytest.fixture(params=["dm", "gradients"])
def craft(request: pytest.FixtureRequest, network: nn.Module) -> Craft:
    if request.param == "dm":
        config = DMPoisoningConfig(perturb=SHORT, architecture=SMALL, augment=DIGITS)
        return lambda images, target, compute: dm_poison(images, target, config, compute)
    matching = GradientMatchingConfig(perturb=SHORT, augment=DIGITS)
    return lambda images, target, compute: match_gradients([network], images, target, 3, matching, MODEL, compute)


def threes_and_an_eight(samples: tuple[Tensor, Tensor], n: int = 12) -> tuple[Tensor, Tensor]:
    images_NCHW, labels_N = samples
    return images_NCHW[labels_N == 3][:n], images_NCHW[labels_N == 8][0]


def test_poison_lies_within_its_bound_and_repeats_by_its_seed(
    craft: Craft, samples: tuple[Tensor, Tensor], compute: Compute
) -> None:
    images_PCHW, target_CHW = threes_and_an_eight(samples)
    found_PCHW = craft(images_PCHW, target_CHW, compute)
    assert found_PCHW.dtype == torch.uint8
    assert int((found_PCHW.int() - images_PCHW.int()).abs().max()) == SHORT.eps
    assert torch.equal(craft(images_PCHW, target_CHW, compute), found_PCHW)
    assert not torch.equal(craft(images_PCHW, target_CHW, Compute(device="cpu", seed=1)), found_PCHW)


@settings(max_examples=25)
@given(
    images=st.lists(st.integers(0, 255), min_size=12, max_size=12),
    eps=st.integers(1, 255),
    step=st.integers(1, 255),
    wanted=st.integers(-300, 600),
)
def test_no_pixel_leaves_its_ball_or_its_range_and_each_goes_where_the_objective_wants_it(
    images: list[int], eps: int, step: int, wanted: int
) -> None:
    images_PCHW = torch.tensor(images, dtype=torch.uint8).view(3, 1, 2, 2)
    config = PerturbConfig(eps=eps, step=step, momentum=0, iterations=-(-2 * eps // step) + 1, restarts=1)
    found_PCHW = perturb(images_PCHW, lambda x, _stream: (x - wanted).square().sum(), config, Compute(device="cpu"))
    low_PCHW, high_PCHW = (images_PCHW.int() - eps).clamp(min=0), (images_PCHW.int() + eps).clamp(max=255)
    assert bool(((found_PCHW >= low_PCHW) & (found_PCHW <= high_PCHW)).all())
    best_PCHW = torch.full_like(low_PCHW, wanted).clamp(low_PCHW, high_PCHW)
    assert int((found_PCHW.int() - best_PCHW).abs().max()) <= step  # it steps to and fro over a value in between


def test_of_all_restarts_the_best_is_kept(compute: Compute) -> None:
    """With a single small step where an image ends is where it began."""
    images_PCHW = torch.full((1, 1, 1, 1), 128, dtype=torch.uint8)

    def distance(x_PCHW: Tensor, _stream: tuple[str | int, ...]) -> Tensor:
        return (x_PCHW - 128).square().sum()

    ends = [
        int(perturb(images_PCHW, distance, PerturbConfig(eps=100, iterations=1, restarts=n), compute))
        for n in (1, 5, 20)
    ]
    away = [abs(end - 128) for end in ends]
    assert away == sorted(away, reverse=True)
    assert away[0] > away[-1]


def test_an_objective_that_is_not_finite_is_an_error(compute: Compute) -> None:
    with pytest.raises(NumericsError, match="nan"):
        perturb(
            torch.zeros(1, 1, 1, 1, dtype=torch.uint8),
            lambda x, _stream: (x * torch.nan).sum(),
            SHORT,
            compute,
        )


def test_dm_poison_looks_like_the_target_to_networks_and_changes_it_never_saw(
    samples: tuple[Tensor, Tensor], compute: Compute
) -> None:
    images_PCHW, target_CHW = threes_and_an_eight(samples)
    config = DMPoisoningConfig(perturb=SHORT, architecture=SMALL, augment=DIGITS)
    found_PCHW = dm_poison(images_PCHW, target_CHW, config, compute)
    draws = torch.Generator().manual_seed(123)
    extractor = InstanceConvNet(SMALL, 10, MODEL.image_shape).requires_grad_(False)
    ratios = []
    for _ in range(20):
        extractor.redraw(draws)
        change = DIGITS.draw(1, (8, 8), draws)
        before, after = (
            float((features[0] - features[1:].mean(0)).norm())
            for features in (
                extractor.features(change(MODEL.normalise(torch.cat([target_CHW[None], of_PCHW]))[None])[0])
                for of_PCHW in (images_PCHW, found_PCHW)
            )
        )
        ratios.append(after / before)
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.8


def test_learning_the_poison_is_learning_the_target(
    network: nn.Module, samples: tuple[Tensor, Tensor], compute: Compute
) -> None:
    images_PCHW, target_CHW = threes_and_an_eight(samples)
    config = GradientMatchingConfig(perturb=SHORT, augment=DIGITS)
    found_PCHW = match_gradients([network], images_PCHW, target_CHW, 3, config, MODEL, compute)

    def gradient_W(x_BCHW: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(network(MODEL.normalise(x_BCHW)), torch.full((len(x_BCHW),), 3))
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(network.parameters()))])

    wanted_W = gradient_W(target_CHW[None])
    before, after = (
        float(nn.functional.cosine_similarity(wanted_W, gradient_W(of_PCHW), dim=0))
        for of_PCHW in (images_PCHW, found_PCHW)
    )
    assert 1 - after < 0.5 * (1 - before)


def test_several_networks_are_matched_at_once(
    network: nn.Module, samples: tuple[Tensor, Tensor], compute: Compute
) -> None:
    """The mean over twice the same network is the network."""
    images_PCHW, target_CHW = threes_and_an_eight(samples, 3)
    config = GradientMatchingConfig(perturb=SHORT.model_copy(update={"iterations": 3}), augment=DIGITS)
    one, two = (match_gradients([network] * n, images_PCHW, target_CHW, 3, config, MODEL, compute) for n in (1, 2))
    assert torch.equal(one, two)


# --- where poison goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_only_so_many_images_of_the_class_change(rate: float, samples: tuple[Tensor, Tensor]) -> None:
    images_NCHW, labels_N = samples
    before_NCHW = images_NCHW.clone()
    target_CHW = images_NCHW[labels_N == 8][0]
    draws = torch.Generator().manual_seed(0)
    attack = partial(direct_attack, target_CHW=target_CHW)
    poisoned_NCHW, is_poisoned_N = plant(images_NCHW, labels_N, 3, rate, attack, draws)
    assert torch.equal(images_NCHW, before_NCHW)
    assert int(is_poisoned_N.sum()) == round(rate * len(labels_N))
    assert set(labels_N[is_poisoned_N].tolist()) == {3}
    assert torch.equal(poisoned_NCHW[~is_poisoned_N], images_NCHW[~is_poisoned_N])
    assert all(torch.equal(image, target_CHW) for image in poisoned_NCHW[is_poisoned_N])
    other_N = plant(images_NCHW, labels_N, 3, rate, attack, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(other_N, is_poisoned_N)


def test_a_class_that_is_too_small_is_an_error(samples: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ConfigError, match="class 3 has only"):
        plant(*samples, 3, 0.5, lambda images: images, torch.Generator().manual_seed(0))
