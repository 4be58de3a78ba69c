"""The toxic-direction scorer: a bounded sample of each class is split in two, then all samples are scored as a stream.

State while fitting: at most `MAX_SAMPLES` hash-chosen rows of each class, the same however the data is sharded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.progress import track
from sanitize.score.scorer import Passes, by_label, row_hashes
from sanitize.score.toxic_direction import ClassSplit, ToxicDirectionConfig, fit_class, log_odds
from sanitize.score.two_gaussians import Mixture
from sanitize.streaming import HashSample

MAX_SAMPLES = 10_000


class ToxicDirection:
    """Scorer: log-odds that a sample belongs to the suspicious one of its class's two components."""

    def __init__(self, config: ToxicDirectionConfig) -> None:
        self.config = config
        self.statistics: dict[int, dict[str, float]] = {}
        self._splits: dict[int, ClassSplit] = {}

    def fit(self, passes: Passes, compute: Compute) -> None:
        """One pass to draw the samples, then one split a class; classes do not influence each other."""
        seed = compute.seed_for("score", "toxic_direction", "sample")
        samples: dict[int, HashSample] = {}
        for batch in passes():
            hashes = row_hashes(batch, seed)
            for label, rows in by_label(batch):
                sample = samples.setdefault(label, HashSample(MAX_SAMPLES))
                sample.update([hashes[i] for i in rows.tolist()], batch.z_BD[rows])
        with track("split classes", len(samples), "classes") as advance:
            for label in sorted(samples):
                generator = compute.generator("score", "toxic_direction", label)
                split = fit_class(samples.pop(label).rows(), self.config, generator)
                self._splits[label] = split
                self.statistics[label] = {
                    "separation": split.separation,
                    "minority_fraction": split.minority_fraction,
                    "agreement": split.agreement,
                }
                advance(1)

    def score(self, batch: EmbeddingBatch) -> Tensor:
        """Log-odds (B,), float32."""
        scores_B = torch.zeros(len(batch.keys))
        for label, rows in by_label(batch):
            if label in self._splits:
                scores_B[rows] = log_odds(self._splits[label], batch.z_BD[rows])
        return scores_B

    def state_dict(self) -> dict[str, Tensor]:
        """Direction, offset and components of each class."""
        state: dict[str, Tensor] = {}
        for label, split in sorted(self._splits.items()):
            tensors = {
                "direction": split.direction_D,
                "mixture": torch.stack(list(split.mixture)),
                "numbers": torch.tensor(
                    [split.offset, split.separation, split.agreement, split.n_samples, split.minority_fraction],
                    dtype=torch.float64,
                ),
            }
            state |= {f"{label}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor], statistics: dict[int, dict[str, float]]) -> None:
        """The inverse of `state_dict`."""
        self.statistics = statistics
        for label in sorted({int(name.partition(".")[0]) for name in state}):
            offset, separation, agreement, n_samples, minority_fraction = state[f"{label}.numbers"].tolist()
            self._splits[label] = ClassSplit(
                direction_D=state[f"{label}.direction"],
                offset=offset,
                mixture=Mixture(*state[f"{label}.mixture"].unbind()),
                separation=separation,
                agreement=agreement,
                n_samples=int(n_samples),
                minority_fraction=minority_fraction,
            )
