"""Findings of `check_hygiene` that put samples into quarantine, whatever the scorers say."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sanitize.data.dataset import Dataset
from sanitize.data.tables import Hygiene
from sanitize.errors import ArtifactError


class Unclean(NamedTuple):
    """Findings of some kinds.

    Attributes:
        dataset: all samples.
        hygiene: findings; None without any.
        kinds: kinds that put a sample into quarantine.
    """

    dataset: Dataset
    hygiene: Hygiene | None
    kinds: Collection[str]

    def mask(self, slices: Mapping[str, slice]) -> np.ndarray:
        """True for samples with a finding, bool (N,).

        Args:
            slices: name of a shard -> slice of its usable samples among all.
        """
        found_N = np.zeros(max((at.stop for at in slices.values()), default=0), bool)
        if self.hygiene is None or not self.kinds:
            return found_N
        if self.hygiene.manifest().recipe.inputs["dataset"] != self.dataset.digest:
            raise ArtifactError(f"{self.hygiene.path} was not made from {self.dataset.path}; give artifacts of one run")
        for shard, at in slices.items():
            rows = self.dataset.rows(shard, ["position", "status"])
            usable = rows.filter(pc.equal(rows["status"], "ok"))["position"]
            found_N[at] = pc.is_in(usable, self._rows(shard)["position"].combine_chunks()).to_numpy()
        return found_N

    def reasons(self, shard: str) -> dict[int, list[dict[str, Any]]]:
        """Position -> reasons, of the samples of a shard with findings."""
        reasons: dict[int, list[dict[str, Any]]] = {}
        if self.hygiene is not None and self.kinds:
            for row in self._rows(shard).to_pylist():
                reasons.setdefault(row["position"], []).append({"stage": "hygiene", "reason": row["reason"]})
        return reasons

    def _rows(self, shard: str) -> pa.Table:
        assert self.hygiene is not None
        rows = self.hygiene.rows(shard, ["position", "kind", "reason"])
        return rows.filter(pc.is_in(rows["kind"], pa.array(sorted(self.kinds), pa.string())))
