"""RCA and RobustRealNVP as scorers: fitted on a bounded hash-chosen sample of all embeddings, labels unseen.

One model for the whole run, not one a class. Both methods assume that anomalies are few among the rows they are fitted
on: true of a data set, where their share is the poisoning rate, and not of a class, half of which may be poison. They
were published for data without labels, small classes are too little to train a network on, and scores of one model can
be compared between classes. Normal samples in the wrong class are left to the scorers that look at labels
(`neighbours`, `toxic_direction`).

State while fitting: `max_fit` rows, the same however the data is sharded. Shapes: B rows of a batch, N fitted on, D
features.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.score.estimator import Estimator
from sanitize.score.rca import RCAConfig
from sanitize.score.robust_realnvp import RobustRealNVPConfig
from sanitize.score.scorer import BaseScorerConfig, Passes, row_hashes
from sanitize.streaming import HashSample


class AnomalyScorerConfig(BaseScorerConfig):
    """Settings of both scorers.

    Attributes:
        embedding: name of the embedding to score; RobustRealNVP needs two features or more.
        max_fit: most samples to fit on.
        model: settings of the estimator.
    """

    embedding: str = "pooled"
    max_fit: int = Field(default=20_000, ge=100)
    model: RCAConfig | RobustRealNVPConfig

    def build(self) -> "AnomalyScorer":
        """The scorer, not fitted yet."""
        return AnomalyScorer(self)


class RCAScorerConfig(AnomalyScorerConfig):
    """Reconstruction errors of robust collaborative autoencoders."""

    kind: Literal["rca"] = "rca"
    model: RCAConfig = RCAConfig()


class RobustRealNVPScorerConfig(AnomalyScorerConfig):
    """Negative log densities of a robustly trained flow."""

    kind: Literal["robust_realnvp"] = "robust_realnvp"
    model: RobustRealNVPConfig = RobustRealNVPConfig()


class AnomalyScorer:
    """Scorer: scores of an estimator that is fitted on a sample of all rows."""

    def __init__(self, config: AnomalyScorerConfig) -> None:
        self.config = config
        self.statistics: dict[int, dict[str, float]] = {}
        self._model: Estimator = config.model.build()
        self._is_fitted = False

    def fit(self, passes: Passes, compute: Compute) -> None:
        """One pass to draw the sample; without a single row, nothing is fitted."""
        seed = compute.seed_for("score", self.config.kind, "sample")
        sample = HashSample(self.config.max_fit)
        for batch in passes(self.config.embedding):
            sample.update(row_hashes(batch, seed), torch.cat([batch.z_BD, batch.labels_B[:, None].float()], 1))
        if not len(sample):
            return
        rows = sample.rows()
        del sample  # it holds the same rows once more
        self._model.fit(rows[:, :-1], compute.seed_for("score", self.config.kind, "fit"))
        self._is_fitted = True
        labels_N = rows[:, -1].long()
        self.statistics = {y: {"n_fitted": int((labels_N == y).sum())} for y in labels_N.unique().tolist()}

    def score(self, batch: EmbeddingBatch) -> Tensor:
        """Scores (B,), float32; a score depends on its row alone, not on the batch. Zeros where nothing was fitted."""
        return self._model.score(batch.z_BD) if self._is_fitted else torch.zeros(len(batch.keys))

    def state_dict(self) -> dict[str, Tensor]:
        """State of the estimator; empty where nothing was fitted."""
        return self._model.state_dict() if self._is_fitted else {}

    def load_state(self, state: Mapping[str, Tensor], statistics: dict[int, dict[str, float]]) -> None:
        """The inverse of `state_dict`."""
        self.statistics = statistics
        self._is_fitted = bool(state)
        if state:
            self._model.load_state(state)
