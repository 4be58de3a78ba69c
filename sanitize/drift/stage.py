"""Comparison of a batch of new data with the reference: a verdict, and the reasons in plain words.

The tests of `distance.py` run for every class and for all classes together. An alarm needs a p-value at most the level
divided by the number of tests (Bonferroni), and an effect of at least its limit.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.data.class_names import class_name
from sanitize.drift.distance import Comparison, Distance, distance, excess, gamma_tail, priors, shift, together
from sanitize.drift.projection import Projection
from sanitize.drift.statistics import CALIBRATE, FIT, Statistics
from sanitize.errors import ArtifactError
from sanitize.progress import track
from sanitize.stage import Work, stage
from sanitize.streaming import Moments

Verdict = Literal["accept", "hold", "refit"]
DriftTestName = Literal["shift", "removed", "priors", "unreadable", "unknown"]


class DriftConfig(BaseModel):
    """When a batch is held.

    Attributes:
        level: probability of any alarm for a batch from the distribution of the reference.
        min_samples: fewest samples of a class, in batch and reference, to compare it.
        n_draws: draws from the reference for the null distribution of a shift.
        shift: limit of a class's shift, in units of the class's variance.
        overall_shift: limit of the mean shift of all classes, in the same units.
        removed: limit of the excess of a class's removed share, in [0, 1].
        overall_removed: limit of the excess of the removed share of all samples.
        unreadable: limit of the excess of the unreadable share.
        priors: limit of the total variation distance of the class shares, in [0, 1].
        broad: share of the classes that must have shifted for verdict refit instead of hold: the data as a whole has
            changed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: float = Field(default=0.001, gt=0, lt=1)
    min_samples: int = Field(default=10, ge=4)
    n_draws: int = Field(default=200, ge=20)
    shift: float = Field(default=0.1, ge=0)
    overall_shift: float = Field(default=0.05, ge=0)
    removed: float = Field(default=0.05, ge=0, le=1)
    overall_removed: float = Field(default=0.02, ge=0, le=1)
    unreadable: float = Field(default=0.02, ge=0, le=1)
    priors: float = Field(default=0.1, ge=0, le=1)
    broad: float = Field(default=0.5, gt=0, le=1)


class Drift(Artifact):
    """`drift.json`: verdict, reasons, and the result of every test."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """`verdict`; `reasons`; `level` of one test; `tests`: test, label (None: all), result, limit, alarm;
        `classes`: label -> samples here and in the reference; `class_names`: label -> name, if there are names."""
        return self.read_object("drift.json", "verdict", "reasons")


class DriftTest(NamedTuple):
    """A test: its name, its class (None: all classes), its result, and the limit of the effect."""

    test: DriftTestName
    label: int | None
    result: Comparison
    limit: float


@stage(Drift, version=3, gpu=False)
def check_drift(
    config: DriftConfig,
    reference: Statistics,
    batch: Statistics,
    projection: Projection,
    out: str,
    compute: Compute,
    *,
    by_design: float = 0.0,
    names: Mapping[int, str] | None = None,
) -> Work:
    """Compare the statistics of a batch with those of the reference.

    Args:
        config: the limits.
        reference: statistics of the reference, in the coordinates of `projection`.
        batch: statistics of the batch, in the same coordinates.
        projection: projection of the reference.
        out: folder of the artifact.
        compute: seed of the draws.
        by_design: share of clean samples, in [0, 1), that is removed from batches, which are judged sample by sample,
            but was not removed from the reference.
        names: names of the classes of the reference, for the reasons.

    Raises:
        ArtifactError: the statistics are in other coordinates.
    """
    for statistics in (reference, batch):
        if statistics.info["projection"] != projection.digest:
            raise ArtifactError(f"{statistics.path} was made with another projection than {projection.path}")

    def write(part: Part) -> None:
        shifts = _shifts(config, reference, batch, projection, compute)
        found = [*shifts, *_counted(config, reference, batch, by_design)]
        part.write_json("drift.json", _judged(config, found, reference, batch, known))

    known = {label: name for label, name in sorted((names or {}).items()) if label in batch.counts}
    shown = {"class_names": {str(label): name for label, name in known.items()}} if known else {}
    return Work(write=write, config=config.model_dump(mode="json") | {"by_design": by_design} | shown)


def _shifts(
    config: DriftConfig, reference: Statistics, batch: Statistics, projection: Projection, compute: Compute
) -> Iterator[DriftTest]:
    pools = _pools(reference, projection)
    here, there = batch.moments.by_class, reference.moments.by_class
    labels = [y for y in sorted(here.keys() & there.keys()) if _is_compared(config, here[y], there[y], pools.get(y))]
    distances: list[Distance] = []
    with track("compare classes", len(labels), "classes") as advance:
        for label in labels:
            generator = compute.generator("drift", label)
            distances.append(distance(here[label], there[label], pools[label], config.n_draws, generator))
            yield DriftTest("shift", label, shift(distances[-1], there[label]), config.shift)
            advance(1)
    if labels:
        weights = [here[label].count for label in labels]
        both = together(distances, weights)
        variance = np.average([float(there[label].covariance().trace()) for label in labels], weights=weights)
        effect = max(0.0, both.squared - both.mean) / max(float(variance), 1e-300)
        yield DriftTest("shift", None, Comparison(gamma_tail(both), effect), config.overall_shift)


def _is_compared(config: DriftConfig, here: Moments, there: Moments, pool_Nr: Tensor | None) -> bool:
    return min(here.count, there.count, 0 if pool_Nr is None else len(pool_Nr)) >= config.min_samples


def _pools(reference: Statistics, projection: Projection) -> dict[int, Tensor]:
    """Label -> kept rows of the reference's sample, (N, r)."""
    pools: dict[int, list[Tensor]] = {}
    for half in (FIT, CALIBRATE):
        kept_N = torch.from_numpy(reference.rows(half, ["kept"])["kept"].to_numpy().copy())
        at = 0
        for rows in reference.batches(reference.info["embedding"], shards=[half]):
            kept_B = kept_N[at : (at := at + len(rows.keys))]
            z_Br, labels_B = projection(rows.z_BD[kept_B]), rows.labels_B[kept_B]
            for label in labels_B.unique().tolist():
                pools.setdefault(label, []).append(z_Br[labels_B == label])
    return {label: torch.cat(pieces) for label, pieces in pools.items()}


