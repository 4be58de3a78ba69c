"""Spectral signatures (Tran, Li & Madry, 2018, Algorithm 1), and a robust form after SPECTRE (Hayase & Kong, 2021).

Plain: per class, score = sum over the top directions v of ((z - mean) . v)^2. The projection is centred: several
public implementations project the uncentred embedding, and then the score depends on where the class mean lies.

Robust: per class, reduce to the leading principal directions, trim the farthest samples, whiten with mean and
covariance of the others, and score by quantum entropy (SPECTRE, section 4):
    score = w^T Q w / tr Q,   Q = exp(alpha (S - I) / (||S|| - 1)),   S = covariance of all whitened samples w.

State of a class: D x D moments while fitting, D x k afterwards; the robust estimates use a hash-chosen sample of at
most `max_samples` rows of k numbers. Shapes: B rows of a batch, N of a class, D features, k reduced features.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize import exact
from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.score.scorer import BaseScorerConfig, Passes, by_label, row_hashes
from sanitize.streaming import ClassMoments, HashSample


class SpectralConfig(BaseScorerConfig):
    """Spectral signatures of each class.

    Attributes:
        embedding: name of the embedding to score.
        whiten: None for Tran et al.'s score, "robust" for the quantum-entropy score after robust whitening.
        n_directions: singular vectors summed over (plain form).
        n_components: k, principal directions kept before whitening (robust form).
        trim_fraction: share of a class, in [0, 0.5), trimmed as farthest in each round of the robust estimate.
        alpha: sharpness of the entropy score; 0 is the whitened norm, large values the top direction alone.
        max_samples: most rows of a class for the robust estimates.
    """

    kind: Literal["spectral"] = "spectral"
    embedding: str = "penultimate"
    whiten: Literal["robust"] | None = None
    n_directions: int = Field(default=1, ge=1)
    n_components: int = Field(default=16, ge=1)
    trim_fraction: float = Field(default=0.3, ge=0, lt=0.5)
    alpha: float = Field(default=4.0, ge=0)
    max_samples: int = Field(default=20_000, ge=100)

    def build(self) -> "Spectral":
        """The scorer, not fitted yet."""
        return Spectral(self)


class Spectral:
    """Scorer: squared length of the centred embedding after one linear map a class."""

    def __init__(self, config: SpectralConfig) -> None:
        self.config = config
        self.statistics: dict[int, dict[str, float]] = {}
        self._maps: dict[int, tuple[Tensor, Tensor]] = {}  # label -> (centre_D, map_Dk), float64

    def fit(self, passes: Passes, compute: Compute) -> None:
        """One pass for the class moments, and one more for the sample that robust whitening needs."""
        moments: ClassMoments | None = None
        for batch in passes(self.config.embedding):
            moments = moments or ClassMoments(batch.z_BD.shape[1])
            moments.update(batch.z_BD, batch.labels_B)
        classes = moments.by_class if moments else {}
        for label, one in classes.items():
            if one.count < 3:
                continue
            values_D, vectors_DD = torch.linalg.eigh(one.covariance())
            k = self.config.n_directions if self.config.whiten is None else self.config.n_components
            basis_Dk = vectors_DD.flip(1)[:, : min(k, one.count - 1)]
            self._maps[label] = (one.mean_D, basis_Dk)
            self.statistics[label] = {"n": one.count, "top_variance": float(values_D[-1])}
        if self.config.whiten == "robust":
            self._whiten(passes, compute)

    def _whiten(self, passes: Passes, compute: Compute) -> None:
        seed = compute.seed_for("score", "spectral", "sample")
        samples = {label: HashSample(self.config.max_samples) for label in self._maps}
        for batch in passes(self.config.embedding):
            hashes = row_hashes(batch, seed)
            for label, rows in by_label(batch):
                if label in samples:
                    samples[label].update([hashes[i] for i in rows.tolist()], self._reduced(label, batch.z_BD[rows]))
        for label, sample in samples.items():
            mean_D, basis_Dk = self._maps[label]
            y_Nk = sample.rows()
            centre_k, whitener_kk = robust_whitening(y_Nk, self.config.trim_fraction)
            root_kk = quantum_entropy_root((y_Nk - centre_k) @ whitener_kk, self.config.alpha)
            self._maps[label] = (mean_D + basis_Dk @ centre_k, basis_Dk @ whitener_kk @ root_kk)

    def _reduced(self, label: int, z_BD: Tensor) -> Tensor:
        centre_D, map_Dk = self._maps[label]
        return exact.matmul(z_BD.double() - centre_D, map_Dk)

    def score(self, batch: EmbeddingBatch) -> Tensor:
        """Scores (B,), float32, >= 0."""
        scores_B = torch.zeros(len(batch.keys), dtype=torch.float64)
        for label, rows in by_label(batch):
            if label in self._maps:
                scores_B[rows] = exact.total(self._reduced(label, batch.z_BD[rows]).square())
        return scores_B.float()

    def state_dict(self) -> dict[str, Tensor]:
        """Centre and map of each class."""
        return {
            f"{label}.{name}": tensor.contiguous()
            for label, pair in sorted(self._maps.items())
            for name, tensor in zip(("centre", "map"), pair, strict=True)
        }

    def load_state(self, state: Mapping[str, Tensor], statistics: dict[int, dict[str, float]]) -> None:
        """The inverse of `state_dict`."""
        self.statistics = statistics
        labels = {int(name.partition(".")[0]) for name in state}
        self._maps = {label: (state[f"{label}.centre"], state[f"{label}.map"]) for label in sorted(labels)}


def robust_whitening(y_Nk: Tensor, trim_fraction: float, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """Mean and inverse square root of the covariance, estimated without the farthest `trim_fraction` of the rows.

    Each round measures Mahalanobis distances under the current estimate and estimates again from the nearest rows.

    Args:
        y_Nk: rows of one class.
        trim_fraction: share of the rows left out as farthest, in [0, 0.5).
        rounds: rounds of trimming.

    Returns:
        (centre_k, whitener_kk), float64; (y - centre) @ whitener has about unit covariance up to a constant.
    """
    n_kept = max(2, round(len(y_Nk) * (1 - trim_fraction)))
    kept_Nk = y_Nk
    for _ in range(rounds):
        centre_k = kept_Nk.mean(0)
        values_k, vectors_kk = torch.linalg.eigh(torch.cov(kept_Nk.T).reshape(y_Nk.shape[1], -1))
        # The floor keeps directions without variance from being scaled up: rounding would decide the score.
        floor = values_k[-1].clamp(min=1e-30) * 1e-6
        whitener_kk = vectors_kk * values_k.clamp(min=floor).rsqrt() @ vectors_kk.T
        distance_N = ((y_Nk - centre_k) @ whitener_kk).square().sum(1)
        nearest = distance_N.argsort(stable=True)[:n_kept]
        kept_Nk = y_Nk[nearest.sort().values]
    return centre_k, whitener_kk


def quantum_entropy_root(w_Nk: Tensor, alpha: float) -> Tensor:
    """Square root (k, k) of Q / tr Q, so that the squared length of w @ root is the quantum-entropy score of w."""
    covariance_kk = (w_Nk.T @ w_Nk) / max(1, len(w_Nk) - 1)
    values_k, vectors_kk = torch.linalg.eigh(covariance_kk)
    excess = (values_k[-1] - 1).abs().clamp(min=1e-12)
    log_q_k = alpha * (values_k - 1) / excess
    weights_k = (log_q_k - log_q_k.logsumexp(0)).exp()  # divided by the trace before exp can overflow
    return vectors_kk * weights_k.sqrt() @ vectors_kk.T
