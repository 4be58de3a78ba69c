"""From the evidence of a group to a decision; one rule, in rounds.

    burst      most of the group are near-duplicates of each other: copies, tracks. Left alone.
    planted    level >= `level`, conflict >= `conflict`, outvoted >= `outvoted`, z >= `z_planted`, and the model has
               learned. Removed.
    unsure     the same with z >= `z_unsure` and outvoted >= `outvoted_unsure`, or a model that has not learned. Nothing
               is removed.
    natural    all others. Left alone.

The surest planted group of a class is taken out and the others are weighed again, so that two triggers in one class are
found in one run, and the rest of the class that a group is compared with holds no other group.

The size of a group decides nothing: poison may be most of its class. The sign of z says which side of a split it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.score.toxic_direction.candidates import MIN_GROUP, Candidate, candidates
from sanitize.score.toxic_direction.evidence import (
    NEIGHBOURS,
    Appearance,
    Evidence,
    appearance_of,
    disagreement,
    expected_disagreement,
    neighbour_labels,
    weigh,
)
from sanitize.score.toxic_direction.grow import FOLDS, Lines, grow, log_odds
from sanitize.score.toxic_direction.split import SplitConfig

Decided = Literal["planted", "unsure", "burst", "natural"]
ROUNDS = 3  # most planted groups of a class
LEARNED = 0.5  # least training accuracy of a model whose doubt says something
SHOWN = 100  # most groups in a finding


class EvidenceConfig(BaseModel):
    """Settings of the decision; the defaults lie between natural groups and poison on the data in docs/verdict.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    appearance: str = Field(default="gradients", description="embedding made without labels, in which neighbours count")
    level: float = Field(default=0.5, ge=0, le=1, description="least mean label disagreement of a planted group")
    conflict: float = Field(
        default=0.2, ge=0, le=2, description="least difference in conflict to the rest of the class"
    )
    outvoted: float = Field(default=0.5, ge=0, le=1, description="least share of a planted group outvoted by one label")
    outvoted_unsure: float = Field(default=0.4, ge=0, le=1, description="the same for an inconclusive verdict")
    z_planted: float = Field(default=7.0, gt=0, description="standard errors from which a group is planted")
    z_unsure: float = Field(default=6.0, gt=0, description="standard errors from which a verdict is inconclusive")
    burst: float = Field(default=0.8, gt=0, le=1, description="share of near-duplicates from which a group is a burst")


class Group(NamedTuple):
    """A weighed group of a class.

    Attributes:
        label: class of the group.
        candidate: members, among the rows of the class.
        size: members that no earlier round has taken.
        share: size as a share of the class.
        evidence: measures of the group.
        decision: planted, unsure, burst or natural.
    """

    label: int
    candidate: Candidate
    size: int
    share: float
    evidence: Evidence
    decision: Decided


class Planted(NamedTuple):
    """A planted group, and the lines that tell its members."""

    group: Group
    lines: Lines


@dataclass(frozen=True)
class Knowledge:
    """What all classes share.

    Attributes:
        pooled_ND: embedding of the model, float32; rows in random order.
        appearance: the same rows without the model.
        conflict_N: conflict of each label without a group erased, float32.
        expected_N: disagreement that the doubt of the model explains, float32.
        fold_N: fold of each row, int64.
        accuracy: share of the rows whose label the model predicts.
    """

    pooled_ND: Tensor
    appearance: Appearance
    conflict_N: Tensor
    expected_N: Tensor
    fold_N: Tensor
    accuracy: float


def know(pooled_ND: Tensor, appearance_ND: Tensor, logits_NK: Tensor, labels_N: Tensor, digests_N: Tensor) -> Knowledge:
    """Neighbours, doubt and conflict of all samples.

    Args:
        pooled_ND: embedding of the model, float32, in random order.
        appearance_ND: embedding made without labels, float32.
        logits_NK: logits of the model, float32.
        labels_N: given labels, int64, each below K.
        digests_N: hashes of the rows, int64; they choose the folds.
    """
    appearance = appearance_of(appearance_ND, labels_N)
    log_p_N = logits_NK.double().log_softmax(1).gather(1, labels_N[:, None])[:, 0]
    d_N = disagreement(neighbour_labels(appearance, torch.arange(len(labels_N))), labels_N)
    expected_N = expected_disagreement(d_N, log_p_N)
    accuracy = float((logits_NK.argmax(1) == labels_N).double().mean())
    return Knowledge(pooled_ND, appearance, d_N - expected_N, expected_N, digests_N % FOLDS, accuracy)


def decision(evidence: Evidence, config: EvidenceConfig, has_learned: bool = True) -> Decided:
    """What the evidence of a group amounts to."""
    if evidence.burst >= config.burst:
        return "burst"
    is_against = evidence.level >= config.level and evidence.conflict >= config.conflict
    if not is_against or evidence.z < config.z_unsure or evidence.outvoted < config.outvoted_unsure:
        return "natural"
    is_sure = evidence.z >= config.z_planted and evidence.outvoted >= config.outvoted
    return "planted" if is_sure and has_learned else "unsure"


