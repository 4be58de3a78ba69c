"""What every kind of certificate is kept as: one row a test sample, and the statement that is proved about it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from sanitize.data.tables import ShardTables


class Certificates(ShardTables):
    """One row a certified sample, in the order of its shard: position, key, label, prediction (-1: abstains), radius,
    and what else the kind counts. `certificate.json`: kind, scope, parameters."""

    @cached_property
    def statement(self) -> dict[str, Any]:
        """kind; scope: what may change, how it is counted, what is not covered; parameters; confidence."""
        statement: dict[str, Any] = self.read_json("certificate.json")
        return statement

    def table(self) -> pa.Table:
        """All rows, with a column `shard`."""
        return pa.concat_tables(
            (rows := self.rows(shard)).append_column("shard", pa.array([shard] * len(rows), pa.string()))
            for shard in self.shards
        )

    def certified_accuracy(self, radii: Sequence[float]) -> list[float]:
        """Share of the samples that are predicted right and cannot be changed by a perturbation of each size.

        A smoothed classifier is constant at distances below its radius, a vote at up to its number of poisons: at the
        radius itself the former counts as changed.
        """
        table = self.table()
        right_N = table["prediction"].to_numpy() == table["label"].to_numpy()
        radius_N = table["radius"].to_numpy()
        reaches = np.greater if self.statement["open"] else np.greater_equal
        return [float(np.mean(right_N & reaches(radius_N, radius))) if len(right_N) else 0.0 for radius in radii]

    def summary(self) -> dict[str, Any]:
        """The statement, and certified accuracy at radii up to the largest that any sample has.

        Returns:
            `statement`, with `samples`, `abstained`, `clean_accuracy`, `certified_accuracy`: [[radius, share], ...].
        """
        table = self.table()
        predictions_N = table["prediction"].to_numpy()
        largest = float(max(table["radius"].to_numpy(), default=0))
        if self.statement["integral"]:
            radii = [float(n) for n in range(int(largest) + 1)]
        else:
            radii = [round(float(r), 4) for r in np.linspace(0, largest, 41)]
        return self.statement | {
            "samples": len(table),
            "abstained": int((predictions_N < 0).sum()),
            "clean_accuracy": float((predictions_N == table["label"].to_numpy()).mean()),
            "certified_accuracy": [list(pair) for pair in zip(radii, self.certified_accuracy(radii), strict=True)],
            "data": {"certificates": self.digest},
        }
