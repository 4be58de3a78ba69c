"""RCA and RobustRealNVP for scikit-learn: `RCADetector().fit(X).predict(X)`, in pipelines and searches.

scikit-learn's signs: `score_samples` and `decision_function` are *lower* for more abnormal rows, `predict` gives them
-1. This is the only place in the library where a score has that sign.
"""

from typing import ClassVar, Self

import numpy as np
from numpy.random import RandomState
from numpy.typing import ArrayLike
from pydantic import ValidationError
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from sanitize.errors import DataError
from sanitize.score.rca import RCAConfig
from sanitize.score.robust_realnvp import RobustRealNVPConfig


class _Detector(OutlierMixin, BaseEstimator):
    """Both detectors. Subclasses name the estimator's config; scikit-learn reads the parameters from `__init__`."""

    _config: ClassVar[type[RCAConfig] | type[RobustRealNVPConfig]]
    _min_features: ClassVar[int] = 1

    def __init__(
        self,
        contamination: float = 0.1,
        config: RCAConfig | RobustRealNVPConfig | None = None,
        random_state: int | RandomState | None = 0,
    ) -> None:
        self.contamination = contamination
        self.config = config
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Fit on rows (N, D); NaN is a missing value, `y` is ignored.

        Raises:
            ValueError: X or a parameter cannot be used.
        """
        x_ND = self._rows(X, reset=True)
        seed = int(check_random_state(self.random_state).randint(2**31))
        try:
            settings = (self.config or self._config()).model_dump() | {"contamination": self.contamination}
            self.model_ = self._config.model_validate(settings).build().fit(x_ND, seed)
        except (DataError, ValidationError) as error:
            raise ValueError(str(error)) from error
        self.offset_ = float(np.percentile(self._negative_scores(x_ND), 100 * self.contamination))
        return self

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """Negative scores (N,), float64: lower is more abnormal."""
        check_is_fitted(self)
        return self._negative_scores(self._rows(X, reset=False))

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """`score_samples` minus their `contamination` quantile over the training rows; negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> np.ndarray:
        """-1 for outliers, +1 for inliers, int64 (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _rows(self, X: ArrayLike, *, reset: bool) -> np.ndarray:
        options = {"dtype": [np.float64, np.float32], "ensure_min_features": self._min_features if reset else 1}
        return np.asarray(validate_data(self, X, reset=reset, ensure_all_finite="allow-nan", **options))

    def _negative_scores(self, x_ND: np.ndarray) -> np.ndarray:
        return -self.model_.score(x_ND).double().numpy()

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class RCADetector(_Detector):
    """Robust collaborative autoencoders (`sanitize.score.rca`).

    Args:
        contamination: expected share of outliers, in (0, 0.5]: the model's eps, and the share `predict` calls outliers
            among the training rows.
        config: further settings, an RCAConfig; its own contamination is not used.
        random_state: seed.
    """

    _config = RCAConfig


class RobustRealNVPDetector(_Detector):
    """A robustly trained flow (`sanitize.score.robust_realnvp`); needs two columns or more.

    Args:
        contamination: expected share of outliers, in (0, 0.5]: the model's eps, and the share `predict` calls outliers
            among the training rows.
        config: further settings, a RobustRealNVPConfig; its own contamination is not used.
        random_state: seed.
    """

    _config = RobustRealNVPConfig
    _min_features = 2
