"""The numbers of the page, from artifacts alone.

Memory is bounded for any data set: counters of each class, the few highest scores, and histograms that are filled in a
second pass over the scores. Of several pictures a sample, the one with the highest score counts. Shapes: N scored
samples of one shard, R rows, K classes, S scorers.
"""

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from sanitize.data.dataset import Dataset
from sanitize.data.tables import Scores, Selection, sample_starts
from sanitize.errors import ArtifactError
from sanitize.progress import track
from sanitize.report.charts import bin_edges

N_BINS = 48
MAX_LISTED = 100  # unreadable samples and damaged shards that are listed
MAX_REASONS = 20  # reasons with a row of their own
# Statistics of the two groups of a class; those of neighbours' labels are None without a label check.
SPLIT = ("separation", "level", "disagreement", "disagreement_of_rest", "side_by_labels")


def collect(
    dataset: Dataset, scores: Sequence[Scores], selection: Selection, n_images: tuple[int, int], n_histograms: int
) -> dict[str, Any]:
    """All numbers of the page as plain data, in two passes over scores and verdicts.

    Args:
        dataset, scores, selection: artifacts of one run.
        n_images: number of suspects, and least number of kept samples among them.
        n_histograms: number of histograms.

    Raises:
        ArtifactError: scores, verdicts and their counts do not fit together.
    """
    scorers = [of_scorer.read_json("scorer.json")["config"] for of_scorer in scores]
    kinds = [scorer["kind"] for scorer in scorers]
    stated = selection.read_json("selection.json")["classes"]
    silent_SK = np.zeros((len(kinds), dataset.n_classes), bool)
    for label, of_class in stated.items():
        silent_SK[:, int(label)] = [_is_silent(_of_scorer(of_class, kind)) for kind in kinds]
    tally = _Tally(silent_SK, max(n_images))
    with track("report", 2 * len(selection.shards), "shards") as advance:
        for shard in selection.shards:
            tally.update(_scored(selection, scores, shard))
            advance(1)
        classes = _classes(tally, kinds, dataset, selection)
        histograms = [_Histogram(c, kinds, kind) for c, kind in _drawn(classes, kinds)[:n_histograms]]
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
        # Of new samples that a reference judges, False: its thresholds hold in all classes.
        "judged_by_groups": any(c["planted"] or any(map(_is_silent, c["scorers"].values())) for c in classes),
        "n_shards": len(dataset.info["shards"]),
        "n_damaged": len(damaged),
        **{name: selection.read_json("selection.json")[name] for name in ("verdict", "rules")},
        "scorers": scorers,
        "classes": classes,
        "histograms": [histogram.numbers() for histogram in histograms],
        "suspects": _suspects(tally, kinds, selection, {c["label"]: c for c in classes}, *n_images),
        "unreadable": _unreadable(dataset, selection),
        "damaged": [{"shard": name, "reason": reason} for name, reason in damaged[:MAX_LISTED]],
    }


class _Rows(NamedTuple):
    """Scored samples of one shard, in its order.

    Attributes:
        shard: name of the shard.
        samples_N: numbers of the samples in the shard.
        labels_N, kept_N: their labels and verdicts.
        positions_SN, scores_SN: position and score of the row with the sample's highest score, for each scorer.
        n_rows: number of scored rows; more than N with several pictures a sample.
    """

    shard: str
    samples_N: np.ndarray
    labels_N: np.ndarray
    kept_N: np.ndarray
    positions_SN: np.ndarray
    scores_SN: np.ndarray
    n_rows: int


def _scored(selection: Selection, scores: Sequence[Scores], shard: str) -> _Rows:
    columns = ["position", "label", "status", *(["sample"] if selection.has_several else [])]
    verdicts = selection.rows(shard, columns)
    verdicts = verdicts.filter(pc.not_equal(verdicts["status"], "unreadable"))
    positions_R = verdicts["position"].to_numpy()
    scores_SR = np.stack([_scores_of(of_scorer, shard, positions_R) for of_scorer in scores])
    starts = sample_starts(verdicts)
    samples_R = verdicts["sample"].to_numpy() if selection.has_several else positions_R
    at_SN = np.stack([_highest(scores_R, starts) for scores_R in scores_SR])
    return _Rows(
        shard,
        samples_R[starts],
        verdicts["label"].to_numpy()[starts],
        pc.equal(verdicts["status"], "kept").to_numpy()[starts],
        positions_R[at_SN],
        np.take_along_axis(scores_SR, at_SN, 1),
        len(positions_R),
    )


