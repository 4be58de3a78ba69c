"""Intervals against scipy's own and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sanitize.redteaming import clopper_pearson, estimate

COUNTS = st.integers(1, 400).flatmap(lambda whole: st.tuples(st.integers(0, whole), st.just(whole)))


@given(COUNTS, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_binomial_interval_is_scipys(count: tuple[int, int], level: float) -> None:
    expected = stats.binomtest(*count).proportion_ci(level, method="exact")
    assert clopper_pearson(*count, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(COUNTS)
def test_one_repeat_has_the_binomial_interval(count: tuple[int, int]) -> None:
    found = estimate([count], 0.95)
    assert found is not None
    assert found == (count[0] / count[1], *clopper_pearson(*count, 0.95))


@given(st.lists(COUNTS, min_size=2, max_size=6))
def test_the_interval_holds_both_and_the_mean(counts: list[tuple[int, int]]) -> None:
    shares = np.array([part / whole for part, whole in counts])
    found = estimate(counts, 0.95)
    assert found is not None
    assert found.mean == pytest.approx(shares.mean())
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    low, high = clopper_pearson(*(sum(column) for column in zip(*counts, strict=True)), 0.95)
    assert found.low <= low
    assert found.high >= high
    if shares.std():
        t_low, t_high = stats.t.interval(0.95, len(shares) - 1, shares.mean(), stats.sem(shares))
        assert found.low == pytest.approx(min(low, max(0, t_low)))
        assert found.high == pytest.approx(max(high, min(1, t_high)))


def test_seeds_that_differ_are_less_sure_than_their_counts() -> None:
    found = estimate([(1000, 1000), (900, 1000)], 0.95)
    assert found is not None
    # By hand: the mean .95, standard error .05, and Student's 12.706 of one degree of freedom.
    assert (found.mean, found.low, found.high) == pytest.approx((0.95, 0.95 - 12.706 * 0.05, 1.0), abs=1e-3)


def test_three_perfect_seeds_are_no_certainty() -> None:
    found = estimate([(20, 20)] * 3, 0.95)
    assert found is not None
    assert found.low == pytest.approx(math.pow(0.025, 1 / 60))  # all of 60: low solves low^60 = .025
    assert found.high == 1


def test_repeats_with_nothing_to_count_are_left_out() -> None:
    assert estimate([(0, 0), (3, 4)], 0.95) == estimate([(3, 4)], 0.95)
    assert estimate([(0, 0), (0, 0)], 0.95) is None
