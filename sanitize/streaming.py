"""Statistics of data that is seen once, in any order, by any number of workers.

Every state here merges: `a.merge(b)` is what one pass over both halves would have given, and a state survives being
saved and loaded without losing a bit. B rows of a batch, D features, K classes. All sums are float64: the scatter of
a million rows loses the small directions in float32.
"""

import heapq
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor


class Moments:
    """Count, mean and scatter matrix of rows, updated by Chan, Golub & LeVeque (1979).

    Attributes:
        count: rows seen.
        mean_D: their mean, float64.
        scatter_DD: sum of (x - mean)(x - mean)^T, float64.
    """

    def __init__(self, n_features: int) -> None:
        self.count = 0
        self.mean_D = torch.zeros(n_features, dtype=torch.float64)
        self.scatter_DD = torch.zeros(n_features, n_features, dtype=torch.float64)

    def update(self, x_BD: Tensor) -> None:
        """Add rows of shape (B, D), any floating dtype, on any device."""
        if len(x_BD) == 0:
            return
        x_BD = x_BD.to("cpu", torch.float64)
        mean_D = x_BD.mean(0)
        centred_BD = x_BD - mean_D
        self._add(len(x_BD), mean_D, centred_BD.T @ centred_BD)

    def merge(self, other: Self) -> None:
        """Add all rows `other` has seen."""
        self._add(other.count, other.mean_D, other.scatter_DD)

    def _add(self, count: int, mean_D: Tensor, scatter_DD: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta_D = mean_D - self.mean_D
        self.scatter_DD = self.scatter_DD + scatter_DD + torch.outer(delta_D, delta_D) * (self.count * count / total)
        self.mean_D = self.mean_D + delta_D * (count / total)
        self.count = total

    def covariance(self, ddof: int = 1) -> Tensor:
        """Covariance matrix (D, D), float64. Raises ValueError with fewer than ddof + 1 rows."""
        if self.count <= ddof:
            raise ValueError(f"a covariance needs more than {ddof} rows, there are {self.count}")
        return self.scatter_DD / (self.count - ddof)

    def state_dict(self) -> dict[str, Tensor]:
        """Three tensors, lossless."""
        return {"count": torch.tensor(self.count), "mean": self.mean_D, "scatter": self.scatter_DD}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        moments = cls(len(state["mean"]))
        moments.count = int(state["count"])
        moments.mean_D, moments.scatter_DD = state["mean"].clone(), state["scatter"].clone()
        return moments


class ClassMoments:
    """`Moments` of each class; a class has a state from the first row on."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.of: dict[int, Moments] = {}

    def update(self, x_BD: Tensor, labels_B: Tensor) -> None:
        """Add rows (B, D) with integer labels (B,)."""
        for label in labels_B.unique().tolist():
            self.of.setdefault(label, Moments(self.n_features)).update(x_BD[labels_B == label])

    def merge(self, other: Self) -> None:
        """Add all rows `other` has seen, class by class."""
        for label, moments in other.of.items():
            self.of.setdefault(label, Moments(self.n_features)).merge(moments)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors named `LABEL.count`, `LABEL.mean`, `LABEL.scatter`."""
        return {f"{y}.{name}": t for y, moments in sorted(self.of.items()) for name, t in moments.state_dict().items()}

    @classmethod
    def from_state_dict(cls, n_features: int, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        classes = cls(n_features)
        for label in sorted({int(name.partition(".")[0]) for name in state}):
            one = {name: state[f"{label}.{name}"] for name in ("count", "mean", "scatter")}
            classes.of[label] = Moments.from_state_dict(one)
        return classes


class HashSample:
    """A uniform sample of at most `size` rows: those whose hash is smallest (bottom-k sampling).

    Which rows are in it depends on their hashes alone, never on order, sharding or workers, so the sample is the
    same however the data was streamed, and two samples merge without loss.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: dict[int, Tensor] = {}
        self._heap: list[int] = []  # negated hashes: the largest hash is on top, first to go

    def update(self, hashes: list[int], x_BD: Tensor) -> None:
        """Offer rows (B, D) with one hash each; a hash names its row, a row offered twice counts once."""
        for value, row_D in zip(hashes, x_BD, strict=True):
            if value in self._rows:
                continue
            if len(self._heap) < self.size:
                heapq.heappush(self._heap, -value)
            elif -value > self._heap[0]:
                del self._rows[-heapq.heapreplace(self._heap, -value)]
            else:
                continue
            self._rows[value] = row_D.clone()

    def merge(self, other: Self) -> None:
        """Offer every row of `other`."""
        for value, row_D in other._rows.items():
            self.update([value], row_D[None])

    def __len__(self) -> int:
        return len(self._rows)

    def hashes(self) -> list[int]:
        """The hashes of the sample, ascending."""
        return sorted(self._rows)

    def rows(self) -> Tensor:
        """The sample (N, D), in the order of the hashes."""
        return torch.stack([self._rows[value] for value in self.hashes()])
