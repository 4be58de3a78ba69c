"""The protocol of scorers. A score is higher for a more suspicious sample, always; a scorer never drops anything.

To add a scorer: one file with its config, a subclass of `BaseScorerConfig`, and its class, a `Scorer`; and the config's
name in the union `ScorerConfig` (`stage.py`).

Shapes: B rows of a batch, N of a class, D features.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch

# Name of an embedding, or names of several, -> a new pass over it.
Passes = Callable[[str | Sequence[str]], Iterable[EmbeddingBatch]]


class Scorer(Protocol):
    """Fit on a stream that can be read several times, then score batch by batch.

    Attributes:
        statistics: label -> finite numbers about its class, for rules and the report.
    """

    statistics: dict[int, dict[str, float]]

    def fit(self, passes: Passes, compute: Compute) -> None:
        """Estimate the state; `passes(name)` starts a new pass over all rows of the embedding of that name."""
        ...

    def score(self, batch: EmbeddingBatch) -> Tensor:
        """Scores (B,), float32 and finite. A class that could not be fitted scores 0."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The fitted state as tensors, lossless."""
        ...

    def load_state(self, state: Mapping[str, Tensor], statistics: dict[int, dict[str, float]]) -> None:
        """The inverse of `state_dict`."""
        ...


class BaseScorerConfig(BaseModel, ABC):
    """Settings of a scorer.

    Attributes:
        rule: kind of the default rule (`sanitize.select`) for these scores; `scorer.json` has it.
        kind: name of the scorer.
        embedding: name of the embedding to score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: ClassVar[str] = "fdr"

    kind: str
    embedding: str

    @property
    def scored(self) -> str | tuple[str, ...]:
        """Names of the embeddings in a batch that is scored."""
        return self.embedding

    @abstractmethod
    def build(self) -> Scorer:
        """The scorer, not fitted yet."""


def row_hashes(batch: EmbeddingBatch, seed: int) -> list[int]:
    """One keyed 64-bit hash a row, from shard and position, for `HashSample`."""
    return position_hashes(batch.shard, batch.positions_B.tolist(), seed)


def position_hashes(shard: str, positions: Iterable[int], seed: int) -> list[int]:
    """The hashes of `row_hashes` for positions of a shard."""
    prefix = f"{seed}/{shard}/"
    return [
        int.from_bytes(hashlib.blake2b(f"{prefix}{position}".encode(), digest_size=8).digest(), "big")
        for position in positions
    ]


def by_label(batch: EmbeddingBatch) -> Iterable[tuple[int, Tensor]]:
    """(label, indices of its rows) for each label of a batch."""
    for label in batch.labels_B.unique().tolist():
        yield label, (batch.labels_B == label).nonzero().squeeze(1)
