"""The verdict on a whole data set: found, nothing or inconclusive, and the reasons.

    found           a scorer removed samples by evidence
    nothing         the suspect model has learned, and the scorer for planted samples was able to judge all classes
    inconclusive    anything else; each reason names the setting that would help

A wrong "nothing" costs more than a wrong "inconclusive": whatever is missing or unknown makes a verdict inconclusive.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

PLANTED = "toxic_direction"
LOOKED_FOR = {
    PLANTED: "planted samples",
    "spectral": "planted samples",
    "neighbours": "wrong labels",
    "label_margin": "wrong labels",
    "rca": "odd samples",
    "robust_realnvp": "odd samples",
}
NEAR = 0.7  # share of the level of separation; only for scorers without a finding of their own
MAX_NAMED = 5  # classes named in a reason


class Reason(NamedTuple):
    """An obstacle to a verdict, and the setting that would help ("" where none would)."""

    why: str
    setting: str = ""


class Finding(NamedTuple):
    """The verdict on a data set.

    Attributes:
        verdict: found, nothing or inconclusive.
        why: the verdict in one or two sentences.
        reasons: obstacles to a verdict; also listed where the verdict is "found", since more may be there.
        looked_for: kinds of samples that were looked for, with the scorers.
    """

    verdict: Literal["found", "nothing", "inconclusive"]
    why: str
    reasons: tuple[Reason, ...]
    looked_for: dict[str, list[str]]

    def plain(self) -> dict[str, Any]:
        """The finding as JSON holds it."""
        reasons = [reason._asdict() for reason in self.reasons]
        return {"verdict": self.verdict, "why": self.why, "reasons": reasons, "looked_for": self.looked_for}


def find(
    selection: Mapping[str, Any],
    scorers: Mapping[str, Mapping[str, Any]],
    suspect: Mapping[str, Any] | None,
    removed: int,
) -> Finding:
    """The verdict on a cleaning run.

    Args:
        selection: content of `selection.json`.
        scorers: content of `scorer.json`, by kind of scorer.
        suspect: content of `suspect.json`; None where no suspect model was trained.
        removed: number of samples in quarantine; those that findings of hygiene removed are left out.

    Returns:
        The finding.
    """
    looked_for: dict[str, list[str]] = {}
    for kind in scorers:
        looked_for.setdefault(LOOKED_FOR.get(kind, "odd samples"), []).append(kind)
    removed = max(0, removed - sum(entry.get("by_hygiene", 0) for entry in selection.get("classes", {}).values()))
    by_evidence = [kind for kind in scorers if removed and _has_removed(kind, selection)]
    reasons = tuple(_reasons(selection, scorers, suspect))
    if PLANTED in by_evidence or (by_evidence and PLANTED not in scorers):
        what = " and ".join(dict.fromkeys(LOOKED_FOR.get(kind, "odd samples") for kind in by_evidence))
        return Finding("found", f"{removed:,} samples were removed: {what}.", reasons, looked_for)
    others = f" {removed:,} samples were removed by other rules." if removed else ""
    if reasons:
        return Finding("inconclusive", f"{_sentence(reasons[0].why)}{others}", reasons, looked_for)
    stated = (scorers[PLANTED].get("finding") or {}).get("why") or "no class holds a group that looks planted"
    what = f"The suspect model has learned its training data. {_sentence(str(stated))}"
    return Finding("nothing", what + others, (), looked_for)


def _has_removed(kind: str, selection: Mapping[str, Any]) -> bool:
    """True if a scorer flagged samples by evidence in a class that lost samples."""
    if _rule(kind, selection) == "contamination":  # removes a fixed share of every class
        return False
    return any(
        entry.get("removed", 0) > entry.get("by_hygiene", 0)
        and entry.get("scorers", {}).get(kind, {}).get("flagged", 0)
        for entry in selection.get("classes", {}).values()
    )


def _is_near(entry: Mapping[str, Any]) -> bool:
    """True if a class splits nearly as well as a poisoned one, and lost no samples."""
    split = entry.get("scorers", {}).get(PLANTED, {})
    separation, level = split.get("separation"), split.get("level")
    return bool(separation and level and not split.get("flagged") and separation >= NEAR * level)


def _rule(kind: str, selection: Mapping[str, Any]) -> Any:
    return selection.get("rules", {}).get(kind, {}).get("kind")


def _reasons(
    selection: Mapping[str, Any], scorers: Mapping[str, Mapping[str, Any]], suspect: Mapping[str, Any] | None
) -> list[Reason]:
    """All obstacles to the verdict "nothing"."""
    if PLANTED not in scorers:
        return [
            Reason("scorer toxic_direction did not look for planted samples", "scorers='[{kind: toxic_direction}]'")
        ]
    reasons = []
    if suspect is None:
        reasons.append(Reason("no suspect model with a known training accuracy", "embedder.kind=classifier"))
    elif suspect.get("learned") is not True:
        reasons.append(
            Reason(f"the suspect model has not learned: {suspect.get('why', 'unknown')}", suspect.get("setting") or "")
        )
    if _rule(PLANTED, selection) == "contamination":
        setting = f"select.rules.{PLANTED}.kind=separation"
        reasons.append(Reason("rule contamination removes a fixed share, planted or not", setting))
    stated = scorers[PLANTED].get("finding") or {}
    verdict = stated.get("verdict", "nothing")
    classes = selection.get("classes", {})
    flagged = any(entry.get("scorers", {}).get(PLANTED, {}).get("flagged", 0) for entry in classes.values())
    if verdict == "inconclusive":
        reasons.append(Reason(str(stated.get("why") or "a group of samples may be planted or natural")))
    elif not stated and (near := [label for label, entry in classes.items() if _is_near(entry)]):
        reasons.append(
            Reason(f"class {', '.join(near[:MAX_NAMED])} nearly stood out", "compute.seed, for another model")
        )
    elif (verdict != "nothing" or flagged) and not _has_removed(PLANTED, selection):
        reasons.append(Reason("flagged samples were kept (select.verdict, max_removed_fraction, or restored by hand)"))
    least = int(scorers[PLANTED].get("config", {}).get("min_class", 0))
    statistics = scorers[PLANTED].get("classes", {})
    small = [label for label, entry in classes.items() if entry.get("n", 0) < least or label not in statistics]
    if small:
        named = ", ".join(small[:MAX_NAMED]) + (", ..." if small[MAX_NAMED:] else "")
        which = f"class {named} has" if len(small) == 1 else f"{len(small):,} classes ({named}) have"
        reasons.append(Reason(f"{which} too few samples to judge (fewer than {least})", "scorers.0.min_class"))
    return reasons


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."


def groups_of(scorers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Candidate groups that the scorers judged, the planted ones first."""
    order = {"planted": 0, "unsure": 1}
    groups = [dict(group) for scorer in scorers for group in (scorer.get("finding") or {}).get("groups", [])]
    return sorted(groups, key=lambda group: (order.get(str(group.get("decision")), 2), -float(group.get("z") or 0)))
