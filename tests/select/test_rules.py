import inspect
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sanitize.errors import ConfigError
from sanitize.select.rules import (
    ConformalRule,
    ContaminationRule,
    FDRRule,
    Rule,
    SeparationRule,
    benjamini_hochberg,
    cauchy_combination,
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
    if n < wanted:  # then removing the next score would remove more than `wanted`
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
    thresholds = ContaminationRule(rate=rate, factor=factor).build()(scores, {}).thresholds
    assert set(thresholds) == set(scores)
    for y, s_N in scores.items():
        assert n_flagged(s_N, thresholds[y]) == wanted
        assert set(s_N[s_N > thresholds[y]]) == set(np.sort(s_N)[n - wanted :])


def test_equal_scores_are_kept_together() -> None:
    scores = {0: np.array([1, 2, 2, 2, 3], np.float32), 1: np.zeros(100, np.float32)}
    thresholds = ContaminationRule(rate=0.4, factor=1).build()(scores, {}).thresholds
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
    thresholds = rule.build()(scores, separated(*separations)).thresholds
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
    assert rule.build()(LARGE, separated(1.0, 1.1, 0.9, 1.0)).levels == dict.fromkeys(range(4), 4.0)
    spread = separated(1.0, 2.0, 3.0, 4.1)  # median 2.5, deviations 1.5 0.5 0.5 1.6: natural level 6.9
    assert rule.build()(LARGE, spread).levels[0] == pytest.approx(4.4)
    between = separated(3.2, 3.4, 3.6, 3.6)  # median 3.5, deviations 0.3 0.1 0.1 0.1: natural level 3.94
    assert rule.build()(LARGE, between).levels[0] == pytest.approx(4.0)
    between = separated(3.3, 3.5, 3.7, 3.9)  # median 3.6, deviations 0.3 0.1 0.1 0.3: natural level 4.49
    assert rule.build()(LARGE, between).levels[0] == pytest.approx(4.4)
    between = separated(3.4, 3.4, 3.6, 3.7)  # median 3.5, deviations 0.1 0.1 0.1 0.2: natural level 3.94
    assert rule.build()(LARGE, between).levels[0] == pytest.approx(4.0)
    between = separated(3.7, 3.7, 3.9, 3.9)  # median 3.8, deviations 0.1: natural level 4.24
    assert rule.build()(LARGE, between).levels[0] == pytest.approx(3.8 + 3 * 1.4826 * 0.1)
    assert touched(rule, LARGE, 20, 20, 20, 20) == [0, 1, 2, 3]  # poison cannot hide behind poison


def test_a_run_where_nothing_stands_out_is_left_alone() -> None:
    scores = {y: np.ones(5, np.float32) for y in range(3)}
    assert set(SeparationRule().build()(scores, separated(0.0, 0.5, 1.0)).thresholds.values()) == {math.inf}
    assert set(SeparationRule().build()(scores, {}).thresholds.values()) == {math.inf}


def test_a_class_that_was_not_fitted_is_left_alone() -> None:
    scores = {y: np.ones(5, np.float32) for y in range(3)}
    thresholds = SeparationRule(floor=4).build()(scores, {0: {"separation": 1.0}, 1: {"separation": 50.0}}).thresholds
    assert thresholds[2] == math.inf
    assert thresholds[1] < math.inf


def test_where_evidence_has_decided_the_separation_decides_nothing() -> None:
    rule = SeparationRule()
    statistics = {y: {"separation": 50.0, "planted": float(y == 2)} for y in LARGE}
    found = rule.build()(LARGE, statistics)
    assert [y for y, threshold in found.thresholds.items() if threshold < math.inf] == [2]
    assert found.levels == {}
    assert found.uncapped == {2}
    assert rule.build()(LARGE, separated(50.0, 50.0)).uncapped == set()


def test_separation_without_a_measured_separation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="toxic_direction"):
        SeparationRule().build()({0: np.ones(5, np.float32)}, {0: {"top_variance": 1.0}})


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
    p_N = FDRRule().build()(scores, {}).p_values[1]
    null = [z for y in (0, 2) for z in standardised(scores[y])]
    slow = [(1 + sum(z >= s for z in null)) / (1 + len(null)) for s in standardised(scores[1])]
    np.testing.assert_allclose(p_N, slow)


@pytest.mark.parametrize("seed", range(8))
def test_fdr_removes_almost_nothing_from_exchangeable_classes(seed: int) -> None:
    """Heavy tails, another location and scale in each class: nothing parametric would survive this."""
    rng = np.random.default_rng(seed)
    scores = {y: (10 * y + (1 + y) * rng.standard_t(3, 1000)).astype(np.float32) for y in range(8)}
    thresholds = FDRRule(q=0.05).build()(scores, {}).thresholds
    removed = sum(n_flagged(s_N, thresholds[y]) for y, s_N in scores.items())
    assert removed <= 0.005 * 8000


