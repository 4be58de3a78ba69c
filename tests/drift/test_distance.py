"""The tests of a batch: identities, and how often they are wrong or right on real digits."""

from functools import cache

import numpy as np
import pytest
import scipy.linalg
import sklearn.datasets
import torch
from scipy import stats
from torch import Tensor

from sanitize.attack import BadNetsConfig
from sanitize.drift.distance import (
    Comparison,
    Distance,
    distance,
    excess,
    frechet_squared,
    gamma_tail,
    priors,
    shift,
    together,
)
from sanitize.embed.label_free import oriented_gradients
from sanitize.streaming import Moments


def moments_of(x_Nr: Tensor) -> Moments:
    moments = Moments(x_Nr.shape[1])
    moments.update(x_Nr)
    return moments


def normal(seed: int, n: int, r: int = 4) -> Tensor:
    return torch.randn(n, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_distance_of_gaussians_is_what_the_matrix_root_gives() -> None:
    a, b = moments_of(normal(0, 50)), moments_of(2 * normal(1, 60) + 1)
    root = scipy.linalg.sqrtm(a.covariance().numpy() @ b.covariance().numpy()).real
    wanted = float((a.mean_D - b.mean_D).square().sum()) + float(
        np.trace(a.covariance().numpy() + b.covariance().numpy() - 2 * root)
    )
    pair = [(m.mean_D[None], m.covariance()[None]) for m in (a, b)]
    assert float(frechet_squared(*pair[0], *pair[1])) == pytest.approx(wanted, rel=1e-9)
    assert float(frechet_squared(*pair[1], *pair[0])) == pytest.approx(wanted, rel=1e-9)
    assert float(frechet_squared(*pair[0], *pair[0])) == pytest.approx(0, abs=1e-9)


def test_equal_covariances_leave_the_distance_of_the_means() -> None:
    x = normal(0, 40)
    a, b = moments_of(x), moments_of(x + torch.tensor([3.0, 0, 0, 4.0]))
    pair = [(m.mean_D[None], m.covariance()[None]) for m in (a, b)]
    assert float(frechet_squared(*pair[0], *pair[1])) == pytest.approx(25, rel=1e-9)


def test_a_shift_does_not_depend_on_where_the_data_lies_or_how_it_is_turned() -> None:
    reference, batch = normal(0, 200), normal(1, 40) + 0.3
    turn = torch.linalg.qr(normal(2, 4)).Q
    found = []
    for move in (lambda x: x, lambda x: 5 * (x @ turn) - 7):
        theirs, ours = moments_of(move(reference)), moments_of(move(batch))
        d = distance(ours, theirs, move(reference), 100, torch.Generator().manual_seed(0))
        found.append(shift(d, theirs))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("n_pool", [400, 60])
def test_p_values_of_a_shift_are_about_uniform_where_there_is_none(n_pool: int) -> None:
    # Heavy tails, and of the reference at hand only a part: neither is what the formulas of Gaussians expect.
    p_values = []
    for seed in range(150):
        x = normal(seed, 460).abs().pow(1.5)
        reference, batch = x[:400], x[400:]
        d = distance(moments_of(batch), moments_of(reference), reference[:n_pool], 60, torch.Generator().manual_seed(1))
        p_values.append(gamma_tail(d))
    share = float(np.mean(np.array(p_values) <= 0.1))
    assert 0.02 <= share <= 0.2, share


def test_distances_together_are_their_weighted_mean() -> None:
    found = [Distance(2.0, 1.0, 0.5), Distance(4.0, 2.0, 1.0)]
    assert together(found, [1, 1]) == pytest.approx((3.0, 1.5, 0.375))
    assert together(found, [1, 0]) == found[0]


def test_an_excess_is_beta_binomial_and_knows_how_uncertain_the_reference_is() -> None:
    assert excess(0, 100, 0, 100) == Comparison(pytest.approx(1.0), 0.0)
    few, many = excess(5, 100, 0, 20), excess(5, 100, 0, 20_000)
    assert few.effect == many.effect == 0.05
    assert many.p_value < 1e-6 < 0.01 < few.p_value
    # With a reference that is large it is the binomial tail.
    assert excess(9, 100, 30_000, 1_000_000).p_value == pytest.approx(stats.binom.sf(8, 100, 0.03), rel=0.01)
    assert excess(1, 100, 10, 100).effect < 0


def test_what_is_removed_by_design_is_expected_and_no_excess() -> None:
    rng, level = np.random.default_rng(0), 0.01
    removed = rng.binomial(200, level, size=2_000)  # of batches judged sample by sample; of the reference nothing was
    alarms = {
        share: np.mean([excess(int(x), 200, 0, 1_000, share).p_value <= 1e-3 for x in removed]) for share in (0, level)
    }
    assert alarms[0] > 0.05
    assert alarms[level] <= 2e-3
    assert excess(30, 200, 100, 1_000, 0.01).effect == pytest.approx(0.15 - 0.109)


def test_priors_by_chance_are_no_effect_and_a_real_change_is() -> None:
    rng = np.random.default_rng(0)
    reference = rng.multinomial(5_000, np.full(10, 0.1))
    same = [priors(rng.multinomial(200, np.full(10, 0.1)), reference) for _ in range(200)]
    assert np.mean([answer.p_value <= 0.05 for answer in same]) <= 0.1
    assert np.mean([answer.effect for answer in same]) <= 0.02
    other = priors(np.array([120, *[9] * 9]), reference)
    assert other.p_value < 1e-10
    assert 0.4 < other.effect < 0.5
    assert priors(np.array([5]), np.array([7])) == Comparison(1.0, 0.0)


# --- real digits ------------------------------------------------------------------------------------------------


@cache
def real_digits() -> tuple[Tensor, Tensor, Tensor]:
    digits = sklearn.datasets.load_digits()
    images_N1HW = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)[:, None]
    return images_N1HW, torch.from_numpy(digits.target).long(), oriented_gradients(images_N1HW, 7).double()


