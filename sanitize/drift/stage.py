"""Is a batch of new data like the reference? A verdict, and the reasons in plain words.

Each question of `distance.py` is asked of every class and of all classes together. An alarm is raised where the answer
is significant, at a level that is shared among all questions (Bonferroni), and as large as its limit.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.drift.distance import Answer, Distance, distance, excess, gamma_tail, priors, shift, together
from sanitize.drift.projection import Projection
from sanitize.drift.statistics import CALIBRATE, FIT, Statistics
from sanitize.errors import ArtifactError
from sanitize.progress import track
from sanitize.stage import Work, stage
from sanitize.streaming import Moments

Verdict = Literal["accept", "hold", "refit"]
Question = Literal["shift", "removed", "priors", "unreadable", "unknown"]


class DriftConfig(BaseModel):
    """When a batch is held.

    Attributes:
        level: probability that anything at all is found in a batch that is like the reference.
        min_samples: a class is compared where it has so many samples here and in the reference.
        n_draws: samples of the reference that tell how far apart two samples of it are.
        shift: of a class that is too much, in units of the class's variance.
        overall_shift: the same for all classes together.
        removed: excess of the removed share of a class, in [0, 1], that is too much.
        overall_removed: the same of all samples.
        unreadable: excess of the share that cannot be read.
        priors: total variation distance of the shares of classes, in [0, 1].
        broad: where so large a share of the classes has shifted, the data as a whole is another, and the verdict is
            refit instead of hold.
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
    """`drift.json`: verdict, reasons, and every question with its answer."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """`verdict`; `reasons`; `level` of one question; `answers`: question, label (None: all), answer, limit, alarm;
        `classes`: label -> samples here and in the reference."""
        return self.read_object("drift.json", "verdict", "reasons")


class Finding(NamedTuple):
    """A question, whom it was asked of (None: all classes), the answer, and from where on the effect counts."""

    question: Question
    label: int | None
    answer: Answer
    limit: float


@stage(Drift, gpu=False)
def check_drift(
    config: DriftConfig,
    reference: Statistics,
    batch: Statistics,
    projection: Projection,
    out: str,
    compute: Compute,
    *,
    by_design: float = 0.0,
) -> Work:
    """Compare what is remembered of a batch with what is remembered of the reference.

    Args:
        config: the limits.
        reference, batch: statistics in the coordinates of `projection`.
        projection: of the reference.
        out: folder of the artifact.
        compute: seed of the draws.
        by_design: share of clean samples, in [0, 1), that is removed where samples are judged one by one, and was not
            when the reference was made.

    Raises:
        ArtifactError: the statistics are in other coordinates.
    """
    for statistics in (reference, batch):
        if statistics.info["projection"] != projection.digest:
            raise ArtifactError(f"{statistics.path} was made with another projection than {projection.path}")

    def write(part: Part) -> None:
        shifts = _shifts(config, reference, batch, projection, compute)
        found = [*shifts, *_counted(config, reference, batch, by_design)]
        part.write_json("drift.json", _judged(config, found, reference, batch))

    return Work(write=write, config=config.model_dump(mode="json") | {"by_design": by_design})


def _shifts(
    config: DriftConfig, reference: Statistics, batch: Statistics, projection: Projection, compute: Compute
) -> Iterator[Finding]:
    pools = _pools(reference, projection)
    here, there = batch.moments.by_class, reference.moments.by_class
    labels = [y for y in sorted(here.keys() & there.keys()) if _is_compared(config, here[y], there[y], pools.get(y))]
    distances: list[Distance] = []
    with track("compare classes", len(labels), "classes") as advance:
        for label in labels:
            generator = compute.generator("drift", label)
            distances.append(distance(here[label], there[label], pools[label], config.n_draws, generator))
            yield Finding("shift", label, shift(distances[-1], there[label]), config.shift)
            advance(1)
    if labels:
        weights = [here[label].count for label in labels]
        both = together(distances, weights)
        variance = np.average([float(there[label].covariance().trace()) for label in labels], weights=weights)
        effect = max(0.0, both.squared - both.mean) / max(float(variance), 1e-300)
        yield Finding("shift", None, Answer(gamma_tail(both), effect), config.overall_shift)


def _is_compared(config: DriftConfig, here: Moments, there: Moments, pool_Nr: Tensor | None) -> bool:
    return min(here.count, there.count, 0 if pool_Nr is None else len(pool_Nr)) >= config.min_samples


def _pools(reference: Statistics, projection: Projection) -> dict[int, Tensor]:
    """Label -> the kept rows there are of it, (N, r)."""
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


def _counted(config: DriftConfig, reference: Statistics, batch: Statistics, by_design: float) -> Iterator[Finding]:
    nothing = {"n": 0, "removed": 0}
    here, there = batch.counts, reference.counts
    for label in sorted(here):
        x, n = here[label]["removed"], here[label]["n"]
        reference_x, reference_n = (there.get(label, nothing)[name] for name in ("removed", "n"))
        if n >= config.min_samples <= reference_n:
            yield Finding("removed", label, excess(x, n, reference_x, reference_n, by_design), config.removed)
        elif n >= config.min_samples:
            yield Finding("unknown", label, Answer(0.0, float(n)), config.min_samples)
    (x, n), (reference_x, reference_n) = _total(here), _total(there)
    yield Finding("removed", None, excess(x, n, reference_x, reference_n, by_design), config.overall_removed)
    bad, reference_bad = batch.info["unreadable"], reference.info["unreadable"]
    answer = excess(bad, n + bad, reference_bad, reference_n + reference_bad)
    yield Finding("unreadable", None, answer, config.unreadable)
    labels = sorted(here.keys() | there.keys())
    counts_2K = np.array([[of.get(y, nothing)["n"] for y in labels] for of in (here, there)])
    yield Finding("priors", None, priors(*counts_2K), config.priors)


def _total(counts: dict[int, dict[str, int]]) -> tuple[int, int]:
    """Removed samples, and all."""
    return sum(c["removed"] for c in counts.values()), sum(c["n"] for c in counts.values())


def _judged(config: DriftConfig, found: list[Finding], reference: Statistics, batch: Statistics) -> dict[str, Any]:
    """Content of drift.json."""
    level = config.level / len(found)
    alarms = [f for f in found if f.answer.p_value <= level and f.answer.effect >= f.limit]
    n_shifted = sum(f.question == "shift" and f.label is not None for f in alarms)
    n_compared = sum(f.question == "shift" and f.label is not None for f in found)
    here, there = batch.counts, reference.counts
    return {
        "verdict": _verdict(config, alarms, n_shifted, n_compared),
        "reasons": [_reason(f) for f in sorted(alarms, key=lambda f: f.label is not None)],
        "level": level,
        "n_compared": n_compared,
        "answers": [{**f._asdict(), "answer": f.answer._asdict(), "alarm": f in alarms} for f in found],
        "classes": {str(y): {"here": c["n"], "reference": there.get(y, {"n": 0})["n"]} for y, c in here.items()},
    }


def _verdict(config: DriftConfig, alarms: list[Finding], n_shifted: int, n_compared: int) -> Verdict:
    """Poison sits somewhere; where most classes have moved, or there are other shares of them, the world has."""
    if not alarms:
        return "accept"
    is_broad = n_shifted >= config.broad * max(1, n_compared)
    local = [f for f in alarms if f.question not in ("priors", "shift") or (f.label is not None and not is_broad)]
    return "hold" if local else "refit"


def _reason(found: Finding) -> str:
    where = "all classes together" if found.label is None else f"class {found.label}"
    p_value, effect = found.answer
    said = {
        "shift": f"the samples of {where} lie elsewhere than those of the reference, by {effect:.2f} of their variance",
        "removed": f"{100 * effect:.1f} % more of {where} was removed than of the reference",
        "unreadable": f"{100 * effect:.1f} % more samples could not be read than in the reference",
        "priors": f"classes have other shares than in the reference: {100 * effect:.1f} % of the samples too many",
        "unknown": f"the reference has too few samples of {where} to compare these {effect:.0f} with",
    }[found.question]
    return said if found.question == "unknown" else f"{said} (p = {p_value:.1g}, limit {found.limit:g})"
