import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sanitize.errors import ConfigError
from sanitize.select.rules import (
    ContaminationRule,
    FDRRule,
    SeparationRule,
    benjamini_hochberg,
    keep_all_but,
    standardised,
)

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=40).map(lambda values: np.array(values, np.float32))


def n_flagged(s_N: np.ndarray, threshold: float) -> int:
    return int((s_N > threshold).sum())


# --- keep_all_but -----------------------------------------------------------------------------------------------


@given(SCORES, st.integers(-2, 45))
def test_at_most_so_many_lie_above_and_only_ties_make_it_fewer(s_N: np.ndarray, n_removed: int) -> None:
    threshold = keep_all_but(s_N, n_removed)
    n = n_flagged(s_N, threshold)
    wanted = min(max(n_removed, 0), len(s_N))
    assert n <= wanted
    if n < wanted:  # then removing the next score would mean removing more than were asked for
        n_with_ties = int((s_N >= s_N[s_N <= threshold].max()).sum())
        assert n_with_ties > wanted


@given(st.lists(st.floats(-1e6, 1e6, width=32), unique=True, min_size=1, max_size=40), st.integers(0, 45))
def test_without_ties_exactly_the_highest_go(values: list[float], n_removed: int) -> None:
    s_N = np.array(values, np.float32)
    flagged = s_N[s_N > keep_all_but(s_N, n_removed)]
    assert sorted(flagged.tolist()) == sorted(s_N.tolist())[len(s_N) - min(n_removed, len(s_N)) :]


# --- contamination ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "rate", "factor", "wanted"),
    [(1000, 0.02, 1.5, 30), (1000, 0.02, 1.0, 20), (50, 0.1, 1.5, 8), (10, 0.01, 1.5, 0)],
)
def test_contamination_removes_its_share_of_every_class(n: int, rate: float, factor: float, wanted: int) -> None:
    rng = np.random.default_rng(0)
    scores = {y: rng.permutation(n).astype(np.float32) + 100 * y for y in range(3)}
    thresholds = ContaminationRule(rate=rate, factor=factor).thresholds(scores, {})
    assert set(thresholds) == set(scores)
    for y, s_N in scores.items():
        assert n_flagged(s_N, thresholds[y]) == wanted
        assert set(s_N[s_N > thresholds[y]]) == set(np.sort(s_N)[n - wanted :])


def test_equal_scores_are_kept_together() -> None:
    scores = {0: np.array([1, 2, 2, 2, 3], np.float32), 1: np.zeros(100, np.float32)}
    thresholds = ContaminationRule(rate=0.4, factor=1).thresholds(scores, {})
    assert n_flagged(scores[0], thresholds[0]) == 1
    assert n_flagged(scores[1], thresholds[1]) == 0


@pytest.mark.parametrize("rate", [0, -0.1, 0.6, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValidationError):
        ContaminationRule(rate=rate)


# --- separation -------------------------------------------------------------------------------------------------


def separated(*values: float) -> dict[int, dict[str, float]]:
    return {y: {"separation": value} for y, value in enumerate(values)}


LARGE = {y: np.resize(np.array([-5, -1, 0, 1, 5], np.float32), 600) for y in range(4)}
SMALL = {y: s_N[:40] for y, s_N in LARGE.items()}


def touched(rule: SeparationRule, scores: dict[int, np.ndarray], *separations: float) -> list[int]:
    thresholds = rule.thresholds(scores, separated(*separations))
    assert set(thresholds) == set(scores)
    assert set(thresholds.values()) <= {math.inf, rule.log_odds}
    return [y for y, threshold in thresholds.items() if threshold < math.inf]


def test_separation_touches_only_classes_above_the_floor() -> None:
    rule = SeparationRule(floor=6.0)
    assert touched(rule, LARGE, 1.0, 1.0, 1.0, 6.0) == []
    assert touched(rule, LARGE, 1.0, 1.0, 1.0, 6.01) == [3]
    assert touched(rule, LARGE, 50.0, 1.0, 1.0, 7.0) == [0, 3]
    assert touched(SeparationRule(floor=6.0, log_odds=2.0), LARGE, 1, 1, 1, 50) == [3]


def test_small_classes_have_a_floor_of_their_own() -> None:
    rule = SeparationRule(floor=4.0, small_class_floor=8.0, small_class=500)
    assert touched(rule, SMALL, 1.0, 1.0, 1.0, 7.9) == []
    assert touched(rule, SMALL, 1.0, 1.0, 1.0, 8.1) == [3]
    assert touched(rule, SMALL | {3: LARGE[3]}, 1.0, 1.0, 7.9, 7.9) == [3]


def test_the_level_rises_where_the_classes_of_the_run_differ_but_never_far() -> None:
    """median + 3 robust standard deviations of the separations, between the floor and a tenth more."""
    rule = SeparationRule(floor=4.0)
    assert rule.levels(LARGE, separated(1.0, 1.1, 0.9, 1.0)) == dict.fromkeys(range(4), 4.0)
    spread = separated(1.0, 2.0, 3.0, 4.1)  # median 2.5, deviations 1.5 0.5 0.5 1.6: natural level 6.9
    assert rule.levels(LARGE, spread)[0] == pytest.approx(4.4)
    between = separated(3.2, 3.4, 3.6, 3.6)  # median 3.5, deviations 0.3 0.1 0.1 0.1: natural level 3.94
    assert rule.levels(LARGE, between)[0] == pytest.approx(4.0)
    between = separated(3.3, 3.5, 3.7, 3.9)  # median 3.6, deviations 0.3 0.1 0.1 0.3: natural level 4.49
    assert rule.levels(LARGE, between)[0] == pytest.approx(4.4)
    between = separated(3.4, 3.4, 3.6, 3.7)  # median 3.5, deviations 0.1 0.1 0.1 0.2: natural level 3.94
    assert rule.levels(LARGE, between)[0] == pytest.approx(4.0)
    between = separated(3.7, 3.7, 3.9, 3.9)  # median 3.8, deviations 0.1: natural level 4.24
    assert rule.levels(LARGE, between)[0] == pytest.approx(3.8 + 3 * 1.4826 * 0.1)
    assert touched(rule, LARGE, 20, 20, 20, 20) == [0, 1, 2, 3]  # poison cannot hide behind poison


def test_a_run_where_nothing_stands_out_is_left_alone() -> None:
    scores = {y: np.ones(5, np.float32) for y in range(3)}
    assert set(SeparationRule().thresholds(scores, separated(0.0, 0.5, 1.0)).values()) == {math.inf}
    assert set(SeparationRule().thresholds(scores, {}).values()) == {math.inf}


def test_a_class_that_was_not_fitted_is_left_alone() -> None:
    scores = {y: np.ones(5, np.float32) for y in range(3)}
    thresholds = SeparationRule(floor=4).thresholds(scores, {0: {"separation": 1.0}, 1: {"separation": 50.0}})
    assert thresholds[2] == math.inf
    assert thresholds[1] < math.inf


def test_separation_without_a_measured_separation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="toxic_direction"):
        SeparationRule().thresholds({0: np.ones(5, np.float32)}, {0: {"top_variance": 1.0}})


