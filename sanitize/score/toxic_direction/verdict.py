"""The verdict on a data set, and the groups worth showing, in words and numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sanitize.score.toxic_direction.candidates import MIN_GROUP
from sanitize.score.toxic_direction.decide import Planted
from sanitize.score.toxic_direction.evidence import BURST, NEIGHBOURS
from sanitize.score.toxic_direction.mixed import Mixed
from sanitize.score.toxic_direction.rule import EvidenceConfig
from sanitize.score.toxic_direction.twins import Twins
from sanitize.score.toxic_direction.weigh import LEARNED, Group, Knowledge

SHOWN = 100  # most groups in a finding
JUDGED = 0.5  # share of the samples in classes that could be judged below which there is no verdict
MAX_NAMED = 5  # classes named in a sentence


def reason(group: Group) -> str:
    """The evidence of a group in words."""
    n, rest = round(NEIGHBOURS * group.evidence.level), round(NEIGHBOURS * group.evidence.level_rest)
    labels = f"{n} of {NEIGHBOURS} nearest neighbours carry another label ({rest} in the rest of the class)"
    odd, separation = oddness(group), group.measures.separation
    match group.basis:
        case "labels" | "labels and stamp" if group.decision == "planted":
            sure = f"{labels}, although the model is sure of this one; {odd}"
            return sure if group.basis == "labels" else f"{sure}; {_stamped(group)}"
        case "labels":
            return f"{labels}, more than the model's doubt explains; {odd}"
        case "labels and shape":
            found = "the group was grown from such samples and is" if group.measures.is_grown else "the group is"
            return (
                f"{labels}, although the model is sure of this one; {found} {separation:.1f} standard deviations from "
                "the rest of the class"
            )
        case "labels and stamp" | "stamp":
            return f"{_stamped(group)}; it is {separation:.1f} standard deviations from the rest of the class"
        case "no stamp":
            return (
                f"{labels}; the group is {separation:.1f} standard deviations from the rest "
                "of the class. A test of its pattern on other images would decide: it needs the images and the model"
            )
        case "near-duplicates":
            return (
                f"{100 * group.evidence.burst:.0f} % are near-duplicates of each other: copies or a burst, left alone"
            )
        case "":
            return labels


def oddness(group: Group) -> str:
    """The oddness of a group in words."""
    p = group.evidence.p
    rate = f"{100 * p:.2g} %" if p >= 1e-4 else "less than .01 %"
    return (
        f"its conflict is {group.evidence.z:.1f} standard deviations of natural groups of these data (nominal rate of "
        f"such a group in clean data: {rate})"
    )


def _stamped(group: Group) -> str:
    """The stamp of a group in words."""
    once, doubled = group.measures.stamp or (0.0, 0.0)
    return (
        f"what its images share, put on images of other classes, turns {100 * once:.0f} % of them into the class "
        f"({100 * doubled:.0f} % at twice the strength)"
    )


def finding(
    planted: Sequence[Planted],
    groups: Sequence[Group],
    accuracy: float,
    clean_labels: str,
    twins: Twins | None = None,
    mixed: Mixed | None = None,
    small: Sequence[int] = (),
    judged: float = 1.0,
) -> dict[str, Any]:
    """Verdict of the data set and the groups worth showing, for scorer.json.

    Args:
        planted: planted groups of all classes.
        groups: all groups of all classes.
        accuracy: training accuracy of the model on the sample.
        clean_labels: sentence about poison with true labels (`on_clean_labels`), where nothing stands out.
        twins: near-duplicates with different labels, in data full of near-duplicates.
        mixed: the class that the model confuses with every other one.
        small: labels of the classes that are too small to be judged.
        judged: share of the samples in the other classes.
    """
    touched = {one.group.label for one in planted}
    unsure = [g for g in groups if g.decision == "unsure" and g.label not in touched]
    if planted:
        classes = f"{len(touched)} class" + ("es" if len(touched) > 1 else "")
        verdict, why = "found", f"{len(planted)} planted group{'s' if len(planted) > 1 else ''} in {classes}"
    elif accuracy < LEARNED:
        verdict = "inconclusive"
        why = f"the model predicts {100 * accuracy:.0f} % of the labels it was trained on: it has not learned the data"
    elif judged < JUDGED:
        verdict, why = "inconclusive", f"only {100 * judged:.0f} % of the samples could be judged{not_judged(small)}"
    elif unsure:
        surest = min(unsure, key=lambda g: (g.evidence.p, -g.evidence.z))
        verdict, why = "inconclusive", f"a group of class {surest.label} may be planted: {reason(surest)}"
    elif twins is not None and twins.n >= MIN_GROUP:
        verdict = "inconclusive"
        why = (
            f"{twins.n} images of class {twins.label} are near-duplicates of images labelled {twins.other}: one of the "
            "two labels is wrong, and frames of one object do not show which"
        )
    elif mixed is not None and mixed.stands_out:
        verdict = "inconclusive"
        why = (
            f"the model confuses class {mixed.label} with every other class, by {100 * mixed.least:.1f} % or more (no "
            f"other class by more than {100 * mixed.next:.1f} %): images of all classes carry its label, by mistake or "
            "as poison that the model has learned in part. Look at this class, or train the model longer"
        )
    else:
        verdict, why = (
            "nothing",
            f"no group of a class is in conflict with its labels; {clean_labels}{not_judged(small)}",
        )
    return {"verdict": verdict, "why": why, "groups": [_entry(*one) for one in shown(planted, groups)]}


def not_judged(small: Sequence[int]) -> str:
    """Which classes a verdict says nothing of; empty where it holds for all."""
    if not small:
        return ""
    named = ", ".join(map(str, small[:MAX_NAMED])) + (", ..." if len(small) > MAX_NAMED else "")
    return f". Not judged, because they are too small: {len(small)} class{'es' * (len(small) > 1)} ({named})"


def on_clean_labels(known: Knowledge, config: EvidenceConfig, has_images: bool) -> str:
    """What can be said about poison with true labels where no stamp was found."""
    if not has_images:
        return "poison with true labels is not seen without the images and the model"
    if known.bursty >= config.bursty:
        return (
            f"poison with true labels is not seen in data full of near-duplicates ({100 * known.bursty:.0f} % are in "
            f"groups of {BURST} or more)"
        )
    return "no pattern of a group turns other images into its class"


def shown(planted: Sequence[Planted], groups: Sequence[Group]) -> list[tuple[Group, float]]:
    """Planted and unsure groups, the largest burst of a class, and the group of its widest other split.

    Each comes with its separation.
    """
    first = [(one.group, one.lines.separation) for one in planted]
    touched = {one.group.label for one in planted}
    others: list[Group] = []
    for label in sorted({group.label for group in groups}):
        of_class = [group for group in groups if group.label == label]
        unsure = [g for g in of_class if g.decision == "unsure" and label not in touched]
        bursts = [g for g in of_class if g.decision == "burst"]
        # Both sides of a split are groups; the larger one is the rest of the class.
        natural = [g for g in of_class if g.decision == "natural" and g.measures.share <= 0.5]
        others += sorted(unsure, key=lambda g: -g.evidence.z)[:1]
        others += sorted(bursts, key=lambda g: -g.measures.size)[:1]
        others += sorted(natural, key=lambda g: -g.candidate.separation)[:1]
    rank = {"unsure": 0, "burst": 1, "natural": 2}
    others.sort(key=lambda g: (rank[g.decision], -g.candidate.separation))
    return (first + [(group, group.candidate.separation) for group in others])[:SHOWN]


def _entry(group: Group, separation: float) -> dict[str, Any]:
    numbers = {
        "share": group.measures.share,
        "separation": separation,
        "level": group.evidence.level,
        "level_rest": group.evidence.level_rest,
        "outvoted": group.evidence.outvoted,
        "conflict": group.evidence.conflict,
        "z": group.evidence.z,
        "burst": group.evidence.burst,
    }
    if group.measures.stamp is not None:
        numbers |= {"stamp": group.measures.stamp[0], "stamp_doubled": group.measures.stamp[1]}
    return {
        "label": group.label,
        "size": group.measures.size,
        **{name: round(value, 4) for name, value in numbers.items() if math.isfinite(value)},
        "p": float(f"{group.evidence.p:.2g}"),
        "decision": group.decision,
        "basis": group.basis,
        "reason": reason(group),
    }


def statistics_of(planted: Sequence[Planted], groups: Sequence[Group]) -> Mapping[str, float]:
    """Class statistics: those of the surest planted group, otherwise of the group with the highest z."""
    if not groups:
        return {"planted": 0.0, "separation": 0.0}
    group = planted[0].group if planted else max(groups, key=lambda g: g.evidence.z)
    stamp = {} if group.measures.stamp is None else {"stamp": group.measures.stamp[0]}
    return stamp | {
        "planted": float(len(planted)),
        "separation": planted[0].lines.separation if planted else group.candidate.separation,
        "minority_fraction": group.measures.share,
        "disagreement": group.evidence.level,
        "disagreement_of_rest": group.evidence.level_rest,
        "side_by_labels": 0.0 if group.basis == "stamp" else 1.0,
        "conflict": group.evidence.conflict,
        "z": group.evidence.z,
    }
