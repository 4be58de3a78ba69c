"""The toxic direction: finds a planted tight cluster, says nothing about data without one, keeps its symmetries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanitize.score.toxic_direction import ToxicDirectionConfig
from sanitize.score.toxic_direction.sides import NO_EVIDENCE
from sanitize.score.toxic_direction.split import (
    ClassSplit,
    fit_class,
    log_odds,
    principal_axes,
)
from sanitize.score.toxic_direction.two_gaussians import best_threshold, component_log_density, em, mixture_log_odds

CONFIG = ToxicDirectionConfig(n_starts=32)
# Floors of the separation rule for large and small classes.
FLOOR = 4.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def natural(kind: str, n: int, d: int, seed: int) -> Tensor:
    """Clean rows with a falling spectrum, as embeddings have: Gaussian, Student's t with 5 degrees, or uniform."""
    generator = seeded(seed)
    scale_D = torch.arange(1, d + 1).double().rsqrt()
    if kind == "uniform":
        return (torch.rand(n, d, generator=generator, dtype=torch.float64) - 0.5) * scale_D
    x_ND = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale_D
    if kind == "t5":
        chi2_N1 = torch.randn(n, 5, generator=generator, dtype=torch.float64).square().sum(1, keepdim=True)
        x_ND = x_ND / (chi2_N1 / 5).sqrt()
    return x_ND


def planted(n: int, n_poison: int, d: int, seed: int, gap: float = 12.0) -> tuple[Tensor, Tensor]:
    """Gaussian rows; the poison is `gap` sd away along one random direction, and tight along it. Returns rows, mask."""
    x_ND = torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)
    v_D = torch.randn(d, generator=seeded(seed + 1), dtype=torch.float64)
    v_D = v_D / v_D.norm()
    poison_N = torch.arange(n) < n_poison
    along_N = x_ND @ v_D
    moved_N = torch.where(poison_N, gap - along_N * 0.5, torch.zeros(n, dtype=torch.float64))
    return x_ND + moved_N[:, None] * v_D, poison_N


def flagged(split: ClassSplit, x_ND: Tensor) -> Tensor:
    return (log_odds(split, x_ND) > 0) & (split.separation > FLOOR)


@pytest.mark.parametrize(("n", "n_poison", "d"), [(600, 20, 16), (600, 60, 16), (800, 240, 32), (200, 30, 12)])
def test_finds_a_planted_cluster(n: int, n_poison: int, d: int) -> None:
    x_ND, poison_N = planted(n, n_poison, d, seed=n + d)
    split = fit_class(x_ND, CONFIG, seeded(0))
    found_N = flagged(split, x_ND)
    assert split.separation > FLOOR + 1
    assert found_N[poison_N].double().mean() >= 0.95
    assert found_N[~poison_N].double().mean() <= 0.005
    assert split.minority_fraction == pytest.approx(n_poison / n, abs=0.01)
    assert split.n_samples == n


def test_scores_samples_that_were_not_fitted() -> None:
    x_ND, poison_N = planted(1000, 100, 16, seed=4)
    split = fit_class(x_ND[::2], CONFIG, seeded(0))
    found_N = flagged(split, x_ND[1::2])
    assert found_N[poison_N[1::2]].double().mean() >= 0.95
    assert found_N[~poison_N[1::2]].double().mean() <= 0.005


def test_equal_halves_the_more_diverse_side_is_suspicious() -> None:
    """Poison taken from several classes varies along a few large axes; the class itself along many small ones."""
    x_ND, poison_N = planted(600, 310, 16, seed=8, gap=40.0)
    generator = seeded(9)
    centres_KD = 3 * torch.randn(4, 16, generator=generator, dtype=torch.float64)
    origin_N = torch.randint(4, (600,), generator=generator)
    x_ND = x_ND + centres_KD[origin_N] * poison_N[:, None]
    found_N = log_odds(fit_class(x_ND, CONFIG, seeded(0)), x_ND) > 0
    assert (found_N == poison_N).double().mean() > 0.98


@pytest.mark.parametrize("kind", ["gaussian", "t5", "uniform"])
def test_silent_on_data_without_a_second_cluster(kind: str) -> None:
    separations = [fit_class(natural(kind, 200, 10, s), CONFIG, seeded(s)).separation for s in range(4)]
    assert max(separations) < 0.7 * FLOOR


def test_translation_and_scale_change_nothing() -> None:
    x_ND, _ = planted(400, 40, 12, seed=1)
    split = fit_class(x_ND, CONFIG, seeded(0))
    moved_ND = 37.0 * (x_ND + torch.linspace(-50, 50, 12))
    moved = fit_class(moved_ND, CONFIG, seeded(0))
    assert moved.separation == pytest.approx(split.separation, rel=1e-3)
    torch.testing.assert_close(log_odds(moved, moved_ND), log_odds(split, x_ND), rtol=1e-2, atol=1e-2)


def test_deterministic_whatever_the_row_order() -> None:
    x_ND, _ = planted(400, 40, 12, seed=2)
    split = fit_class(x_ND, CONFIG, seeded(3))
    again = fit_class(x_ND, CONFIG, seeded(3))
    assert split.separation == again.separation
    assert torch.equal(split.direction_D, again.direction_D)
    permuted = fit_class(x_ND[torch.randperm(400, generator=seeded(5))], CONFIG, seeded(3))
    assert permuted.separation == pytest.approx(split.separation, rel=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 7, CONFIG.min_class - 1])
def test_small_classes_are_untouched(n: int) -> None:
    x_ND = torch.randn(n, 5, generator=seeded(0))
    split = fit_class(x_ND, CONFIG, seeded(0))
    assert split.separation == 0
    assert not (log_odds(split, torch.randn(50, 5, generator=seeded(1))) > 0).any()


