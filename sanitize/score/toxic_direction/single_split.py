"""One split a class, judged by its separation: for embeddings without images or logits beside them (`evidence: null`).

State while fitting: at most `MAX_SAMPLES` hash-chosen rows of each class, the same however the data is sharded, and the
scorer of the label check, which measures the first `CHECKED` of them.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.progress import track
from sanitize.score.neighbours import NeighboursConfig
from sanitize.score.scorer import Passes, by_label, row_hashes
from sanitize.score.toxic_direction.sides import Side, Sides
from sanitize.score.toxic_direction.split import ClassSplit, SplitConfig, fit_class, log_odds
from sanitize.score.toxic_direction.two_gaussians import Mixture
from sanitize.streaming import HashSample

MAX_SAMPLES = 10_000
CHECKED = 1_000


class SingleSplit:
    """Scorer: log-odds that a sample belongs to the suspicious one of its class's two components."""

    def __init__(self, config: SplitConfig, embedding: str, label_check: NeighboursConfig | None) -> None:
        self.config, self.embedding, self.label_check = config, embedding, label_check
        self.statistics: dict[int, dict[str, float]] = {}
        self._splits: dict[int, ClassSplit] = {}

    def fit(self, passes: Passes, compute: Compute) -> None:
        """One pass to draw the samples, two for the label check, then one split a class, each on its own."""
        seed = compute.seed_for("score", "toxic_direction", "sample")
        samples: dict[int, HashSample] = {}
        for batch in passes(self.embedding):
            hashes = row_hashes(batch, seed)
            for label, rows in by_label(batch):
                sample = samples.setdefault(label, HashSample(MAX_SAMPLES))
                sample.update([hashes[i] for i in rows.tolist()], batch.z_BD[rows])
        disagreement = self._disagreement(passes, samples, seed, compute)
        with track("split classes", len(samples), "classes") as advance:
            for label in sorted(samples):
                generator = compute.generator("score", "toxic_direction", label)
                sample = samples.pop(label)
                disagreement_N = torch.tensor([disagreement.get(value, math.nan) for value in sample.hashes()])
                self._splits[label] = fit_class(sample.rows(), self.config, generator, disagreement_N)
                self.statistics[label] = summary(self._splits[label])
                advance(1)

    def _disagreement(
        self, passes: Passes, samples: Mapping[int, HashSample], seed: int, compute: Compute
    ) -> dict[int, float]:
        """Hash of a row -> its label disagreement, for the first rows of each class's sample."""
        if self.label_check is None:
            return {}
        label_check = self.label_check.build()
        label_check.fit(passes, compute)
        wanted = {value for sample in samples.values() for value in sample.hashes()[:CHECKED]}
        found: dict[int, float] = {}
        for batch in passes(self.label_check.embedding):
            hashes = row_hashes(batch, seed)
            rows = [i for i, value in enumerate(hashes) if value in wanted]
            if rows:  # most batches of many small shards hold no row to check
                found |= zip((hashes[i] for i in rows), label_check.score(batch.take(rows)).tolist(), strict=True)
        return found

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
                "sides": torch.tensor([*split.sides.suspicious, *split.sides.rest, split.sides.by_labels]).double(),
            }
            state |= {f"{label}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor], statistics: dict[int, dict[str, float]]) -> None:
        """The inverse of `state_dict`."""
        self.statistics = statistics
        for label in sorted({int(name.partition(".")[0]) for name in state}):
            offset, separation, agreement, n_samples, minority_fraction = state[f"{label}.numbers"].tolist()
            suspicious, n, rest, n_rest, by_labels = state[f"{label}.sides"].tolist()
            self._splits[label] = ClassSplit(
                direction_D=state[f"{label}.direction"],
                offset=offset,
                mixture=Mixture(*state[f"{label}.mixture"].unbind()),
                separation=separation,
                agreement=agreement,
                n_samples=int(n_samples),
                minority_fraction=minority_fraction,
                sides=Sides(Side(suspicious, int(n)), Side(rest, int(n_rest)), bool(by_labels)),
            )


def summary(split: ClassSplit) -> dict[str, float]:
    """Class statistics, with the label disagreement where it was measured on both sides."""
    numbers = {
        "separation": split.separation,
        "minority_fraction": split.minority_fraction,
        "agreement": split.agreement,
    }
    suspicious, rest, by_labels = split.sides
    if not (suspicious.n and rest.n):
        return numbers
    return numbers | {
        "disagreement": suspicious.disagreement,
        "disagreement_of_rest": rest.disagreement,
        "side_by_labels": by_labels,
    }
