"""Given-label margin: how much a model that was not fitted on a sample prefers another label for it.

Like confident learning (Northcutt, Jiang & Chuang, JAIR 2021), from out-of-fold predictions: samples are divided into
folds by a hash, a model of all other folds predicts each fold, and

    score = largest prediction of another label - prediction of the given label,        about [-1, 1].

The model is ridge regression of one-hot labels on an embedding made without labels. Its sufficient statistics are
sums: one pass gathers them for each fold, and the model without a fold is solved from the sums of the others. This is
exact for any number of samples, where `neighbours` has a bounded reference. It finds wrong labels, but misses most
dirty-label poison, because a linear model learns the trigger.

State while fitting: F matrices D x D and F K sums, float64; afterwards F models (D + 1) x K. Shapes: B rows of a batch,
D features, K labels, F folds.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from sanitize import exact
from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.score.scorer import BaseScorerConfig, Passes, row_hashes
from sanitize.streaming import Moments


class LabelMarginConfig(BaseScorerConfig):
    """Out-of-fold margin of a ridge classifier.

    Attributes:
        embedding: name of an embedding made without labels.
        n_folds: models; each is fitted on all folds but one.
        ridge: added to the eigenvalues of the covariance, in units of their mean.
    """

    kind: Literal["label_margin"] = "label_margin"
    embedding: str = "gradients"
    n_folds: int = Field(default=5, ge=2, le=100)
    ridge: float = Field(default=0.01, gt=0)

    def build(self) -> "LabelMargin":
        """The scorer, not fitted yet."""
        return LabelMargin(self)


class LeastSquares:
    """Sufficient statistics of ridge regression of one-hot labels; mergeable.

    Attributes:
        moments: moments of all rows.
        sums: label -> (D + 1,), the sum of its rows and their number, float64.
    """

    def __init__(self, n_features: int) -> None:
        self.moments = Moments(n_features)
        self.sums: dict[int, Tensor] = {}

    def update(self, z_BD: Tensor, labels_B: Tensor) -> None:
        """Add rows (B, D) with integer labels (B,)."""
        self.moments.update(z_BD)
        for label in labels_B.unique().tolist():
            self._add(label, with_one(z_BD[labels_B == label].double()).sum(0))

    def merge(self, other: Self) -> None:
        """Add all rows `other` has seen."""
        self.moments.merge(other.moments)
        for label, sum_E in other.sums.items():
            self._add(label, sum_E)

    def _add(self, label: int, sum_E: Tensor) -> None:
        self.sums[label] = self.sums.get(label, torch.zeros_like(sum_E)) + sum_E

    def solve(self, ridge: float, labels: Sequence[int]) -> Tensor:
        """Weights and, in the last row, intercepts (D + 1, K), float64; zeros for a label without rows.

        The intercept is not shrunk: scikit-learn's Ridge with alpha = ridge * tr(scatter) / D.
        """
        mean_D, scatter_DD = self.moments.mean_D, self.moments.scatter_DD
        nothing_E = torch.zeros(len(mean_D) + 1, dtype=torch.float64)
        sums_EK = torch.stack([self.sums.get(label, nothing_E) for label in labels], 1)
        count_K = sums_EK[-1]
        alpha = ridge * scatter_DD.trace() / len(mean_D) + torch.finfo(torch.float64).tiny
        ridged_DD = scatter_DD + alpha * torch.eye(len(mean_D), dtype=torch.float64)
        weights_DK = torch.linalg.solve(ridged_DD, sums_EK[:-1] - mean_D[:, None] * count_K)
        return torch.cat([weights_DK, (count_K / max(1, self.moments.count) - mean_D @ weights_DK)[None]])


class LabelMargin:
    """Scorer: margin of the best other label over the given one, predicted by a model of the other folds."""

    def __init__(self, config: LabelMarginConfig) -> None:
        self.config = config
        self.statistics: dict[int, dict[str, float]] = {}
        self._seed = 0
        self._labels_K = torch.zeros(0, dtype=torch.int64)
        self._models_FEK = torch.zeros(0, 0, 0, dtype=torch.float64)

    def fit(self, passes: Passes, compute: Compute) -> None:
        """One pass; with fewer than two labels nothing is fitted."""
        self._seed = compute.seed_for("score", "label_margin", "folds")
        folds: list[LeastSquares] = []
        for batch in passes(self.config.embedding):
            folds = folds or [LeastSquares(batch.z_BD.shape[1]) for _ in range(self.config.n_folds)]
            for fold, rows in self._folds(batch):
                folds[fold].update(batch.z_BD[rows], batch.labels_B[rows])
        labels = sorted({label for fold in folds for label in fold.sums})
        if len(labels) < 2:
            return
        self._labels_K = torch.tensor(labels)
        self._models_FEK = torch.stack([self._without(fold, folds).solve(self.config.ridge, labels) for fold in folds])
        for k, label in enumerate(labels):
            pairs = [
                (fold.sums[label], model_EK[:, k])
                for fold, model_EK in zip(folds, self._models_FEK, strict=True)
                if label in fold.sums
            ]
            count = sum(float(sum_E[-1]) for sum_E, _ in pairs)
            mean_prediction = sum(float(sum_E @ weights_E) for sum_E, weights_E in pairs) / count
            self.statistics[label] = {"n": count, "mean_prediction": mean_prediction}

    def _without(self, left_out: LeastSquares, folds: Sequence[LeastSquares]) -> LeastSquares:
        rest = LeastSquares(len(left_out.moments.mean_D))
        for fold in folds:
            if fold is not left_out:
                rest.merge(fold)
        return rest

    def _folds(self, batch: EmbeddingBatch) -> list[tuple[int, Tensor]]:
        """(fold, indices of its rows) for each fold of a batch."""
        fold_B = torch.tensor([value % self.config.n_folds for value in row_hashes(batch, self._seed)])
        return [(fold, (fold_B == fold).nonzero().squeeze(1)) for fold in fold_B.unique().tolist()]

    def score(self, batch: EmbeddingBatch) -> Tensor:
        """Margins (B,), float32; the prediction of an unknown label is 0. Zeros where nothing was fitted."""
        scores_B = torch.zeros(len(batch.keys))
        if len(self._labels_K) == 0:
            return scores_B
        own_BK = batch.labels_B[:, None] == self._labels_K
        for fold, rows in self._folds(batch):
            predictions_bK = exact.matmul(with_one(batch.z_BD[rows].double()), self._models_FEK[fold])
            rival_b = predictions_bK.masked_fill(own_BK[rows], -torch.inf).amax(1)
            scores_B[rows] = (rival_b - (predictions_bK * own_BK[rows]).sum(1)).float()
        return scores_B

    def state_dict(self) -> dict[str, Tensor]:
        """The models, their labels, and the seed of the folds."""
        return {"models": self._models_FEK, "labels": self._labels_K, "seed": torch.tensor([self._seed])}

    def load_state(self, state: Mapping[str, Tensor], statistics: dict[int, dict[str, float]]) -> None:
        """The inverse of `state_dict`."""
        self.statistics = statistics
        self._models_FEK, self._labels_K, self._seed = state["models"], state["labels"], int(state["seed"][0])


def with_one(z_BD: Tensor) -> Tensor:
    """Rows (B, D + 1) with a 1 at the end."""
    return torch.cat([z_BD, z_BD.new_ones(len(z_BD), 1)], 1)