@pytest.mark.parametrize("seed", range(4))
def test_fdr_finds_what_was_planted_in_one_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {y: rng.normal(3 * y, 1 + y, 1000).astype(np.float32) for y in range(5)}
    scores[2][:50] = rng.normal(6 + 8 * 3, 1, 50)  # eight standard deviations out
    thresholds = FDRRule(q=0.05).build()(scores, {}).thresholds
    assert (scores[2][:50] > thresholds[2]).mean() > 0.95
    false = sum(n_flagged(s_N, thresholds[y]) for y, s_N in scores.items()) - 50
    assert false <= 10


@pytest.mark.parametrize("seed", range(8))
def test_differences_within_the_resolution_of_a_scorer_are_not_rejected(seed: int) -> None:
    """Classes in which nearly all scores are equal: part of one class is a little higher, as by one neighbour more."""
    rng = np.random.default_rng(seed)
    scores = {y: (0.22 + 1e-5 * rng.normal(size=40)).astype(np.float32) for y in range(9)}
    scores[8][:19] += 0.02
    statistics = {y: {"resolution": 0.06} for y in scores}
    found = FDRRule().build()(scores, statistics)
    assert sum(n_flagged(s_N, found.thresholds[y]) for y, s_N in scores.items()) == 0
    scores[8][:19] += 0.5
    found = FDRRule().build()(scores, statistics)
    assert n_flagged(scores[8], found.thresholds[8]) == 19
    assert sum(n_flagged(s_N, found.thresholds[y]) for y, s_N in scores.items()) == 19


def test_one_class_alone_has_no_null_and_is_left_alone() -> None:
    scores = {0: np.append(np.zeros(99), 1e6).astype(np.float32)}
    assert FDRRule().build()(scores, {}).thresholds == {0: math.inf}


def test_constant_scores_are_no_evidence() -> None:
    scores = {y: np.full(50, y, np.float32) for y in range(3)}
    assert set(FDRRule().build()(scores, {}).thresholds.values()) == {math.inf}


# --- conformal --------------------------------------------------------------------------------------------------


@given(SCORES, SCORES)
def test_conformal_p_values_equal_their_definition(s_N: np.ndarray, trusted_M: np.ndarray) -> None:
    p_N = ConformalRule(q=0.5).build()({0: s_N}, {}, trusted_M).p_values[0]
    slow = [(1 + sum(t >= s for t in trusted_M)) / (len(trusted_M) + 1) for s in s_N]
    np.testing.assert_allclose(p_N, slow)


@given(SCORES, SCORES, SCORES)
def test_conformal_flags_what_benjamini_hochberg_rejects(
    a_N: np.ndarray, b_N: np.ndarray, trusted_M: np.ndarray
) -> None:
    rule, scores = ConformalRule(q=0.5), {0: a_N, 1: b_N}
    found = rule.build()(scores, {}, trusted_M)
    p_N = np.concatenate(list(found.p_values.values()))
    flagged_N = np.concatenate([s_N > found.thresholds[y] for y, s_N in scores.items()])
    n_rejected = slow_benjamini_hochberg(p_N.tolist(), 0.5)
    assert sorted(p_N[flagged_N]) == sorted(p_N)[:n_rejected]


def test_conformal_keeps_the_false_discovery_rate_it_promises() -> None:
    """800 data sets of 500 samples, 50 of them outliers, with 2,499 trusted ones.

    Theory: exactly q x the share of clean samples = 0.18, because no two scores are equal and each level q k / 500 is a
    multiple of the smallest p-value, 1 / 2,500. The mean of 800 is within 4 standard errors of its expectation in all
    but 1 of 16,000 runs; the seed is fixed besides.
    """
    rule, rng, clean_N, found, wrong = ConformalRule(q=0.2), np.random.default_rng(0), np.arange(500) >= 50, [], []
    for _ in range(800):
        scores_N = rng.standard_t(3, 500) + 6 * ~clean_N  # heavy tails: nothing parametric is known of the clean ones
        threshold = rule.build()({0: scores_N}, {}, rng.standard_t(3, 2499)).thresholds[0]
        flagged_N = scores_N > threshold
        found.append(flagged_N[~clean_N].mean())
        wrong.append((flagged_N & clean_N).sum() / max(1, flagged_N.sum()))
    standard_error = np.std(wrong) / math.sqrt(800)
    assert standard_error < 0.01
    assert abs(np.mean(wrong) - 0.2 * 0.9) < 4 * standard_error
    assert np.mean(found) > 0.8