def decide_class(
    known: Knowledge, label: int, rows: Tensor, config: EvidenceConfig, split: SplitConfig, generator: torch.Generator
) -> tuple[list[Planted], list[Group]]:
    """Planted groups of a class, the surest first, and all its groups as they were weighed at first.

    Args:
        known: what all classes share.
        label: the class.
        rows: indices of its samples.
        config: settings of the decision.
        split: settings of the search.
        generator: random source of the search.
    """
    spaces = {"pooled": known.pooled_ND[rows], "appearance": known.appearance.z_NP[rows]}
    found = candidates(spaces, known.conflict_N[rows], split, generator)
    planted: list[Planted] = []
    first: list[Group] = []
    free_n = torch.ones(len(rows), dtype=torch.bool)
    for _ in range(ROUNDS):
        weighed = [
            _weighed(known, label, rows, candidate, free_n, config)
            for candidate in found
            if min(int((candidate.members_n & free_n).sum()), int((~candidate.members_n & free_n).sum())) >= MIN_GROUP
        ]
        first = first or weighed
        sure = [group for group in weighed if group.decision == "planted"]
        if not sure:
            break
        surest = max(sure, key=lambda group: group.evidence.z)
        free = {name: x_nD[free_n] for name, x_nD in spaces.items()}
        members_n = surest.candidate.members_n
        lines = grow(free, members_n[free_n], known.fold_N[rows][free_n], split)
        planted.append(Planted(surest, lines))
        odds_n = log_odds(lines, torch.cat(list(spaces.values()), 1), known.fold_N[rows])
        free_n = free_n & ~(odds_n > 0) & ~members_n
    return planted, first


def _weighed(
    known: Knowledge, label: int, rows: Tensor, candidate: Candidate, free_n: Tensor, config: EvidenceConfig
) -> Group:
    group, rest = rows[candidate.members_n & free_n], rows[~candidate.members_n & free_n]
    evidence = weigh(known.appearance, group, rest, known.expected_N)
    decided = decision(evidence, config, known.accuracy >= LEARNED)
    return Group(label, candidate, len(group), len(group) / len(rows), evidence, decided)


def reason(group: Group) -> str:
    """The evidence of a group in words."""
    n, rest = round(NEIGHBOURS * group.evidence.level), round(NEIGHBOURS * group.evidence.level_rest)
    labels = f"{n} of {NEIGHBOURS} nearest neighbours carry another label ({rest} in the rest of the class)"
    match group.decision:
        case "planted":
            return f"{labels}, although the model is sure of this one: {group.evidence.z:.1f} standard errors"
        case "unsure":
            return f"{labels}, more than the model's doubt explains: {group.evidence.z:.1f} standard errors"
        case "burst":
            return (
                f"{100 * group.evidence.burst:.0f} % are near-duplicates of each other: copies or a burst, left alone"
            )
        case "natural":
            return labels


def finding(planted: Sequence[Planted], groups: Sequence[Group], accuracy: float) -> dict[str, Any]:
    """Verdict of the data set and the groups worth showing, for scorer.json.

    Args:
        planted: planted groups of all classes.
        groups: all groups of all classes.
        accuracy: training accuracy of the model on the sample.
    """
    touched = {one.group.label for one in planted}
    unsure = [g for g in groups if g.decision == "unsure" and g.label not in touched]
    if planted:
        classes = f"{len(touched)} class" + ("es" if len(touched) > 1 else "")
        verdict, why = "found", f"{len(planted)} planted group{'s' if len(planted) > 1 else ''} in {classes}"
    elif accuracy < LEARNED:
        verdict = "inconclusive"
        why = f"the model predicts {100 * accuracy:.0f} % of the labels it was trained on: it has not learned the data"
    elif unsure:
        surest = max(unsure, key=lambda g: g.evidence.z)
        verdict, why = "inconclusive", f"a group of class {surest.label} may be planted: {reason(surest)}"
    else:
        verdict, why = (
            "nothing",
            "no group of a class is in conflict with its labels; poison with true labels is not seen",
        )
    return {"verdict": verdict, "why": why, "groups": shown(planted, groups)}


def shown(planted: Sequence[Planted], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Entries of the planted and the unsure groups, of the largest burst of a class, and of its widest other split."""
    entries = [_entry(one.group, one.lines.separation) for one in planted]
    touched = {one.group.label for one in planted}
    others: list[Group] = []
    for label in sorted({group.label for group in groups}):
        of_class = [group for group in groups if group.label == label]
        unsure = [g for g in of_class if g.decision == "unsure" and label not in touched]
        bursts = [g for g in of_class if g.decision == "burst"]
        natural = [g for g in of_class if g.decision == "natural"]
        others += sorted(unsure, key=lambda g: -g.evidence.z)[:1]
        others += sorted(bursts, key=lambda g: -g.size)[:1]
        others += sorted(natural, key=lambda g: -g.candidate.separation)[:1]
    rank = {"unsure": 0, "burst": 1, "natural": 2}
    others.sort(key=lambda g: (rank[g.decision], -g.candidate.separation))
    return (entries + [_entry(group, group.candidate.separation) for group in others])[:SHOWN]


def _entry(group: Group, separation: float) -> dict[str, Any]:
    numbers = {
        "share": group.share,
        "separation": separation,
        "level": group.evidence.level,
        "level_rest": group.evidence.level_rest,
        "outvoted": group.evidence.outvoted,
        "conflict": group.evidence.conflict,
        "z": group.evidence.z,
        "burst": group.evidence.burst,
    }
    return {
        "label": group.label,
        "size": group.size,
        **{name: round(value, 4) for name, value in numbers.items() if math.isfinite(value)},
        "decision": group.decision,
        "reason": reason(group),
    }


def statistics_of(planted: Sequence[Planted], groups: Sequence[Group]) -> Mapping[str, float]:
    """Class statistics: those of the surest planted group, otherwise of the group with the highest z."""
    if not groups:
        return {"planted": 0.0, "separation": 0.0}
    group = planted[0].group if planted else max(groups, key=lambda g: g.evidence.z)
    return {
        "planted": float(len(planted)),
        "separation": planted[0].lines.separation if planted else group.candidate.separation,
        "minority_fraction": group.share,
        "disagreement": group.evidence.level,
        "disagreement_of_rest": group.evidence.level_rest,
        "side_by_labels": 1.0,
        "conflict": group.evidence.conflict,
        "z": group.evidence.z,
    }
