"""Aggregates against slow, obvious twins, and against planted poison."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sanitize.condensation.aggregate import AggregateConfig, aggregate, kept, top_eigenvector
from sanitize.errors import ConfigError

KINDS = ("mean", "calibrated", "median", "trimmed", "truncated")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(n: int = 40, d: int = 12, seed: int = 0) -> Tensor:
    """(3, n, d): correlated, skewed, each class elsewhere, with one direction that stands out."""
    g = generator(seed)
    z = torch.randn(3, n, d, generator=g)
    z[..., 0] = 4 * z[..., 0].exp()
    return z @ torch.randn(3, d, d, generator=g) + 10 * torch.randn(3, 1, d, generator=g)


def slow_mean(r_ND: np.ndarray, config: AggregateConfig) -> np.ndarray:
    """One class, in float64, the covariance and its eigenvectors in full."""
    n = len(r_ND)
    k = min(math.ceil(config.margin * config.eps * n - 1e-6), n - 1)
    if config.kind == "mean":
        return r_ND.mean(0)
    if config.kind == "median":
        return np.median(r_ND, axis=0)
    if config.kind == "trimmed":
        cut = math.ceil(k / 2)
        return np.stack([np.sort(column)[cut : n - cut].mean() for column in r_ND.T])
    if config.kind == "truncated":
        scores = [np.linalg.norm(r - r_ND.mean(0)) for r in r_ND]
    else:
        v = np.linalg.eigh(np.cov(r_ND.T))[1][:, -1]
        scores = [abs((r - r_ND.mean(0)) @ v) for r in r_ND]
    return r_ND[np.argsort(scores)[: n - k]].mean(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "eps", "margin"), [(40, 0.1, 3), (41, 0.05, 1.5), (7, 0.02, 1.5)])
def test_all_classes_at_once_are_the_slow_twin_one_by_one(kind: str, n: int, eps: float, margin: float) -> None:
    config = AggregateConfig(kind=kind, eps=eps, margin=margin, power_iterations=200)  # type: ignore[arg-type]
    r_KND = classes(n)
    found_KD = aggregate(r_KND, config, generator())
    wanted_KD = np.stack([slow_mean(r_ND.double().numpy(), config) for r_ND in r_KND])
    np.testing.assert_allclose(found_KD.numpy(), wanted_KD, rtol=1e-4, atol=1e-4)


def test_the_power_method_finds_the_top_eigenvector() -> None:
    r_KND = classes()
    centred_KND = r_KND - r_KND.mean(1, keepdim=True)
    v_KD = top_eigenvector(centred_KND, torch.randn(3, 12, generator=generator()), 200)
    for v_D, r_ND in zip(v_KD, r_KND, strict=True):
        wanted_D = torch.linalg.eigh(torch.cov(r_ND.T)).eigenvectors[:, -1]
        assert abs(float(v_D @ wanted_D)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_samples_and_a_shift_of_all_do_not_matter(kind: str) -> None:
    config = AggregateConfig(kind=kind)  # type: ignore[arg-type]
    r_KND, shift_D = classes(), torch.arange(12.0)
    mean_KD = aggregate(r_KND, config, generator())
    order_N = torch.randperm(40, generator=generator(1))
    torch.testing.assert_close(aggregate(r_KND[:, order_N], config, generator()), mean_KD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(aggregate(r_KND + shift_D, config, generator()), mean_KD + shift_D, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["calibrated", "trimmed", "truncated"])
def test_with_nothing_to_withstand_it_is_the_mean(kind: str) -> None:
    r_KND = classes()
    found_KD = aggregate(r_KND, AggregateConfig(kind=kind, eps=0), generator())  # type: ignore[arg-type]
    torch.testing.assert_close(found_KD, r_KND.mean(1), rtol=1e-5, atol=1e-5)


def test_how_many_are_dropped() -> None:
    assert AggregateConfig(eps=0.1, margin=3).n_dropped(10) == 3  # 3 * 0.1 * 10 > 3 in floating point
    assert AggregateConfig(eps=0.01, margin=3).n_dropped(256) == 8
    assert AggregateConfig(eps=0.1).n_dropped(256) == 39
    assert AggregateConfig(eps=0).n_dropped(256) == 0
    assert AggregateConfig(eps=0.3).n_dropped(2) == 1  # never all
    for eps in (-0.1, 1 / 3):
        with pytest.raises(ValidationError):
            AggregateConfig(eps=eps)


# --- Lemma 4.1 ----------------------------------------------------------------------------------------------------


def planted(
    eps: float, alpha: float, d: int = 50, spread: float = 1.0, n: int = 256, k: int = 20
) -> tuple[Tensor, int]:
    """k classes from N(0, I) of which the first eps n samples are moved by sqrt(alpha / eps), the lemma's distance."""
    g = generator(3)
    r_KND = torch.randn(k, n, d, generator=g)
    n_poisoned = round(eps * n)
    r_KND[:, :n_poisoned] *= spread
    away_KD = torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=1) * math.sqrt(alpha / eps)
    r_KND[:, :n_poisoned] += away_KD[:, None]
    return r_KND, n_poisoned


