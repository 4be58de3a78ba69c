"""The verdict on a whole data set: found, nothing or inconclusive, and the reasons.

    found           a scorer removed samples by evidence
    nothing         the suspect model has learned, the scorer for planted samples was able to judge the classes, naming
                    those that were too small, and it saw the triggers that the run planted itself (canaries)
    inconclusive    anything else; each reason comes with what to do about it

A wrong "nothing" costs more than a wrong "inconclusive": whatever is missing or unknown makes a verdict inconclusive.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sanitize.data.class_names import class_name, named_in
from sanitize.plural import counted, were

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
UNJUDGED = 0.5  # share of the samples in classes too small to judge from which there is no verdict on the others
MAX_NAMED = 5  # classes named in a reason
CANARIES = {"noise": "faint noise", "patch": "a small patch"}
VERDICTS = {"found": "found", "nothing": "nothing stood out", "inconclusive": "inconclusive"}  # as people read them
ANOTHER_MODEL = "another --seed, with another --out, trains another model"


class Reason(NamedTuple):
    """A reason for a verdict, a sentence, and what to do about it ("" where nothing helps)."""

    why: str
    remedy: str = ""


class Finding(NamedTuple):
    """The verdict on a data set.

    Attributes:
        verdict: found, nothing or inconclusive.
        why: the verdict in one short sentence.
        reasons: reasons for the verdict; where it is "found", its limits, since more may be there.
        looked_for: kinds of samples that were looked for, with the scorers.
        canaries: triggers that the run planted to find out what it would have seen: `kind`, `label`, number `n` and
            share `rate` of the samples, `learned` and `recall` in [0, 1], `missed`: why it was not seen, or "".
    """

    verdict: Literal["found", "nothing", "inconclusive"]
    why: str
    reasons: tuple[Reason, ...]
    looked_for: dict[str, list[str]]
    canaries: tuple[dict[str, Any], ...] = ()

    def plain(self) -> dict[str, Any]:
        """The finding as JSON holds it."""
        reasons = [reason._asdict() for reason in self.reasons]
        return self._asdict() | {"reasons": reasons, "canaries": list(self.canaries)}


def find(
    selection: Mapping[str, Any],
    scorers: Mapping[str, Mapping[str, Any]],
    suspect: Mapping[str, Any] | None,
    removed: int,
    names: Mapping[int, str] | None = None,
) -> Finding:
    """The verdict on a cleaning run.

    Args:
        selection: content of `selection.json`.
        scorers: content of `scorer.json`, by kind of scorer.
        suspect: content of `suspect.json`; None where no suspect model was trained.
        removed: number of samples in quarantine; those that findings of hygiene removed are left out.
        names: names of the classes, by number.

    Returns:
        The finding.
    """
    names = names or {}
    looked_for: dict[str, list[str]] = {}
    for kind in scorers:
        looked_for.setdefault(LOOKED_FOR.get(kind, "odd samples"), []).append(kind)
    removed = max(0, removed - sum(entry.get("by_hygiene", 0) for entry in selection.get("classes", {}).values()))
    by_evidence = [kind for kind in scorers if removed and _has_removed(kind, selection)]
    found = _obstacles(selection, scorers, suspect, names)
    obstacles = tuple(Reason(_sentence(reason.why), reason.remedy) for reason in found)
    canaries = canaries_of(scorers, names)
    if PLANTED in by_evidence or (by_evidence and PLANTED not in scorers):
        what = " and ".join(dict.fromkeys(LOOKED_FOR.get(kind, "odd samples") for kind in by_evidence))
        why = f"{counted(removed, 'sample')} {were(removed)} removed: {what}."
        return Finding("found", why, obstacles, looked_for, canaries)
    others = f"; other rules removed {counted(removed, 'sample')}" if removed else ""
    if obstacles:
        why = f"Planted samples may be among those that were kept{others}."
        return Finding("inconclusive", why, obstacles, looked_for, canaries)
    stated = str((scorers[PLANTED].get("finding") or {}).get("why") or "no class holds a group that looks planted")
    judged = [named_in(part, names) for part in stated.split(". ")]
    seen = "this run found the triggers that it planted itself"
    reasons = tuple(
        Reason(_sentence(why)) for why in ("the suspect model has learned its training data", *judged, seen)
    )
    return Finding("nothing", f"No samples look planted{others}.", reasons, looked_for, canaries)


def by_remedy(reasons: Sequence[Mapping[str, str]]) -> list[tuple[list[str], str]]:
    """Reasons that have a remedy in common, and the remedy, in the order of their first reasons."""
    found: dict[str, list[str]] = {}
    for reason in reasons:
        found.setdefault(reason["remedy"], []).append(reason["why"])
    return [(why, remedy) for remedy, why in found.items()]


def canaries_of(scorers: Mapping[str, Mapping[str, Any]], names: Mapping[int, str]) -> tuple[dict[str, Any], ...]:
    """Triggers that a run planted, with `class_name` if their label has one, and what the run made of them."""
    found = scorers.get(PLANTED, {}).get("canaries") or {}
    return tuple(
        dict(canary) | ({"class_name": names[canary["label"]]} if canary["label"] in names else {})
        for canary in found.get("planted", ())
    )


def describe_canary(canary: Mapping[str, Any]) -> str:
    """A canary in words."""
    kind = CANARIES.get(str(canary["kind"]), str(canary["kind"]))
    names = {canary["label"]: canary["class_name"]} if "class_name" in canary else {}
    return f"{kind} on {_percent(canary['rate'])} of the samples, labelled {class_name(canary['label'], names)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


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


def _obstacles(
    selection: Mapping[str, Any],
    scorers: Mapping[str, Mapping[str, Any]],
    suspect: Mapping[str, Any] | None,
    names: Mapping[int, str],
) -> list[Reason]:
    """All obstacles to the verdict "nothing"."""
    if PLANTED not in scorers:
        return [
            Reason("scorer toxic_direction did not look for planted samples", "set scorers='[{kind: toxic_direction}]'")
        ]
    reasons = []
    if suspect is None:
        reasons.append(Reason("no suspect model with a known training accuracy", "set embedder.kind=classifier"))
    elif suspect.get("learned") is not True:
        setting = suspect.get("setting")
        why = f"the suspect model has not learned: {suspect.get('why', 'unknown')}"
        reasons.append(Reason(why, f"change {setting}" if setting else ""))
    else:
        reasons += _unseen(scorers[PLANTED], suspect, names)
    if _rule(PLANTED, selection) == "contamination":
        remedy = f"set select.rules.{PLANTED}.kind=separation"
        reasons.append(Reason("rule contamination removes a fixed share, planted or not", remedy))
    stated = scorers[PLANTED].get("finding") or {}
    verdict = stated.get("verdict", "nothing")
    classes = selection.get("classes", {})
    flagged = any(entry.get("scorers", {}).get(PLANTED, {}).get("flagged", 0) for entry in classes.values())
    if verdict == "inconclusive":
        why = str(stated.get("why") or "a group of samples may be planted or natural")
        is_unsure = any(group.get("decision") == "unsure" for group in stated.get("groups", ()))
        remedy = f"look at the group on the report page; {ANOTHER_MODEL}" if is_unsure else ""
        reasons.append(Reason(named_in(why, names), remedy))
    elif not stated and (near := [label for label, entry in classes.items() if _is_near(entry)]):
        reasons.append(Reason(f"class {_listed(near, names)} nearly stood out", ANOTHER_MODEL))
    elif (verdict != "nothing" or flagged) and not _has_removed(PLANTED, selection):
        remedy = "look at select.verdict and select.max_removed_fraction, and at what was restored by hand"
        reasons.append(Reason("flagged samples were kept", remedy))
    least = int(scorers[PLANTED].get("config", {}).get("min_class", 0))
    statistics = scorers[PLANTED].get("classes", {})
    judged = {label: entry.get("pictures", entry.get("n", 0)) for label, entry in classes.items()}
    small = [label for label, n in judged.items() if n < least or label not in statistics]
    n_small, n_all = (sum(classes[label].get("n", 0) for label in labels) for labels in (small, classes))
    if n_small > UNJUDGED * n_all:
        named = _listed(small, names) + (", ..." if small[MAX_NAMED:] else "")
        which = f"class {named} has" if len(small) == 1 else f"{counted(len(small), 'class')} ({named}) have"
        reasons.append(
            Reason(
                f"{which} too few samples to judge (fewer than {least})", "add samples, or lower scorers.0.min_class"
            )
        )
    return reasons


def _listed(labels: Sequence[str], names: Mapping[int, str]) -> str:
    return ", ".join(class_name(int(label), names) for label in labels[:MAX_NAMED])


def _unseen(scorer: Mapping[str, Any], suspect: Mapping[str, Any], names: Mapping[int, str]) -> list[Reason]:
    """Canaries that were not planted, not learned or not found."""
    found = scorer.get("canaries")
    if not found:
        why = "no trigger was planted to find out what this run would have seen"
        if suspect.get("given"):
            return [Reason(f"{why}: the suspect model was given", "set embedder.weights=null")]
        if scorer.get("config", {}).get("evidence", {}) is None:
            return [Reason(f"{why}: the scorer decides without evidence", "set scorers='[{kind: toxic_direction}]'")]
        return [Reason(why, "set embedder.canary={}")]
    if not found.get("planted"):
        return [Reason(f"no trigger could be planted to find out what this run would have seen: {found.get('why')}")]
    reasons = []
    for canary in canaries_of({PLANTED: scorer}, names):
        what = f"a trigger that this run planted ({describe_canary(canary)})"
        if canary["missed"] == "not learned":
            why = f"{what} was not learned: the suspect model gives its label to {_percent(canary['learned'])} of them"
            reasons.append(Reason(why, f"set embedder.min_steps={max(600, 2 * int(suspect.get('steps') or 0))}"))
        elif canary["missed"]:
            why = f"{what} was learned, but not found: recall {canary['recall']:.2f}"
            reasons.append(Reason(why, ANOTHER_MODEL))
    return reasons


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."


def groups_of(scorers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Candidate groups that the scorers judged, the planted ones first."""
    order = {"planted": 0, "unsure": 1}
    groups = [dict(group) for scorer in scorers for group in (scorer.get("finding") or {}).get("groups", [])]
    return sorted(groups, key=lambda group: (order.get(str(group.get("decision")), 2), -float(group.get("z") or 0)))
