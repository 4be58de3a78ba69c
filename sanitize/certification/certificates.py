"""The common form of all certificates: one row a test sample, and the statement that is proved."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sanitize.data.tables import ShardTables


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("not one line of printable text")
    return text


_Text = Annotated[str, Field(max_length=4000), AfterValidator(_one_line)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Radius = Annotated[float, Field(ge=0, le=1e12)]


class _Scope(BaseModel):
    model_config = ConfigDict(extra="allow")

    threat: _Text
    statement: _Text
    not_covered: tuple[_Text, ...] = Field(max_length=100)


class Proved(BaseModel):
    """A summary of certificates (`Certificates.summary`), read from an untrusted package."""

    model_config = ConfigDict(extra="allow")

    kind: _Text
    source: _Text
    radius_unit: _Text
    integral: bool
    open: bool
    parameters: dict[_Text, Any]
    scope: _Scope
    samples: int = Field(ge=1, lt=2**63)
    abstained: int = Field(ge=0, lt=2**63)
    clean_accuracy: _Share
    certified_accuracy: tuple[tuple[_Radius, _Share], ...] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _is_a_curve(self) -> Self:
        radii = [radius for radius, _ in self.certified_accuracy]
        if radii[0] != 0 or any(after - before < 1e-6 for before, after in pairwise(radii)):
            raise ValueError("the radii of certified_accuracy must start at 0 and grow")
        return self


class Certificates(ShardTables):
    """One row a certified sample, in the order of its shard: position, key, label, prediction (-1: abstains), radius,
    and counts of the kind. `certificate.json`: the statement that is proved.

    A shard without certified samples has no rows.
    """

    @cached_property
    def statement(self) -> dict[str, Any]:
        """kind, source; scope: threat, statement, exclusions; parameters; confidence; radius_unit; integral: True if
        radii are counts; open: True if a prediction is certified below its radius, False if also at it."""
        return self.read_object("certificate.json", "kind", "parameters", "scope", "integral", "open")

    def table(self) -> pa.Table:
        """All rows, with a column `shard`."""
        return pa.concat_tables(
            (rows := self.rows(shard)).append_column("shard", pa.array([shard] * len(rows), pa.string()))
            for shard in self.shards
        )

    def summary(self) -> dict[str, Any]:
        """The statement, and certified accuracy at radii up to the largest of any sample.

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
    """At most about `n` radii from 0 to the largest, in steps of 1, 2 or 5 times a power of ten."""
    if largest <= 0:
        return [0.0]
    power = 10.0 ** np.floor(np.log10(largest / n))
    step = max(smallest_step, next(f * power for f in (1, 2, 5, 10) if f * power * n >= largest * (1 - 1e-9)))
    return [round(i * step, 6) for i in range(int(largest / step + 1e-9) + 1)]


def certified_accuracy(table: pa.Table, radii: Sequence[float], is_open: bool) -> list[float]:
    """Share of the samples that are predicted correctly under every perturbation of each size.

    Args:
        table: label, prediction, radius.
        radii: sizes of perturbations.
        is_open: True if a prediction is certified below its radius, False if also at it.
    """
    right_N = table["prediction"].to_numpy() == table["label"].to_numpy()
    radius_N = table["radius"].to_numpy()
    reaches = np.greater if is_open else np.greater_equal
    return [float(np.mean(right_N & reaches(radius_N, radius))) for radius in radii]


def excerpt(curve: Sequence[Sequence[float]], n: int = 10) -> list[Sequence[float]]:
    """The points of a curve of `Certificates.summary` at about `n` round radii, for tables."""
    step = curve[1][0] - curve[0][0] if len(curve) > 1 else 0.0
    shown = set(round_radii(curve[-1][0], n, step))
    return [point for point in curve if point[0] in shown]
