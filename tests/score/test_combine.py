"""Fusing scorers by empirical p-values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.measure import auroc
from sanitize.score.combine import combined_suspicion, empirical_p_values


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(-1, 10), min_size=1, max_size=30))
def test_p_values_are_counted(reference: list[int], scores: list[int]) -> None:
    found_N = empirical_p_values(np.array(scores), np.sort(reference))
    counted = [(1 + sum(r >= s for r in reference)) / (1 + len(reference)) for s in scores]
    np.testing.assert_allclose(found_N, counted)


def test_p_values_of_normal_rows_are_valid() -> None:
    rng = np.random.default_rng(0)
    p_N = empirical_p_values(rng.normal(size=20_000), np.sort(rng.normal(size=1_000)))
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (p_N <= level).mean() == pytest.approx(level, abs=0.02)


def test_two_noisy_scorers_together_beat_each() -> None:
    rng = np.random.default_rng(1)
    anomalous_N = np.arange(4_000) < 400
    scores = [rng.normal(size=4_000) + 1.5 * anomalous_N for _ in range(2)]
    # In other units, monotone changes, and against contaminated references: none of it matters.
    scores = [np.exp(scores[0]) * 1e6, scores[1] ** 3]
    fused_N = combined_suspicion(scores, [np.sort(of) for of in scores])
    assert auroc(fused_N, anomalous_N) > max(auroc(of, anomalous_N) for of in scores) + 0.03


def test_the_worst_of_all_rows_is_the_most_suspicious() -> None:
    references = [np.arange(99.0), np.arange(9.0)]
    fused_N = combined_suspicion([np.array([1e9, 98.0, -1.0]), np.array([1e9, 8.0, -1.0])], references)
    assert fused_N == pytest.approx([np.mean(np.log([100, 10])), np.mean(np.log([50, 5])), 0])


def test_every_scorer_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="zip"):
        combined_suspicion([np.zeros(3), np.zeros(3)], [np.zeros(3)])
