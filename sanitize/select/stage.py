"""Turn scores into verdicts, each with its reason. Nothing is read but scores and index rows, so a rule can be
changed and replayed in seconds."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.progress import track
from sanitize.select.rules import FDRRule, Rule, SeparationRule, keep_all_but

REASON = pa.struct(
    {
        "stage": pa.string(),
        "reason": pa.string(),
        "score": pa.float32(),
        "threshold": pa.float32(),
        "p_value": pa.float64(),
    }
)
SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "key": pa.string(),
        "label": pa.int64(),
        "status": pa.string(),
        "keep": pa.bool_(),
        "reasons": pa.list_(REASON),
    }
)


class SelectConfig(BaseModel):
    """How scores become verdicts.

    Attributes:
        rule: contamination, separation or fdr.
        max_removed_fraction: no class loses more than this share of its samples to a rule, in [0, 1]; where a rule
            asks for more, the highest scores go and the report says that the cap was reached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Rule = SeparationRule()
    max_removed_fraction: float = Field(default=0.6, ge=0, le=1)


def select_samples(config: SelectConfig, dataset: Dataset, scores: Scores, out: str, compute: Compute) -> Selection:
    """Decide which samples stay.

    Args:
        config: the rule.
        dataset: all samples, the unreadable ones too.
        scores: of the usable ones.
        out: folder of the artifact: verdicts, and `selection.json` with one entry a class.
        compute: unused but for the convention; nothing is random.

    Returns:
        The Selection; `status` is kept, quarantined or unreadable.

    Raises:
        ConfigError: the rule does not go with the scorer.
    """
    compute.activate()
    recipe = Recipe(
        stage="select_samples",
        config=config.model_dump(mode="json"),
        inputs={"dataset": dataset.digest, "scores": scores.digest},
    )
    decided = cache(lambda: _decide(config, scores))

    def write_part(shard: str, part: Part) -> None:
        rows = _verdicts(dataset, scores, shard, *decided())
        write_rows(part, shard, pa.Table.from_pylist(rows, SCHEMA))
        part.counts.update(samples=len(rows), **{s: sum(r["status"] == s for r in rows) for s in STATUSES})
        advance(len(rows))

    def finish(part: Part, _workshop: object) -> None:
        classes, _ = decided()
        by_label = {str(label): classes[label] for label in sorted(classes)}
        part.write_json("selection.json", {"rule": config.rule.model_dump(mode="json"), "classes": by_label})

    with track("select", dataset.manifest().counts.get("samples")) as advance:
        return make(Selection, out, recipe, parts=dataset.shards, write_part=write_part, finish=finish)


STATUSES = ("kept", "quarantined", "unreadable")
Classes = dict[int, dict[str, Any]]  # label -> what selection.json says of it
PValues = dict[int, tuple[np.ndarray, np.ndarray]]  # label -> its scores, ascending, and the p-value of each


def _decide(config: SelectConfig, scores: Scores) -> tuple[Classes, PValues]:
    """The threshold of every class, and what it rests on."""
    # The one thing that grows with the data set: a float32 score and its label, 12 bytes a sample.
    by_class = scores_by_class(scores)
    scorer = scores.read_json("scorer.json")
    statistics = {int(label): values for label, values in scorer["classes"].items()}
    thresholds = config.rule.thresholds(by_class, statistics)
    levels = config.rule.levels(by_class, statistics) if isinstance(config.rule, SeparationRule) else {}
    classes: Classes = {}
    p_values: PValues = {}
    for label, s_N in by_class.items():
        cap = keep_all_but(s_N, int(config.max_removed_fraction * len(s_N)))
        # A rule that takes a whole class says minus infinity, which JSON cannot hold: the lowest float says it too.
        threshold = max(thresholds[label], cap, float(np.finfo(np.float32).min))
        classes[label] = {
            "n": len(s_N),
            "removed": int((s_N > threshold).sum()),
            "threshold": threshold if threshold < math.inf else None,
            "capped": bool(cap > thresholds[label]),
            "scorer": scorer["config"]["kind"],
            **statistics.get(label, {}),
        }
        if label in levels:
            classes[label]["level"] = levels[label]
        if isinstance(config.rule, FDRRule):
            p_values[label] = (np.sort(s_N), np.sort(config.rule.p_values(by_class, label))[::-1])
    return classes, p_values


def scores_by_class(scores: Scores, shards: Sequence[str] | None = None) -> dict[int, np.ndarray]:
    """label -> float32 scores of all its samples."""
    pieces: dict[int, list[np.ndarray]] = {}
    for shard in scores.shards if shards is None else shards:
        table = scores.rows(shard, ["label", "score"])
        labels_N, scores_N = table["label"].to_numpy(), table["score"].to_numpy()
        for label in np.unique(labels_N).tolist():
            pieces.setdefault(label, []).append(scores_N[labels_N == label])
    return {label: np.concatenate(pieces[label]) for label in sorted(pieces)}


def _verdicts(
    dataset: Dataset, scores: Scores, shard: str, classes: Classes, p_values: PValues
) -> list[dict[str, Any]]:
    scored: dict[int, float] = {}
    if shard in scores.shards:
        table = scores.rows(shard, ["position", "score"])
        scored = dict(zip(table["position"].to_pylist(), table["score"].to_pylist(), strict=True))
    rows = []
    for row in dataset.rows(shard, ["position", "key", "label", "status", "reason"]).to_pylist():
        verdict = {name: row[name] for name in ("position", "key", "label")}
        if row["status"] != "ok":
            reasons = [{"stage": "index", "reason": row["reason"]}]
            rows.append(verdict | {"status": "unreadable", "keep": False, "reasons": reasons})
            continue
        of_class, score = classes[row["label"]], scored[row["position"]]
        threshold = of_class["threshold"]
        keep = threshold is None or not score > threshold
        reasons = [] if keep else [_reason(of_class, score, p_values.get(row["label"]))]
        rows.append(verdict | {"status": "kept" if keep else "quarantined", "keep": keep, "reasons": reasons})
    return rows


def _reason(of_class: dict[str, Any], score: float, p_values: Any) -> dict[str, Any]:
    threshold = of_class["threshold"]
    text = f"{of_class['scorer']} score {score:.4g} is above {threshold:.4g}"
    if "separation" in of_class:
        text += f"; the class splits in two, {of_class['separation']:.1f} standard deviations apart"
    reason = {"stage": of_class["scorer"], "reason": text, "score": score, "threshold": threshold}
    if p_values is not None:
        sorted_scores, sorted_p = p_values
        reason["p_value"] = float(sorted_p[np.searchsorted(sorted_scores, np.float32(score))])
    return reason