def _counted(config: DriftConfig, reference: Statistics, batch: Statistics, by_design: float) -> Iterator[DriftTest]:
    nothing = {"n": 0, "removed": 0}
    here, there = batch.counts, reference.counts
    for label in sorted(here):
        x, n = here[label]["removed"], here[label]["n"]
        reference_x, reference_n = (there.get(label, nothing)[name] for name in ("removed", "n"))
        if n >= config.min_samples <= reference_n:
            yield DriftTest("removed", label, excess(x, n, reference_x, reference_n, by_design), config.removed)
        elif n >= config.min_samples:
            yield DriftTest("unknown", label, Comparison(0.0, float(n)), config.min_samples)
    (x, n), (reference_x, reference_n) = _total(here), _total(there)
    yield DriftTest("removed", None, excess(x, n, reference_x, reference_n, by_design), config.overall_removed)
    bad, reference_bad = batch.info["unreadable"], reference.info["unreadable"]
    result = excess(bad, n + bad, reference_bad, reference_n + reference_bad)
    yield DriftTest("unreadable", None, result, config.unreadable)
    labels = sorted(here.keys() | there.keys())
    counts_2K = np.array([[counts.get(y, nothing)["n"] for y in labels] for counts in (here, there)])
    yield DriftTest("priors", None, priors(*counts_2K), config.priors)


def _total(counts: dict[int, dict[str, int]]) -> tuple[int, int]:
    """Number of removed samples, and of all."""
    return sum(c["removed"] for c in counts.values()), sum(c["n"] for c in counts.values())


def _judged(
    config: DriftConfig, found: list[DriftTest], reference: Statistics, batch: Statistics, names: Mapping[int, str]
) -> dict[str, Any]:
    """Content of drift.json."""
    level = config.level / len(found)
    alarms = [f for f in found if f.result.p_value <= level and f.result.effect >= f.limit]
    n_shifted = sum(f.test == "shift" and f.label is not None for f in alarms)
    n_compared = sum(f.test == "shift" and f.label is not None for f in found)
    here, there = batch.counts, reference.counts
    return {
        "verdict": _verdict(config, alarms, n_shifted, n_compared),
        "reasons": [_reason(f, names) for f in sorted(alarms, key=lambda f: f.label is not None)],
        "level": level,
        "n_compared": n_compared,
        "tests": [{**f._asdict(), "result": f.result._asdict(), "alarm": f in alarms} for f in found],
        "classes": {str(y): {"here": c["n"], "reference": there.get(y, {"n": 0})["n"]} for y, c in here.items()},
        **({"class_names": {str(label): name for label, name in names.items()}} if names else {}),
    }


def _verdict(config: DriftConfig, alarms: list[DriftTest], n_shifted: int, n_compared: int) -> Verdict:
    """Alarms in few classes may be poison: hold. Most classes shifted or other shares: the data changed, refit."""
    if not alarms:
        return "accept"
    is_broad = n_shifted >= config.broad * max(1, n_compared)
    local = [f for f in alarms if f.test not in ("priors", "shift") or (f.label is not None and not is_broad)]
    return "hold" if local else "refit"


def _reason(found: DriftTest, names: Mapping[int, str]) -> str:
    where = "all classes together" if found.label is None else f"class {class_name(found.label, names)}"
    p_value, effect = found.result
    text = {
        "shift": f"{where}: embeddings shifted from the reference by {effect:.2f} of their variance",
        "removed": f"{where}: removed share {100 * effect:.1f} % above the reference",
        "unreadable": f"unreadable share {100 * effect:.1f} % above the reference",
        "priors": f"class shares differ from the reference by {100 * effect:.1f} % of the samples",
        "unknown": f"{where}: {effect:.0f} samples, too few in the reference to compare with",
    }[found.test]
    return text if found.test == "unknown" else f"{text} (p = {p_value:.1g}, limit {found.limit:g})"
