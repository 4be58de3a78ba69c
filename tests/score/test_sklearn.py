"""scikit-learn's own checks, and that the adapter says what the estimators say."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sanitize.score import RCA, RCAConfig, RobustRealNVP, RobustRealNVPConfig
from sanitize.score.sklearn import RCADetector, RobustRealNVPDetector

# Few epochs: the checks fit some hundred times, and ask for form, not for skill.
QUICK_RCA = RCAConfig(epochs=2, widths=(8,), n_codes=2, n_passes=3)
QUICK_NVP = RobustRealNVPConfig(epochs=2, widths=(8,))
DETECTORS = [RCADetector(config=QUICK_RCA), RobustRealNVPDetector(config=QUICK_NVP)]
both = pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: type(detector).__name__)


@parametrize_with_checks(DETECTORS)
def test_it_passes_scikit_learns_checks(estimator, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


@pytest.fixture
def x_ND() -> np.ndarray:
    """A line in four dimensions; the last 20 of 200 rows lie off it. One value is missing."""
    rng = np.random.default_rng(0)
    x_ND = np.outer(rng.normal(size=200), [1, 2, -1, 1]) + 0.1 * rng.normal(size=(200, 4))
    x_ND[180:] += rng.normal(scale=3, size=(20, 4))
    x_ND[3, 2] = np.nan
    return x_ND


@pytest.mark.parametrize(
    ("new", "model", "config"),
    [
        (RCADetector, RCA, QUICK_RCA),
        (RobustRealNVPDetector, RobustRealNVP, QUICK_NVP),
    ],
)
def test_scores_are_those_of_the_estimator_with_the_sign_turned(x_ND: np.ndarray, new, model, config) -> None:  # type: ignore[no-untyped-def]
    detector = new(contamination=0.2, config=config, random_state=7).fit(x_ND)
    seed = int(np.random.RandomState(7).randint(2**31))
    scores_N = model(config.model_copy(update={"contamination": 0.2})).fit(x_ND, seed).score(x_ND)
    np.testing.assert_array_equal(detector.score_samples(x_ND), -scores_N.double().numpy())


@both
def test_the_line_is_drawn_at_the_contamination(x_ND: np.ndarray, detector) -> None:  # type: ignore[no-untyped-def]
    detector = clone(detector).set_params(contamination=0.15).fit(x_ND)
    predictions_N = detector.predict(x_ND)
    assert (predictions_N == -1).sum() == 30
    np.testing.assert_array_equal(predictions_N == -1, detector.decision_function(x_ND) < 0)
    assert (
        detector.score_samples(x_ND)[predictions_N == -1].max() < detector.score_samples(x_ND)[predictions_N == 1].min()
    )


@pytest.mark.parametrize("detector", [RCADetector(), RobustRealNVPDetector()], ids=lambda d: type(d).__name__)
def test_rows_off_the_line_are_outliers_in_a_pipeline(x_ND: np.ndarray, detector) -> None:  # type: ignore[no-untyped-def]
    predictions_N = make_pipeline(StandardScaler(), detector).fit_predict(x_ND)
    assert (predictions_N[180:] == -1).mean() >= 0.8
    assert (predictions_N[:180] == -1).mean() <= 0.03


@both
@pytest.mark.parametrize("contamination", [-0.1, 0.6, float("nan")])
def test_impossible_contaminations_are_refused(x_ND: np.ndarray, detector, contamination: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="contamination"):
        clone(detector).set_params(contamination=contamination).fit(x_ND)


@both
def test_a_column_without_a_value_is_a_value_error(x_ND: np.ndarray, detector) -> None:  # type: ignore[no-untyped-def]
    x_ND[:, 1] = np.nan
    with pytest.raises(ValueError, match="nothing but missing values"):
        clone(detector).fit(x_ND)
