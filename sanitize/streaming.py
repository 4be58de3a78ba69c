"""Statistics of data that is streamed once, in any order, by any number of workers.

Every state merges: `a.merge(b)` equals one pass over both halves up to rounding; saving and loading are lossless.
B rows of a batch, D features. All sums are float64: in float32, the scatter of a million rows loses small directions.
"""

import heapq
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor


class Moments:
    """Count, mean and scatter matrix of rows, updated by Chan, Golub & LeVeque (1979).

    Attributes:
        count: number of rows.
        mean_D: mean of the rows, float64.
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
        """Add the rows of `other`."""
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
    """`Moments` of each class that has rows, in `by_class`."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.by_class: dict[int, Moments] = {}

    def update(self, x_BD: Tensor, labels_B: Tensor) -> None:
        """Add rows (B, D) with integer labels (B,)."""
        for label in labels_B.unique().tolist():
            self.by_class.setdefault(label, Moments(self.n_features)).update(x_BD[labels_B == label])

    def merge(self, other: Self) -> None:
        """Add the rows of `other`, class by class."""
        for label, moments in other.by_class.items():
            self.by_class.setdefault(label, Moments(self.n_features)).merge(moments)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors named `LABEL.count`, `LABEL.mean`, `LABEL.scatter`."""
        return {
            f"{y}.{name}": t for y, moments in sorted(self.by_class.items()) for name, t in moments.state_dict().items()
        }

    @classmethod
    def from_state_dict(cls, n_features: int, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        classes = cls(n_features)
        for label in sorted({int(name.partition(".")[0]) for name in state}):
            one = {name: state[f"{label}.{name}"] for name in ("count", "mean", "scatter")}
            classes.by_class[label] = Moments.from_state_dict(one)
        return classes


class HashSample:
    """A uniform sample of at most `size` rows: those with the smallest hashes (bottom-k sampling).

    The sample depends on the hashes alone, not on order, sharding or workers, and two samples merge without loss.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: dict[int, Tensor] = {}
        self._heap: list[int] = []  # negated hashes: the largest hash is on top, first to go

    def update(self, hashes: list[int], x_BD: Tensor) -> None:
        """Offer rows (B, D) with one hash each; rows of one hash count once."""
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

    def shrink(self, size: int) -> None:
        """Lower the most rows that are kept."""
        self.size = min(size, self.size)
        while len(self._heap) > self.size:
            del self._rows[-heapq.heappop(self._heap)]

    def __len__(self) -> int:
        return len(self._rows)

    def hashes(self) -> list[int]:
        """Hashes of the sample, ascending."""
        return sorted(self._rows)

    def rows(self) -> Tensor:
        """The sample (N, D), in the order of the hashes."""
        return torch.stack([self._rows[value] for value in self.hashes()])
