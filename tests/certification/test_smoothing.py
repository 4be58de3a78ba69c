"""Randomized smoothing against what is known: exact radii of linear classifiers, scipy's binomial tests."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.certification import smoothing
from sanitize.certification.smoothing import (
    ABSTAINS,
    SmoothingConfig,
    certify,
    lower_bound,
    predict,
    radius,
    upper_bound,
)
from sanitize.compute import Compute
from sanitize.errors import NumericsError

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
levels = st.floats(1e-6, 0.3)


class Linear(nn.Module):
    """Class 1 where w . x > 0. Under N(0, sigma^2 I) its probability is Phi(w . x / (sigma |w|)): the radius of the
    smoothed classifier is |w . x| / |w|, whatever sigma is."""

    def __init__(self, n_features: int, seed: int = 0) -> None:
        super().__init__()
        self.w_D = nn.Parameter(torch.randn(n_features, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x_BX: Tensor) -> Tensor:
        margin_B = x_BX.flatten(1) @ self.w_D
        return torch.stack([-margin_B, margin_B], 1)

    def at_distance(self, distance_N: Tensor, seed: int = 1) -> Tensor:
        """Points (N, D) so far from the boundary, on the side of the sign, and far apart along it."""
        unit_D = (self.w_D / self.w_D.norm()).detach()
        x_ND = torch.randn(len(distance_N), len(unit_D), generator=torch.Generator().manual_seed(seed))
        return x_ND + (distance_N - x_ND @ unit_D)[:, None] * unit_D


# --- bounds -----------------------------------------------------------------------------------------------------


@given(counts, levels)
def test_the_bounds_are_those_of_scipys_exact_interval(counted: tuple[int, int], alpha: float) -> None:
    successes, n = counted
    test = scipy.stats.binomtest(successes, n)
    two_sided = test.proportion_ci(1 - 2 * alpha, "exact")
    assert lower_bound(successes, n, alpha) == pytest.approx(two_sided.low, abs=1e-9)
    assert upper_bound(successes, n, alpha) == pytest.approx(two_sided.high, abs=1e-9)


@given(counts, levels)
def test_the_lower_bound_is_where_the_tail_has_the_probability_alpha(counted: tuple[int, int], alpha: float) -> None:
    successes, n = counted
    p = lower_bound(successes, n, alpha)
    if successes == 0:
        assert p == 0
    else:
        assert scipy.stats.binom.sf(successes - 1, n, p) == pytest.approx(alpha, rel=1e-6)


@given(counts, levels, levels)
def test_the_lower_bound_rises_with_the_successes_and_with_alpha(
    counted: tuple[int, int], one: float, two: float
) -> None:
    successes, n = counted
    assert (np.diff(lower_bound(np.arange(n + 1), n, one)) > 0).all()
    low, high = sorted((one, two))
    assert lower_bound(successes, n, low) <= lower_bound(successes, n, high) <= max(successes / n, 1e-12)


@given(st.floats(0.5, 1 - 1e-12), st.floats(1e-3, 10))
def test_the_radius_is_the_quantile(p: float, sigma: float) -> None:
    assert radius(p, sigma) == pytest.approx(sigma * scipy.stats.norm.ppf(p), abs=1e-9)
    assert radius(1 - p, sigma) == 0


# --- CERTIFY on a linear classifier: the radius is known ----------------------------------------------------------


@pytest.mark.parametrize("early_stop", [False, True])
def test_too_large_a_radius_is_as_rare_as_alpha_says(early_stop: bool, compute: Compute) -> None:
    alpha, n_images = 0.05, 2000
    config = SmoothingConfig(sigma=0.5, n0=50, n=400, alpha=alpha, early_stop=early_stop, batch_size=1 << 15)
    model = Linear(4)
    truth_N = torch.linspace(-1, 1, n_images)
    found = certify(model, model.at_distance(truth_N), config, compute)
    is_wrong_N = found.radii_N > truth_N.abs().numpy()
    is_wrong_N |= (found.predictions_N != ABSTAINS) & (found.predictions_N != (truth_N > 0).numpy())
    # At most alpha, and not by abstaining from everything: the bound is nearly attained.
    n_wrong = int(is_wrong_N.sum())
    assert scipy.stats.binomtest(n_wrong, n_images, alpha, "greater").pvalue > 0.001
    assert n_wrong > 0.5 * alpha * n_images
    assert (found.predictions_N != ABSTAINS).mean() > 0.85


def test_with_many_copies_the_radius_is_within_five_percent(compute: Compute) -> None:
    config = SmoothingConfig(sigma=0.5, n=100_000, alpha=0.001, batch_size=1 << 15)
    model = Linear(4)
    truth_N = torch.tensor([0.35, -0.5, 0.6, -0.75, 0.9])
    found = certify(model, model.at_distance(truth_N), config, compute)
    ratio_N = found.radii_N / truth_N.abs().numpy()
    assert (ratio_N < 1).all(), ratio_N
    assert (ratio_N > 0.95).all(), ratio_N
    np.testing.assert_array_equal(found.predictions_N, [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(found.n_N, 100_000)


def test_a_certificate_is_made_of_its_counts(compute: Compute) -> None:
    config = SmoothingConfig(sigma=0.5, n=500, alpha=0.01)
    model = Linear(4)
    found = certify(model, model.at_distance(torch.linspace(0, 3, 40)), config, compute)
    np.testing.assert_array_equal(found.p_lower_N, lower_bound(found.n_top_N, 500, 0.01))
    np.testing.assert_array_equal(found.predictions_N, np.where(found.p_lower_N > 0.5, 1, ABSTAINS))
    np.testing.assert_array_equal(found.radii_N > 0, found.p_lower_N > 0.5)
    assert found.radii_N.max() == radius(0.01 ** (1 / 500), 0.5)  # all copies agree: n and alpha bound the radius


def test_hopeless_images_are_stopped_and_the_others_are_what_they_were(compute: Compute) -> None:
    config = SmoothingConfig(sigma=1.0, n0=20, n=4000, alpha=0.001)
    model = Three()
    x_ND = torch.cat([torch.zeros(20, 2), torch.tensor([[2.0, 0.0]]) + torch.linspace(0, 1, 20)[:, None]])
    whole = certify(model, x_ND, config, compute)
    stopped = certify(model, x_ND, config.model_copy(update={"early_stop": True}), compute)
    np.testing.assert_array_equal(whole.predictions_N[:20], ABSTAINS)
    np.testing.assert_array_equal(stopped.predictions_N, whole.predictions_N)
    assert set(stopped.n_N[:20].tolist()) <= {40, 400}
    assert (stopped.p_lower_N[:20] == 0).all()
    np.testing.assert_array_equal(stopped.n_N[20:], 4000)
    assert (np.abs(stopped.radii_N - whole.radii_N)[20:] < 0.2).all()  # other noise, or the same in other pieces


class Three(nn.Module):
    """Three sectors of the plane that meet at the origin: there each has the probability 1/3."""

    def forward(self, x_B2: Tensor) -> Tensor:
        angle_3 = torch.arange(3) * 2 * torch.pi / 3
        return x_B2 @ torch.stack([angle_3.cos(), angle_3.sin()])


# --- PREDICT ----------------------------------------------------------------------------------------------------


def test_predict_errs_as_rarely_as_alpha_says_and_abstains_at_the_boundary(compute: Compute) -> None:
    alpha = 0.1
    config = SmoothingConfig(sigma=0.5, n=200, alpha=alpha, batch_size=1 << 15)
    model = Linear(4)
    near = predict(model, model.at_distance(torch.full((1000,), 1e-6)), config, compute)
    n_made = int((near != ABSTAINS).sum())
    assert scipy.stats.binomtest(n_made, 1000, alpha, "greater").pvalue > 0.001
    assert n_made > 0.5 * alpha * 1000
    far = predict(model, model.at_distance(torch.tensor([-1.0, 1.0])), config, compute)
    np.testing.assert_array_equal(far, [0, 1])


def test_predict_is_scipys_binomial_test(compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    counts_NK = np.random.default_rng(0).integers(0, 40, (300, 4))
    monkeypatch.setattr(smoothing._NoisyCopies, "count", lambda _self, wanted: counts_NK[: len(wanted)])
    config = SmoothingConfig(n=1, n0=1, alpha=0.05, batch_size=1280)
    found = predict(nn.Identity(), torch.zeros(300, 4), config, compute)
    for prediction, counts_K in zip(found, counts_NK, strict=True):
        second, first = np.sort(counts_K)[-2:].tolist()
        tells = first + second > 0 and scipy.stats.binomtest(first, first + second).pvalue <= 0.05
        assert prediction == (counts_K.argmax() if tells else ABSTAINS)


# --- what the noise depends on, and what nothing depends on -------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 3, 3))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (9, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def agree(one: smoothing.Certified, two: smoothing.Certified) -> None:
    np.testing.assert_array_equal(one.n_top_N, two.n_top_N)
    np.testing.assert_array_equal(one.predictions_N, two.predictions_N)


@pytest.mark.parametrize("batch_size", [128, 384, 128 * 100])
def test_batches_do_not_matter(batch_size: int, network: nn.Module, images: Tensor, compute: Compute) -> None:
    config = SmoothingConfig(sigma=1.0, n0=30, n=301)
    batched = certify(network, images, config.model_copy(update={"batch_size": batch_size}), compute)
    agree(batched, certify(network, images, config, compute))


def test_neither_order_nor_company_nor_type_matters(network: nn.Module, images: Tensor, compute: Compute) -> None:
    config = SmoothingConfig(sigma=1.0, n0=30, n=301, batch_size=128 * 10)
    whole = certify(network, images, config, compute)
    some = [7, 0, 3]
    agree(certify(network, images[some], config, compute), smoothing.Certified(*(a[some] for a in whole)))
    agree(certify(network, images / 255, config, compute), whole)
    agree(certify(network, images.contiguous(memory_format=torch.channels_last), config, compute), whole)
    assert len(set(whole.n_top_N.tolist())) > 3  # they are not all alike anyway


def test_the_seed_matters(network: nn.Module, images: Tensor, compute: Compute) -> None:
    config = SmoothingConfig(sigma=1.0, n=301)
    other = certify(network, images, config, compute.model_copy(update={"seed": 1}))
    assert (other.n_top_N != certify(network, images, config, compute).n_top_N).any()


def test_the_copies_are_the_image_with_independent_gaussian_noise(compute: Compute) -> None:
    """What the model is shown: mean, variance, no copy twice, none of those that chose among those that count."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
            seen.append(x_BCHW.clone())
            return x_BCHW.flatten(1)[:, :2]

    image_CHW = torch.rand(3, 4, 5)
    certify(Spy(), image_CHW[None], SmoothingConfig(sigma=0.3, n0=256, n=5120, batch_size=256), compute)
    x_NCHW = torch.cat(seen)
    assert x_NCHW.shape == (5376, 3, 4, 5)  # whole blocks: nothing was filled up
    noise_ND = (x_NCHW - image_CHW).flatten(1) / 0.3
    assert len(noise_ND.unique(dim=0)) == 5376
    assert scipy.stats.kstest(noise_ND.flatten().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(torch.cov(noise_ND.T), torch.eye(60), atol=0.08, rtol=0)


def test_memory_does_not_grow_with_the_copies(compute: Compute) -> None:
    shapes: set[int] = set()

    class Spy(nn.Module):
        def forward(self, x_BX: Tensor) -> Tensor:
            shapes.add(x_BX.untyped_storage().nbytes())
            return x_BX[:, :2]

    certify(Spy(), torch.zeros(2, 8), SmoothingConfig(n=20_000, batch_size=256), compute)
    assert shapes == {256 * 8 * 4}


def test_logits_that_are_not_finite_are_an_error(compute: Compute) -> None:
    class Broken(nn.Module):
        def forward(self, x_BX: Tensor) -> Tensor:
            return torch.where(x_BX > 3.5, torch.nan, x_BX)  # one copy of thousands

    with pytest.raises(NumericsError, match=r"not finite under noise of sigma=1\.0"):
        certify(Broken(), torch.zeros(1, 8), SmoothingConfig(sigma=1.0), compute)


def test_a_batch_size_that_would_cut_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        SmoothingConfig(batch_size=500)
