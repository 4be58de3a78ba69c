"""What every kind of certificate is kept as: one row a test sample, and the statement that is proved about it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from sanitize.data.tables import ShardTables


class Certificates(ShardTables):
    """One row a certified sample, in the order of its shard: position, key, label, prediction (-1: abstains), radius,
    and what else the kind counts. `certificate.json`: what is proved.

    A shard without such samples has no rows.
    """

    @cached_property
    def statement(self) -> dict[str, Any]:
        """kind, source; scope: what may change, how it is counted, what is not covered; parameters; confidence;
        radius_unit; integral: radii are counts; open: a prediction is certain below its radius, not at it."""
        statement: dict[str, Any] = self.read_json("certificate.json")
        return statement

    def table(self) -> pa.Table:
        """All rows, with a column `shard`."""
        return pa.concat_tables(
            (rows := self.rows(shard)).append_column("shard", pa.array([shard] * len(rows), pa.string()))
            for shard in self.shards
        )

    def summary(self) -> dict[str, Any]:
        """The statement, and certified accuracy at radii up to the largest that any sample has.

        Returns:
            `statement`, with `samples`, `abstained`, `clean_accuracy`, `certified_accuracy`: [[radius, share], ...].
        """
        table, proved = self.table(), self.statement
        predictions_N = table["prediction"].to_numpy()
        largest = float(table["radius"].to_numpy().max())
        radii = round_radii(largest, 1000, 1) if proved["integral"] else round_radii(largest, 50)
        shares = certified_accuracy(table, radii, proved["open"])
        inputs = self.manifest().recipe.inputs
        return proved | {
            "samples": len(table),
            "abstained": int((predictions_N < 0).sum()),
            "clean_accuracy": float((predictions_N == table["label"].to_numpy()).mean()),
            "certified_accuracy": [list(pair) for pair in zip(radii, shares, strict=True)],
            "data": inputs | {"certificates": self.digest},
        }


def round_radii(largest: float, n: int, smallest_step: float = 0.0) -> list[float]:
    """At most about `n` radii from 0 to the largest, a round number apart: 1, 2 or 5 times a power of ten."""
    if largest <= 0:
        return [0.0]
    power = 10.0 ** np.floor(np.log10(largest / n))
    step = max(smallest_step, next(f * power for f in (1, 2, 5, 10) if f * power * n >= largest * (1 - 1e-9)))
    return [round(i * step, 6) for i in range(int(largest / step + 1e-9) + 1)]


def certified_accuracy(table: pa.Table, radii: Sequence[float], is_open: bool) -> list[float]:
    """Share of the samples that are predicted right, whatever a perturbation of each size does.

    Args:
        table: label, prediction, radius.
        radii: sizes of perturbations.
        is_open: a prediction is certain below its radius; otherwise up to it.
    """
    right_N = table["prediction"].to_numpy() == table["label"].to_numpy()
    radius_N = table["radius"].to_numpy()
    reaches = np.greater if is_open else np.greater_equal
    return [float(np.mean(right_N & reaches(radius_N, radius))) for radius in radii]


def excerpt(curve: Sequence[Sequence[float]], n: int = 10) -> list[Sequence[float]]:
    """The points of a curve of `Certificates.summary` at about `n` round radii, for people."""
    step = curve[1][0] - curve[0][0] if len(curve) > 1 else 0.0
    shown = set(round_radii(curve[-1][0], n, step))
    return [point for point in curve if point[0] in shown]
