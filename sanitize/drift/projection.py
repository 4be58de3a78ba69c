"""A fixed map of an embedding to a few numbers of unit variance, so that moments of 10,000 classes stay small.

Principal components of all kept samples of the approved run, each scaled to variance 1. It is fitted once and stays
with all later versions of the reference: only moments in the same coordinates can be added. Shapes: B rows of a batch,
D features, r components.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import safetensors.torch
import torch
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch, Embeddings, Selection
from sanitize.drift.config import StatisticsConfig
from sanitize.errors import ArtifactError, DataError
from sanitize.stage import Work, stage
from sanitize.streaming import Moments


class Projection(Artifact):
    """`projection.safetensors`: `mean` (D,) and `map` (D, r), float64."""

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        tensors = self.read_tensors("projection.safetensors", "mean", "map")
        mean_D, map_Dr = tensors["mean"], tensors["map"]
        is_right = mean_D.ndim == 1 and map_Dr.ndim == 2 and len(mean_D) == len(map_Dr)
        if not (is_right and mean_D.isfinite().all() and map_Dr.isfinite().all()):
            raise ArtifactError(f"{self.path} does not hold a finite mean (D,) and map (D, r)")
        return tensors

    @property
    def n_components(self) -> int:
        """r."""
        return self._tensors["map"].shape[1]

    def __call__(self, z_BD: Tensor) -> Tensor:
        """Coordinates (B, r), float64."""
        return (z_BD.double() - self._tensors["mean"]) @ self._tensors["map"]


@stage(Projection, gpu=False, draws="nothing")
def fit_projection(
    config: StatisticsConfig, embeddings: Embeddings, selection: Selection, out: str, compute: Compute
) -> Work:
    """Principal components of one embedding of the kept samples.

    Args:
        config: name of the embedding, and most components.
        embeddings: embeddings of an approved run.
        selection: its verdicts.
        out: folder of the artifact.
        compute: not used; nothing is random.

    Raises:
        ConfigError: the embedding is missing.
        DataError: fewer than two samples were kept.
    """

    def write(part: Part) -> None:
        moments: Moments | None = None
        for shard in embeddings.shards:
            for batch, kept_B in with_verdicts(embeddings, selection, config.embedding, shard):
                moments = moments or Moments(batch.z_BD.shape[1])
                moments.update(batch.z_BD[kept_B])
        if moments is None or moments.count < 2:
            raise DataError(f"fewer than two samples of {embeddings.path} were kept: there is nothing to compare with")
        values_D, vectors_DD = torch.linalg.eigh(moments.covariance())
        values_D, vectors_DD = values_D.flip(0), vectors_DD.flip(1)
        # Directions without variance are left out: scaled up, their rounding errors would look like drift.
        r = min(config.n_components, int((values_D > 1e-6 * values_D[0]).sum()))
        map_Dr = vectors_DD[:, :r] * values_D[:r].rsqrt()
        state = {"mean": moments.mean_D, "map": map_Dr.contiguous()}
        part.write("projection.safetensors", safetensors.torch.save(state))

    return Work(write=write, config=config.model_dump(mode="json", include={"embedding", "n_components"}))


def with_verdicts(
    embeddings: Embeddings, selection: Selection, name: str, shard: str
) -> Iterator[tuple[EmbeddingBatch, Tensor]]:
    """Batches of the embedding `name` of a shard, each with a mask of its kept rows, bool (B,).

    Raises:
        ArtifactError: the verdicts belong to other samples.
    """
    positions_N, kept_N = verdicts_of(selection, shard)
    at = 0
    for batch in embeddings.batches(name, shards=[shard]):
        rows = slice(at, at := at + len(batch.keys))
        if not np.array_equal(positions_N[rows], batch.positions_B.numpy()):
            raise ArtifactError(f"{selection.path} does not judge the samples of {embeddings.path}, shard {shard}")
        yield batch, torch.from_numpy(kept_N[rows].copy())


def verdicts_of(selection: Selection, shard: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N,) of the readable samples of a shard, and a mask of the kept ones, bool (N,)."""
    verdicts = selection.rows(shard, ["position", "keep", "status"])
    verdicts = verdicts.filter(pc.not_equal(verdicts["status"], "unreadable"))
    return verdicts["position"].to_numpy(), verdicts["keep"].to_numpy()