@pytest.mark.parametrize(
    "x_ND",
    [
        torch.ones(100, 4),
        torch.ones(100, 4) * 1e8,
        torch.arange(4.0).repeat(100, 1),
        torch.randn(1, 6, generator=seeded(0)).repeat(80, 1),
        torch.randn(60, 1, generator=seeded(0)),
        torch.randn(4, 6, generator=seeded(0)).repeat(25, 1),
        torch.randint(2, (100, 3), generator=seeded(0)),
        torch.randn(60, 200, generator=seeded(0)),
    ],
)
def test_degenerate_classes_stay_finite(x_ND: Tensor) -> None:
    split = fit_class(x_ND, CONFIG, seeded(0))
    assert math.isfinite(split.separation)
    assert split.direction_D.isfinite().all()
    odds_B = log_odds(split, torch.cat([x_ND, x_ND * 1e6 + 1]))
    assert odds_B.dtype == torch.float32
    assert odds_B.isfinite().all()


def test_constant_columns_and_broken_rows_do_not_matter() -> None:
    x_ND, poison_N = planted(400, 40, 12, seed=6)
    with_constant_ND = torch.cat([x_ND, torch.full((400, 2), 3.3)], 1)
    split = fit_class(with_constant_ND, CONFIG, seeded(0))
    assert (split.direction_D[-2:] == 0).all()
    assert flagged(split, with_constant_ND)[poison_N].double().mean() >= 0.95
    broken_ND = torch.cat([x_ND, torch.full((3, 12), math.nan), torch.full((3, 12), math.inf)])
    split = fit_class(broken_ND, CONFIG, seeded(0))
    assert split.n_samples == 400
    odds_B = log_odds(split, broken_ND)
    assert odds_B.isfinite().all()
    assert (odds_B[400:] < 0).all()


@given(seed=st.integers(0, 2**31), gap=st.floats(0.1, 20), ratio=st.floats(0.05, 20))
@settings(max_examples=25, deadline=None)
def test_log_odds_rise_along_the_direction(seed: int, gap: float, ratio: float) -> None:
    place_N = torch.randn(80, generator=seeded(seed), dtype=torch.float64)
    place_N[:20] = place_N[:20] * ratio + gap
    mixture = em(place_N, (torch.arange(80) < 20).double())
    split = ClassSplit(torch.ones(1, dtype=torch.float64), 0.0, mixture, 9.0, 1.0, 80, 0.25, NO_EVIDENCE)
    line_B1 = torch.linspace(-30, 50, 200, dtype=torch.float64)[:, None]
    steps_B = log_odds(split, line_B1).diff() * (mixture.mean_2[1] - mixture.mean_2[0]).sign()
    assert (steps_B >= 0).all()


@given(seed=st.integers(0, 2**31), n=st.integers(5, 60), gap=st.floats(0, 20), n_steps=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_em_never_lowers_the_likelihood(seed: int, n: int, gap: float, n_steps: int) -> None:
    generator = seeded(seed)
    place_N = torch.randn(n, generator=generator, dtype=torch.float64)
    place_N[: n // 4] += gap
    start_N = torch.rand(n, generator=generator, dtype=torch.float64)

    def likelihood(steps: int) -> float:
        return float(component_log_density(em(place_N, start_N, steps), place_N).logsumexp(0).sum())

    assert likelihood(n_steps + 1) >= likelihood(n_steps) - 1e-9 * n


@given(seed=st.integers(0, 2**31), n=st.integers(8, 40), min_count=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_best_threshold_is_the_best(seed: int, n: int, min_count: int) -> None:
    """Against every cut in turn, each side's variance and share written out."""
    place_N = torch.randn(n, generator=seeded(seed), dtype=torch.float64).pow(3)
    sorted_N = place_N.sort().values
    floor = 1e-3 * place_N.var(correction=0)

    def cost(part_M: Tensor) -> Tensor:
        return len(part_M) / n * ((part_M.var(correction=0) + floor).log() / 2 - math.log(len(part_M) / n))

    gains = [
        (place_N.var(correction=0) + floor).log() / 2 - cost(sorted_N[:cut]) - cost(sorted_N[cut:])
        for cut in range(min_count, n - min_count + 1)
    ]
    upper_1N, gain_1 = best_threshold(place_N[None], min_count)
    assert float(gain_1) == pytest.approx(float(max(gains)), abs=1e-8)
    assert int((1 - upper_1N).sum()) == min_count + int(torch.stack(gains).argmax())


def test_mixture_log_odds_is_the_ratio_of_densities() -> None:
    place_N = torch.randn(100, generator=seeded(0), dtype=torch.float64)
    mixture = em(place_N, (place_N > 1).double())
    density_2N = [
        w * torch.distributions.Normal(m, s).log_prob(place_N).exp()
        for m, s, w in zip(mixture.mean_2, mixture.sd_2, mixture.weight_2, strict=True)
    ]
    torch.testing.assert_close(mixture_log_odds(mixture, place_N), (density_2N[1] / density_2N[0]).log())


def test_wide_features_use_the_range_finder() -> None:
    """The randomised axes span what the dense eigendecomposition finds."""
    x_ND = natural("gaussian", 100, 600, seed=0) * torch.arange(1, 601).double().rsqrt()
    x_ND = x_ND - x_ND.mean(0)
    value_P, vector_DP = principal_axes(x_ND, 5, seeded(0))
    dense_D, dense_DD = torch.linalg.eigh(x_ND.T @ x_ND / 100)
    torch.testing.assert_close(value_P, dense_D.flip(0)[:5], rtol=1e-3, atol=0)
    assert (dense_DD.flip(1)[:, :5].T @ vector_DP).abs().diagonal().min() > 0.99
