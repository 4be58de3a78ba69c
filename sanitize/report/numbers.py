"""The numbers of the page, from artifacts alone.

Memory stays bounded for any data set: counters of each class, the few highest scores, and histograms that are counted
in a second pass over the scores. Shapes: N scored samples of one shard, K classes.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from sanitize.data.dataset import Dataset
from sanitize.data.tables import Scores, Selection
from sanitize.errors import ArtifactError
from sanitize.progress import track
from sanitize.report.charts import bin_edges

N_BINS = 48
MAX_LISTED = 100  # unreadable samples and damaged shards that are named one by one
MAX_REASONS = 20  # kinds of reasons that are counted one by one


def collect(
    dataset: Dataset, scores: Scores, selection: Selection, n_images: tuple[int, int], n_histograms: int
) -> dict[str, Any]:
    """All numbers of the page as plain data, in two passes over scores and verdicts.

    Args:
        dataset, scores, selection: of one run.
        n_images: how many suspects, and how many kept ones among them at least.
        n_histograms: classes that get a histogram.

    Raises:
        ArtifactError: scores, verdicts and their counts do not fit together.
    """
    tally = _Tally(dataset.n_classes, max(n_images))
    with track("report", 2 * len(selection.shards), "shards") as advance:
        for shard in selection.shards:
            tally.update(_scored(selection, scores, shard))
            advance(1)
        classes = _classes(tally, dataset, selection)
        shown = [c for c in classes if c["removed"]][:n_histograms] or classes[:1]
        histograms = [_Histogram(c) for c in shown]
        for shard in selection.shards:
            rows = _scored(selection, scores, shard)
            for histogram in histograms:
                histogram.update(rows)
            advance(1)
    damaged = [(name, of_shard["damage"]) for name, of_shard in dataset.info["shards"].items() if of_shard["damage"]]
    return {
        "counts": _counts(tally, selection),
        "n_classes": len(classes),
        "n_touched": sum(c["removed"] > 0 for c in classes),
        "n_capped": sum(c["capped"] for c in classes),
        "n_shards": len(dataset.info["shards"]),
        "n_damaged": len(damaged),
        "rule": _rule(selection),
        "scorer": scores.read_json("scorer.json")["config"],
        "classes": classes,
        "histograms": [histogram.numbers() for histogram in histograms],
        "suspects": _suspects(tally, selection, {c["label"]: c for c in classes}, *n_images),
        "unreadable": _unreadable(dataset, selection),
        "damaged": [{"shard": name, "reason": reason} for name, reason in damaged[:MAX_LISTED]],
    }


class _Rows(NamedTuple):
    """Scored samples of one shard, in its order."""

    shard: str
    positions_N: np.ndarray
    labels_N: np.ndarray
    kept_N: np.ndarray
    scores_N: np.ndarray


def _scored(selection: Selection, scores: Scores, shard: str) -> _Rows:
    verdicts = selection.rows(shard, ["position", "label", "status"])
    verdicts = verdicts.filter(pc.not_equal(verdicts["status"], "unreadable"))
    positions_N, scores_N = verdicts["position"].to_numpy(), np.zeros(0, np.float32)
    scored_N = np.zeros(0, np.int64)
    if shard in scores.shards:  # a shard without a usable sample has no scores
        table = scores.rows(shard, ["position", "score"])
        scored_N, scores_N = table["position"].to_numpy(), table["score"].to_numpy()
    if not np.array_equal(positions_N, scored_N):
        raise ArtifactError(f"{scores.path} does not score the samples that {selection.path} judges, shard {shard}")
    kept_N = pc.equal(verdicts["status"], "kept").to_numpy()
    return _Rows(shard, positions_N, verdicts["label"].to_numpy(), kept_N, scores_N)


class _Pick(NamedTuple):
    """A candidate for the grid; the most suspicious sorts first, whatever the order in which shards came."""

    minus_score: float
    shard: str
    position: int
    label: int


class _Tally:
    """First pass: counters of each class, and the highest scores of removed and of kept samples."""

    def __init__(self, n_classes: int, n_best: int) -> None:
        self.n_K = np.zeros(n_classes, np.int64)
        self.removed_K = np.zeros(n_classes, np.int64)
        self.low_K = np.full(n_classes, np.inf)
        self.high_K = np.full(n_classes, -np.inf)
        self.best: dict[bool, list[_Pick]] = {True: [], False: []}  # kept -> those with the highest scores
        self._n_best = n_best

    def update(self, rows: _Rows) -> None:
        n_classes = len(self.n_K)
        self.n_K += np.bincount(rows.labels_N, minlength=n_classes)
        self.removed_K += np.bincount(rows.labels_N[~rows.kept_N], minlength=n_classes)
        np.minimum.at(self.low_K, rows.labels_N, rows.scores_N)
        np.maximum.at(self.high_K, rows.labels_N, rows.scores_N)
        for kept, best in self.best.items():
            of_kind = np.flatnonzero(rows.kept_N == kept)
            top = of_kind[np.argsort(-rows.scores_N[of_kind], kind="stable")[: self._n_best]].tolist()
            values = zip(*(a[top].tolist() for a in (-rows.scores_N, rows.positions_N, rows.labels_N)), strict=True)
            best += [_Pick(minus_score, rows.shard, position, label) for minus_score, position, label in values]
            best.sort()
            del best[self._n_best :]


class _Histogram:
    """Second pass: scores of one class, counted in bins of which none straddles the threshold."""

    def __init__(self, of_class: dict[str, Any]) -> None:
        self.label = of_class["label"]
        self.threshold = of_class["threshold"]
        self.edges = bin_edges(of_class["lowest"], of_class["highest"], self.threshold, N_BINS)
        self.counts = np.zeros((2, len(self.edges) - 1), np.int64)  # removed, kept

    def update(self, rows: _Rows) -> None:
        n_bins = self.counts.shape[1]
        of_class = rows.labels_N == self.label
        bins = np.searchsorted(self.edges, rows.scores_N[of_class].astype(np.float64), side="left") - 1
        bins = bins.clip(0, n_bins - 1)
        for kept in (0, 1):
            self.counts[kept] += np.bincount(bins[rows.kept_N[of_class] == kept], minlength=n_bins)

    def numbers(self) -> dict[str, Any]:
        removed, kept = self.counts.tolist()
        of_class = {"label": self.label, "threshold": self.threshold}
        return {**of_class, "edges": self.edges, "kept": kept, "removed": removed}


def _counts(tally: _Tally, selection: Selection) -> dict[str, int]:
    stated = selection.manifest().counts
    total, removed = int(tally.n_K.sum()), int(tally.removed_K.sum())
    found = {"kept": total - removed, "quarantined": removed, "unreadable": stated["samples"] - total}
    if any(n != stated.get(name, 0) for name, n in found.items()):
        raise ArtifactError(f"{selection.path}: its rows give {found}, its manifest says {dict(stated)}")
    renamed = {"clean": found["kept"], "quarantined": removed, "unreadable": found["unreadable"]}
    return {"samples": stated["samples"], **renamed, "restored": stated.get("restored", 0)}


def _rule(selection: Selection) -> dict[str, Any]:
    """The rule, as far as the artifact tells: a selection that was restored may not repeat it."""
    stated = selection.read_json("selection.json").get("rule")
    rule: dict[str, Any] = stated or selection.manifest().recipe.config.get("rule", {})
    return rule


def _classes(tally: _Tally, dataset: Dataset, selection: Selection) -> list[dict[str, Any]]:
    """One row a class that has samples: the most affected first, then the highest statistic."""
    info, names = selection.read_json("selection.json"), dataset.info.get("classes")
    level = info.get("level", _rule(selection).get("floor"))  # what a separation must exceed
    rows = []
    for label in np.flatnonzero(tally.n_K).tolist():
        of_class = info["classes"].get(str(label), {})
        n, removed = int(tally.n_K[label]), int(tally.removed_K[label])
        rows.append(
            {
                "label": label,
                "name": _class_name(names, label),
                "n": n,
                "removed": removed,
                "removed_fraction": removed / n,
                "separation": of_class.get("separation"),
                "level": of_class.get("level", level),
                "threshold": of_class.get("threshold"),
                "capped": bool(of_class.get("capped", False)),
                "lowest": float(tally.low_K[label]),
                "highest": float(tally.high_K[label]),
            }
        )
    return sorted(rows, key=lambda c: (-c["removed"], -_statistic(c), c["label"]))


def _statistic(of_class: dict[str, Any]) -> float:
    separation = of_class["separation"]
    return float(of_class["highest"] if separation is None else separation)


def _class_name(names: Any, label: int) -> str | None:
    if isinstance(names, dict):
        name = names.get(str(label))
    else:
        name = names[label] if isinstance(names, list) and label < len(names) else None
    return None if name is None else str(name)


def _suspects(
    tally: _Tally, selection: Selection, classes: dict[int, dict[str, Any]], n_images: int, n_kept: int
) -> list[dict[str, Any]]:
    """Removed samples first, then those with the highest scores that were kept."""
    removed = tally.best[False][:n_images]
    kept = tally.best[True][: max(n_images - len(removed), n_kept)]
    picks = [(pick, "quarantined") for pick in removed] + [(pick, "kept") for pick in kept]
    shards = sorted({pick.shard for pick, _ in picks})
    wanted = {s: sorted(pick.position for pick, _ in picks if pick.shard == s) for s in shards}
    found = {s: selection.rows(s, ["key", "reasons"]).take(wanted[s]).to_pylist() for s in shards}
    verdicts = {(s, position): row for s in shards for position, row in zip(wanted[s], found[s], strict=True)}
    return [
        {
            "shard": pick.shard,
            "position": pick.position,
            "key": verdicts[pick.shard, pick.position]["key"],
            "label": pick.label,
            "score": -pick.minus_score,
            "status": status,
            "reason": _reason(verdicts[pick.shard, pick.position]["reasons"], classes[pick.label]["threshold"]),
        }
        for pick, status in picks
    ]


def _reason(reasons: list[dict[str, Any]] | None, threshold: float | None) -> str:
    if reasons:
        return "; ".join(str(reason["reason"]) for reason in reasons)
    return "its class was not touched" if threshold is None else f"its score is not above {threshold:.4g}"


def _unreadable(dataset: Dataset, selection: Selection) -> dict[str, Any]:
    """Counted reasons, and the first samples by name."""
    reasons = sorted(dataset.info["unreadable"].items(), key=lambda item: (-item[1], item[0]))
    samples: list[dict[str, Any]] = []
    affected = (shard for shard, s in sorted(dataset.info["shards"].items()) if s["counts"].get("unreadable"))
    for shard in affected:
        if len(samples) >= MAX_LISTED:
            break
        table = selection.rows(shard, ["key", "status", "reasons"])
        rows = table.filter(pc.equal(table["status"], "unreadable")).slice(0, MAX_LISTED - len(samples)).to_pylist()
        samples += [{"shard": shard, "key": row["key"], "reason": _reason(row["reasons"], None)} for row in rows]
    return {
        "reasons": [{"reason": reason, "n": n} for reason, n in reasons[:MAX_REASONS]],
        "n_other_reasons": len(reasons[MAX_REASONS:]),
        "n_other": sum(n for _, n in reasons[MAX_REASONS:]),
        "samples": samples,
    }