def _highest(scores_R: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Number of the first row with the highest score of each sample, int64 (N,)."""
    if len(starts) == len(scores_R):
        return starts
    sample_R = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(scores_R)))
    order_R = np.lexsort((-scores_R, sample_R))
    return np.asarray(order_R[starts])


def _scores_of(scores: Scores, shard: str, positions_N: np.ndarray) -> np.ndarray:
    scored_N, scores_N = np.zeros(0, np.int64), np.zeros(0, np.float32)
    if shard in scores.shards:  # a shard without a usable sample has no scores
        table = scores.rows(shard, ["position", "score"])
        scored_N, scores_N = table["position"].to_numpy(), table["score"].to_numpy()
    if not np.array_equal(positions_N, scored_N):
        raise ArtifactError(f"{scores.path} does not score the samples of the selection in shard {shard}")
    return scores_N


class _Pick(NamedTuple):
    """A candidate for the grid; the most suspicious sorts first, in any order of shards."""

    minus_score: float
    shard: str
    position: int
    label: int
    sample: int


class _Tally:
    """First pass: counters of each class, and for each scorer the highest scores of removed and of kept samples.

    Scores of classes in which a scorer is silent (`silent_SK`) are left out.
    """

    def __init__(self, silent_SK: np.ndarray, n_best: int) -> None:
        n_scorers, n_classes = silent_SK.shape
        self._silent_SK = silent_SK
        self.n_rows = 0
        self.n_K = np.zeros(n_classes, np.int64)
        self.removed_K = np.zeros(n_classes, np.int64)
        self.low_SK = np.full((n_scorers, n_classes), np.inf)
        self.high_SK = np.full((n_scorers, n_classes), -np.inf)
        # kept -> for each scorer its highest scores
        self.best: dict[bool, list[list[_Pick]]] = {kept: [[] for _ in range(n_scorers)] for kept in (True, False)}
        self._n_best = n_best

    def update(self, rows: _Rows) -> None:
        n_classes = len(self.n_K)
        self.n_rows += rows.n_rows
        self.n_K += np.bincount(rows.labels_N, minlength=n_classes)
        self.removed_K += np.bincount(rows.labels_N[~rows.kept_N], minlength=n_classes)
        for s, (positions_N, scores_N) in enumerate(zip(rows.positions_SN, rows.scores_SN, strict=True)):
            np.minimum.at(self.low_SK[s], rows.labels_N, scores_N)
            np.maximum.at(self.high_SK[s], rows.labels_N, scores_N)
            for kept, best in self.best.items():
                of_kind = np.flatnonzero((rows.kept_N == kept) & ~self._silent_SK[s, rows.labels_N])
                top = of_kind[np.argsort(-scores_N[of_kind], kind="stable")[: self._n_best]].tolist()
                columns = (-scores_N, positions_N, rows.labels_N, rows.samples_N)
                values = zip(*(column[top].tolist() for column in columns), strict=True)
                best[s] += [_Pick(minus_score, rows.shard, *others) for minus_score, *others in values]
                best[s].sort()
                del best[s][self._n_best :]

    def picks(self, kept: bool, n: int) -> list[tuple[int, _Pick]]:
        """(scorer, pick) of at most n samples: the highest of each scorer in turn, no sample twice."""
        turns = chain.from_iterable(
            zip_longest(*([(s, pick) for pick in best] for s, best in enumerate(self.best[kept])))
        )
        unique: dict[tuple[str, int], tuple[int, _Pick]] = {}
        for turn in turns:
            if turn is not None:
                unique.setdefault((turn[1].shard, turn[1].sample), turn)
        return list(unique.values())[:n]


class _Histogram:
    """Second pass: histogram of the scores of one class by one scorer; no bin straddles the threshold."""

    def __init__(self, of_class: dict[str, Any], kinds: list[str], kind: str) -> None:
        self.label, self.kind, self._scorer = of_class["label"], kind, kinds.index(kind)
        by_scorer = of_class["scorers"][kind]
        self.threshold = by_scorer["threshold"]
        self.edges = bin_edges(by_scorer["lowest"], by_scorer["highest"], self.threshold, N_BINS)
        self.counts = np.zeros((2, len(self.edges) - 1), np.int64)  # removed, kept

    def update(self, rows: _Rows) -> None:
        n_bins = self.counts.shape[1]
        of_class = rows.labels_N == self.label
        scores_n = rows.scores_SN[self._scorer][of_class].astype(np.float64)
        bins = (np.searchsorted(self.edges, scores_n, side="left") - 1).clip(0, n_bins - 1)
        for kept in (0, 1):
            self.counts[kept] += np.bincount(bins[rows.kept_N[of_class] == kept], minlength=n_bins)

    def numbers(self) -> dict[str, Any]:
        removed, kept = self.counts.tolist()
        of_class = {"label": self.label, "scorer": self.kind, "threshold": self.threshold}
        return {**of_class, "edges": self.edges, "kept": kept, "removed": removed}


def _counts(tally: _Tally, selection: Selection) -> dict[str, int]:
    stated = selection.manifest().counts
    total, removed = int(tally.n_K.sum()), int(tally.removed_K.sum())
    found = {"kept": total - removed, "quarantined": removed, "unreadable": stated["samples"] - total}
    if any(n != stated.get(name, 0) for name, n in found.items()):
        raise ArtifactError(f"{selection.path}: its rows give {found}, its manifest has {dict(stated)}")
    renamed = {"clean": found["kept"], "quarantined": removed, "unreadable": found["unreadable"]}
    pictures = {"pictures": tally.n_rows} if selection.has_several else {}
    return {"samples": stated["samples"], **renamed, "restored": stated.get("restored", 0), **pictures}


def _classes(tally: _Tally, kinds: list[str], dataset: Dataset, selection: Selection) -> list[dict[str, Any]]:
    """One row a class with samples: the most affected first, then the highest statistic."""
    info, names = selection.read_json("selection.json")["classes"], dataset.class_names
    if dataset.info["label"] is None:
        names = {0: "all samples: no labels are read"}
    rows = []
    for label in np.flatnonzero(tally.n_K).tolist():
        of_class = info.get(str(label), {})  # a class with only trusted samples has no verdicts
        scorers = {kind: _of_scorer(of_class, kind) for kind in kinds}
        for s, by_scorer in enumerate(scorers.values()):
            by_scorer |= {"lowest": float(tally.low_SK[s, label]), "highest": float(tally.high_SK[s, label])}
        n, removed = int(tally.n_K[label]), int(tally.removed_K[label])
        # With label evidence no class is split in two: its groups are judged one by one.
        split: dict[str, Any] = next(
            (by for by in scorers.values() if by["separation"] is not None and by["planted"] is None), {}
        )
        rows.append(
            {
                "label": label,
                "name": names.get(label),
                "n": n,
                **{name: of_class[name] for name in ("pictures",) if name in of_class},
                "removed": removed,
                "by_hygiene": of_class.get("by_hygiene", 0),
                "removed_fraction": removed / n,
                "capped": bool(of_class.get("capped", False)),
                "planted": next((by["planted"] for by in scorers.values() if by["planted"] is not None), None),
                **{name: split.get(name) for name in SPLIT},
                "scorers": scorers,
            }
        )
    return sorted(rows, key=lambda c: (-c["removed"], -_statistic(c), c["label"]))


def _of_scorer(of_class: dict[str, Any], kind: str) -> dict[str, Any]:
    """Entry of `selection.json` for one scorer and one class."""
    stated = of_class.get("scorers", {}).get(kind, {})
    names = ("threshold", "planted", *SPLIT)
    return {"flagged": stated.get("flagged", 0)} | {name: stated.get(name) for name in names}


def _is_silent(by_scorer: dict[str, Any]) -> bool:
    """True in a class without a planted group: its scores tell natural groups apart, and nothing is suspicious."""
    return by_scorer["planted"] == 0 and by_scorer["threshold"] is None


def _statistic(of_class: dict[str, Any]) -> float:
    """What classes without removals are sorted by; nothing where groups are judged, not classes."""
    if of_class["planted"] is not None:
        return 0.0
    first = next(iter(of_class["scorers"].values()))
    return float(first["highest"] if of_class["separation"] is None else of_class["separation"])


def _drawn(classes: list[dict[str, Any]], kinds: list[str]) -> list[tuple[dict[str, Any], str]]:
    """(class, scorer) of the histograms: affected classes with the scorers that flagged samples in them."""
    shown = [c for c in classes if c["removed"]] or classes[:1]
    flagging = [(c, [kind for kind in kinds if c["scorers"][kind]["flagged"]] or kinds) for c in shown]
    return [(c, kind) for c, of_class in flagging for kind in of_class if not _is_silent(c["scorers"][kind])]


def _suspects(
    tally: _Tally,
    kinds: list[str],
    selection: Selection,
    classes: dict[int, dict[str, Any]],
    n_images: int,
    n_kept: int,
) -> list[dict[str, Any]]:
    """Removed samples first, then those with the highest scores that were kept."""
    removed = tally.picks(kept=False, n=n_images)
    kept = tally.picks(kept=True, n=max(n_images - len(removed), n_kept))
    picks = [(*pick, "quarantined") for pick in removed] + [(*pick, "kept") for pick in kept]
    shards = sorted({pick.shard for _, pick, _ in picks})
    wanted = {s: sorted({pick.position for _, pick, _ in picks if pick.shard == s}) for s in shards}
    columns = ["key", "reasons", *(["member"] if selection.has_several else [])]
    found = {s: selection.rows(s, columns).take(wanted[s]).to_pylist() for s in shards}
    verdicts = {(s, position): row for s in shards for position, row in zip(wanted[s], found[s], strict=True)}
    trusted = set(selection.read_json("selection.json").get("trusted", []))
    suspects = []
    for s, pick, status in picks:
        verdict, by_scorer = verdicts[pick.shard, pick.position], classes[pick.label]["scorers"][kinds[s]]
        reason = _reason(verdict["reasons"], by_scorer["threshold"])
        suspects.append(
            {
                "shard": pick.shard,
                "position": pick.position,
                "key": verdict["key"],
                **({"member": verdict["member"]} if selection.has_several else {}),
                "label": pick.label,
                "scorer": kinds[s],
                "score": -pick.minus_score,
                "status": status,
                "reason": "its shard is trusted" if pick.shard in trusted else reason,
            }
        )
    return suspects


def _reason(reasons: list[dict[str, Any]] | None, threshold: float | None) -> str:
    if reasons:
        return "; ".join(str(reason["reason"]) for reason in reasons)
    return "no sample of its class was flagged" if threshold is None else f"its score is not above {threshold:.4g}"


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