def test_conformal_holds_for_the_very_samples_a_scorer_was_fitted_on() -> None:
    """The pipeline's case: fitted on contaminated data and judging it, with a fresh trusted sample. Distance to the
    mean in 20 dimensions, fitted on 100 rows: it does look less far for its own rows, so the rate is below q."""
    rule, rng, clean_N, wrong = ConformalRule(q=0.2), np.random.default_rng(1), np.arange(100) >= 10, []
    for _ in range(300):
        x_ND, trusted_MD = rng.normal(size=(100, 20)), rng.normal(size=(199, 20))
        x_ND[~clean_N, 0] += 8
        mean_D, precision_DD = x_ND.mean(0), np.linalg.inv(np.cov(x_ND.T))
        of_judged, of_trusted = (((z - mean_D) @ precision_DD * (z - mean_D)).sum(1) for z in (x_ND, trusted_MD))
        flagged_N = of_judged > rule.build()({0: of_judged}, {}, of_trusted).thresholds[0]
        wrong.append((flagged_N & clean_N).sum() / max(1, flagged_N.sum()))
    assert np.mean(wrong) < 0.2


@pytest.mark.parametrize(("q", "n_needed"), [(0.05, 19), (0.1, 9), (0.3, 3), (0.5, 1)])
def test_too_few_trusted_samples_are_an_error_that_says_how_many(q: float, n_needed: int) -> None:
    scores = {0: np.full(50, 9, np.float32)}
    with pytest.raises(ConfigError, match=f"at least {n_needed} trusted samples?, not {n_needed - 1}"):
        ConformalRule(q=q).build()(scores, {}, np.zeros(n_needed - 1))
    threshold = ConformalRule(q=q).build()(scores, {}, np.zeros(n_needed)).thresholds[0]
    assert n_flagged(scores[0], threshold) == 50  # with the fewest that are enough, all have to stand out together


# --- combined p-values ------------------------------------------------------------------------------------------


def test_the_combination_of_equal_p_values_is_the_same_p_value() -> None:
    p_N = np.array([1e-9, 1e-4, 0.03, 0.5, 0.9])
    np.testing.assert_allclose(cauchy_combination(np.stack([p_N] * 3)), p_N, rtol=1e-6)


def test_one_small_p_value_among_others_counts_about_as_in_bonferroni() -> None:
    for other in (0.1, 0.5, 1.0):
        combined = float(cauchy_combination(np.array([[1e-6], [other], [other]]))[0])
        assert combined == pytest.approx(3e-6, rel=1e-3)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 0.9, -0.9])
def test_combined_p_values_are_valid_whatever_the_correlation(correlation: float) -> None:
    """Two normal statistics, 400,000 draws. At levels of 1 % and below, where rejections happen, P(p <= level) exceeds
    the level by a tenth at most (theory: the excess vanishes with the level); 4 standard errors on top."""
    rng, n = np.random.default_rng(0), 400_000
    first, second = rng.normal(size=(2, n))
    second = correlation * first + math.sqrt(1 - correlation**2) * second
    p_N = cauchy_combination(torch.special.ndtr(-torch.from_numpy(np.stack([first, second]))).numpy())
    for level in (0.01, 0.001):
        assert (p_N <= level).mean() <= 1.1 * level + 4 * math.sqrt(level / n)
    if correlation == 0:  # then it is exact
        assert abs((p_N <= 0.01).mean() - 0.01) < 4 * math.sqrt(0.01 / n)


@given(st.lists(st.tuples(st.floats(1e-8, 1), st.floats(1e-8, 1)), min_size=1, max_size=20))
def test_combined_p_values_are_p_values_and_monotone(pairs: list[tuple[float, float]]) -> None:
    p_2N = np.array(pairs).T
    combined_N = cauchy_combination(p_2N)
    assert ((combined_N > 0) & (combined_N <= 1)).all()
    assert (cauchy_combination(p_2N * [[0.5], [1]]) <= combined_N + 1e-12).all()
    np.testing.assert_allclose(cauchy_combination(p_2N[::-1]), combined_N)


RULES = [ContaminationRule(rate=0.1), SeparationRule(), FDRRule(), ConformalRule()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_every_rule_follows_the_protocol(rule: Rule) -> None:
    scores = {y: np.random.default_rng(y).normal(size=50).astype(np.float32) for y in range(3)}
    trusted_M = np.random.default_rng(9).normal(size=50).astype(np.float32)
    built = rule.build()
    assert [*inspect.signature(built).parameters] == ["scores", "statistics", "trusted_M"]
    found = built(scores, {}, trusted_M)
    assert found.thresholds.keys() == scores.keys()
    assert (found.p_values is not None) == rule.gives_p_values
    if found.p_values is not None:
        assert found.p_values.keys() == scores.keys()
        assert all(((p_N > 0) & (p_N <= 1)).all() and len(p_N) == 50 for p_N in found.p_values.values())
    assert found.levels.keys() == (scores.keys() if rule.kind == "separation" else set())
    if rule.needs_trusted:
        with pytest.raises(ConfigError, match="trusted samples"):
            built(scores, {})
    else:  # what is not needed has no influence
        without = built(scores, {})
        assert without.thresholds == found.thresholds
        assert without.uncapped == found.uncapped == set()


def test_these_are_all_the_rules() -> None:
    assert {type(rule) for rule in RULES} == {*get_args(get_args(Rule)[0])}