# --- fdr --------------------------------------------------------------------------------------------------------


def slow_benjamini_hochberg(p_N: list[float], q: float) -> int:
    """Straight from the paper: the largest k with p_(k) <= k q / n."""
    ordered = sorted(p_N)
    return max([k for k in range(1, len(p_N) + 1) if ordered[k - 1] <= q * k / len(p_N)], default=0)


@given(
    st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.05, 1.0])), min_size=1, max_size=30),
    st.sampled_from([0.01, 0.05, 0.3]),
)
def test_benjamini_hochberg_equals_its_definition(p_N: list[float], q: float) -> None:
    assert benjamini_hochberg(np.array(p_N), q) == slow_benjamini_hochberg(p_N, q)


def test_p_values_count_the_other_classes_scores_that_are_as_high() -> None:
    rng = np.random.default_rng(0)
    scores = {y: rng.normal(y, 1 + y, 50).astype(np.float32) for y in range(3)}
    p_N = FDRRule().p_values(scores, 1)
    null = [z for y in (0, 2) for z in standardised(scores[y])]
    slow = [(1 + sum(z >= s for z in null)) / (1 + len(null)) for s in standardised(scores[1])]
    np.testing.assert_allclose(p_N, slow)


@pytest.mark.parametrize("seed", range(8))
def test_fdr_removes_almost_nothing_from_exchangeable_classes(seed: int) -> None:
    """Heavy tails, another location and scale in each class: nothing parametric would survive this."""
    rng = np.random.default_rng(seed)
    scores = {y: (10 * y + (1 + y) * rng.standard_t(3, 1000)).astype(np.float32) for y in range(8)}
    thresholds = FDRRule(q=0.05).thresholds(scores, {})
    removed = sum(n_flagged(s_N, thresholds[y]) for y, s_N in scores.items())
    assert removed <= 0.005 * 8000


@pytest.mark.parametrize("seed", range(4))
def test_fdr_finds_what_was_planted_in_one_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {y: rng.normal(3 * y, 1 + y, 1000).astype(np.float32) for y in range(5)}
    scores[2][:50] = rng.normal(6 + 8 * 3, 1, 50)  # eight standard deviations out
    thresholds = FDRRule(q=0.05).thresholds(scores, {})
    assert (scores[2][:50] > thresholds[2]).mean() > 0.95
    false = sum(n_flagged(s_N, thresholds[y]) for y, s_N in scores.items()) - 50
    assert false <= 10


def test_one_class_alone_has_no_null_and_is_left_alone() -> None:
    scores = {0: np.append(np.zeros(99), 1e6).astype(np.float32)}
    assert FDRRule().thresholds(scores, {}) == {0: math.inf}


def test_constant_scores_are_no_evidence() -> None:
    scores = {y: np.full(50, y, np.float32) for y in range(3)}
    assert set(FDRRule().thresholds(scores, {}).values()) == {math.inf}