def deviation(mean_KD: Tensor, r_KND: Tensor, n_poisoned: int) -> float:
    """Poisoned deviation: how far from the mean of the clean samples; mean over the classes."""
    return float((mean_KD - r_KND[:, n_poisoned:].mean(1)).norm(dim=1).mean())


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
def test_calibration_drops_separated_poison_and_what_is_left_is_within_the_lemma(eps: float) -> None:
    alpha = 10.0  # above the lemma's 2665 / 576; a finite sample of 50 dimensions adds to its sigma
    r_KND, n_poisoned = planted(eps, alpha)
    config = AggregateConfig(eps=eps)
    keep_KN = kept(r_KND, config, generator())
    assert (~keep_KN).sum(1).tolist() == [config.n_dropped(256)] * len(r_KND)
    assert float((~keep_KN[:, :n_poisoned]).float().mean()) >= 0.99
    plain = deviation(r_KND.mean(1), r_KND, n_poisoned)
    calibrated = deviation(aggregate(r_KND, config, generator()), r_KND, n_poisoned)
    assert plain == pytest.approx(eps * math.sqrt(alpha / eps), rel=0.2)  # O(eps): all of the poison
    # Eq. 22, of what the poison that was kept adds. (Dropping clean samples on one side of r_bar adds the rest.)
    kept_KN = keep_KN.float()
    kept_KN[:, n_poisoned:] = 0
    added_KD = (kept_KN[:, None] @ r_KND)[:, 0] / keep_KN.sum(1, keepdim=True)
    assert float(added_KD.norm(dim=1).mean()) < 20 / 3 * eps**3 * math.sqrt(alpha / eps)
    assert calibrated < 0.6 * plain


def test_copies_that_lie_within_the_class_are_seen_by_their_direction_alone() -> None:
    """The direct attack: one picture again and again, no further from the mean than the clean samples are."""
    r_KND, n_poisoned = planted(0.1, 10.0, d=400, spread=0)
    recall = {
        kind: float((~kept(r_KND, AggregateConfig(kind=kind), generator())[:, :n_poisoned]).float().mean())  # type: ignore[arg-type]
        for kind in ("calibrated", "truncated")
    }
    assert recall["calibrated"] >= 0.95
    assert recall["truncated"] <= 0.05


# --- min_kurtosis -------------------------------------------------------------------------------------------------


def test_a_class_without_a_small_group_far_out_is_left_alone() -> None:
    g = generator(5)
    clean_ND, poisoned_ND = torch.rand(2, 256, 20, generator=g)  # kurtosis of a uniform distribution: 1.8
    poisoned_ND[:13] += 2
    r_KND = torch.stack([clean_ND, poisoned_ND])
    config = AggregateConfig(eps=0.05, min_kurtosis=3)
    keep_KN = kept(r_KND, config, generator())
    assert keep_KN[0].all()
    assert not keep_KN[1, :13].any()
    always_KN = kept(r_KND, AggregateConfig(eps=0.05), generator())
    assert (~always_KN).sum(1).tolist() == [20, 20]
    torch.testing.assert_close(keep_KN[1], always_KN[1])
    with pytest.raises(ConfigError, match="min_kurtosis"):
        AggregateConfig(kind="median", min_kurtosis=3)