def digit_shifts(seed: int, rate: float, n_batch: int = 200) -> dict[int, Comparison]:
    """Label -> shift of digits of which the share `rate` got a patch and label 0; 1,000 others are the reference."""
    images_N1HW, labels_N, gradients_ND = real_digits()
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    known, new = order_N[:1_000], order_N[1_000 : 1_000 + n_batch]
    x_BCHW, y_B = images_N1HW[new], labels_N[new]
    poisoned = (y_B != 0).nonzero().squeeze(1)[: round(rate * n_batch)]
    x_BCHW[poisoned], y_B[poisoned] = BadNetsConfig(rate=0.05, size=3).apply(x_BCHW[poisoned]), 0
    z_ND, z_BD = gradients_ND[known], oriented_gradients(x_BCHW, 7).double()
    values_D, vectors_DD = torch.linalg.eigh(torch.cov(z_ND.T))
    map_Dr = vectors_DD[:, -32:] * values_D[-32:].rsqrt()
    shifts = {}
    for label in range(10):
        theirs, ours = (z[y == label] @ map_Dr for z, y in ((z_ND, labels_N[known]), (z_BD, y_B)))
        if len(ours) >= 10:
            found = distance(moments_of(ours), moments_of(theirs), theirs, 60, torch.Generator().manual_seed(label))
            shifts[label] = shift(found, moments_of(theirs))
    return shifts


def is_alarm(found: Comparison) -> bool:
    """As a batch of ten classes is judged by default: 23 tests share a level of .001."""
    return found.p_value <= 0.001 / 23 and found.effect >= 0.1


def test_clean_batches_raise_no_alarm() -> None:
    alarms = [label for seed in range(8) for label, one in digit_shifts(seed, 0.0).items() if is_alarm(one)]
    assert alarms == []  # of about 80


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_five_percent_of_badnets_move_their_class(rate: float) -> None:
    found = [digit_shifts(seed, rate) for seed in range(3)]
    assert all(is_alarm(shifts[0]) for shifts in found)
    assert not any(is_alarm(one) for shifts in found for label, one in shifts.items() if label != 0)
