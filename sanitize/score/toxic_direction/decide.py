"""From the evidence of a group to a decision; one rule, in rounds.

A group is in conflict where level >= `level`, conflict >= `conflict` and outvoted >= `outvoted_unsure`; it has a stamp
(`stamp.py`) where both shares reach theirs. The first line that holds decides:

    burst      most of the group are near-duplicates of each other: copies, tracks. Left alone.
    planted    by labels: in conflict, outvoted >= `outvoted`, z >= `z_planted`
               by labels and stamp: in conflict, z >= `z_likely`, a stamp
               by stamp: a stamp, held-out separation >= `stamp_separation`, less than `stamp_share` of its class, few
               bursts in the group and in the data
               by labels and shape: grown from conflict, level >= `level`, outvoted >= `outvoted`, z >= `grown_z`,
               held-out separation >= `grown_separation`, few bursts in the data
    unsure     in conflict, z >= `z_unsure`; by stamp, but held-out separation only >= `stamp_unsure`; planted, if only
               there were a stamp, which could not be measured; planted, but the model has not learned. Nothing is
               removed.
    natural    all others. Left alone.

The surest planted group of a class is taken out and the others are weighed again, so that two triggers in one class are
found in one run, and the rest of the class that a group is compared with holds no other group.

The size of a group decides nothing where labels speak: poison may be most of its class. The sign of z says which side
of a split it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.score.toxic_direction.candidates import DEEPER_SEPARATION, MIN_GROUP, Candidate, candidates, parts
from sanitize.score.toxic_direction.complete import complete
from sanitize.score.toxic_direction.evidence import (
    BURST,
    NEIGHBOURS,
    Appearance,
    Evidence,
    appearance_of,
    disagreement,
    expected_disagreement,
    neighbour_labels,
    weigh,
)
from sanitize.score.toxic_direction.grow import (
    FOLDS,
    Lines,
    axes_of,
    grow,
    grown_from_conflict,
    held_out,
    log_odds,
)
from sanitize.score.toxic_direction.split import SplitConfig
from sanitize.score.toxic_direction.stamp import Suspect, matched, measure
from sanitize.score.toxic_direction.twins import Twins

Decided = Literal["planted", "unsure", "burst", "natural"]
Basis = Literal["labels", "labels and stamp", "stamp", "labels and shape", "no stamp", "near-duplicates", ""]
ROUNDS = 3  # most planted groups of a class
LEARNED = 0.5  # least training accuracy of a model whose doubt says something
ADDED = 0.1  # least growth of a group that is worth another look
SHOWN = 100  # most groups in a finding
MOST_STAMPS, FEWEST_STAMPED = 40, 16  # groups of a data set whose stamps are measured, and samples of such a group


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
    # BadNets in a small class of tracks had 4.2; natural groups reach 6, but have no stamp.
    z_likely: float = Field(default=3.0, gt=0, description="standard errors that are enough where the stamp agrees")
    # Natural groups reached .16 and .37 on Fashion-MNIST, .15 and .66 on CIFAR-10, .19 and .79 among traffic signs;
    # SIG .33 and .81, BadNets .74 and .83.
    stamp: float = Field(default=0.25, gt=0, le=1, description="least share of images that a stamp turns")
    stamp_doubled: float = Field(default=0.5, gt=0, le=1, description="the same with twice the pattern")
    # SIG 7.1 (CIFAR-10) and 9.5 (Fashion-MNIST), BadNets on photographs 9.2; clean modes with a stamp 2.0 and 3.5.
    stamp_separation: float = Field(
        default=6.0, gt=0, description="held-out separation from which a group is planted by its stamp alone"
    )
    stamp_unsure: float = Field(default=4.5, gt=0, description="the same from which a verdict is inconclusive")
    # Clean Fashion-MNIST 7.7 (9.2 in a class beside a poisoned one), SIG 9.5, BadNets on photographs 9.2.
    no_stamp_separation: float = Field(
        default=9.0, gt=0, description="held-out separation from which a group without a stamp is inconclusive"
    )
    # Natural groups are pairs: a large one that has a stamp is the class itself, seen from its rare style.
    stamp_share: float = Field(
        default=0.5, gt=0, le=1, description="share of its class below which a stamp alone decides"
    )
    stamp_burst: float = Field(
        default=0.2, ge=0, le=1, description="share of near-duplicates in a group below which a stamp alone decides"
    )
    # Share of samples with four near-duplicates or more: Fashion-MNIST .01, traffic signs filmed from a car .5 to .65.
    bursty: float = Field(
        default=0.1, ge=0, le=1, description="share of bursts in the data from which a stamp alone decides nothing"
    )
    # CIFAR-10 with Adap-Blend, seen in all layers, 5.6; clean classes 3.0 on CIFAR-10, 4.4 on Fashion-MNIST.
    grown_separation: float = Field(
        default=5.0, gt=0, description="least held-out separation of a planted group grown from conflict"
    )
    grown_z: float = Field(
        default=4.0, gt=0, description="least standard errors of a planted group grown from conflict"
    )


class Measures(NamedTuple):
    """Facts about a group beside its labels.

    Attributes:
        size: samples that no earlier round has taken.
        share: size as a share of the class.
        separation: held-out separation from the rest of the class (`grow.held_out`); 0 where it was not needed.
        is_grown: True for a group grown from conflict, whose labels chose it.
        is_bursty: True where the data are full of bursts.
        stamp: shares of images of other classes that the stamp turns; None where it was not measured.
    """

    size: int = 0
    share: float = 0.0
    separation: float = 0.0
    is_grown: bool = False
    is_bursty: bool = False
    stamp: tuple[float, float] | None = None


NO_MEASURES = Measures()


class Group(NamedTuple):
    """A weighed group of a class.

    Attributes:
        label: class of the group.
        candidate: members, among the rows of the class.
        evidence: evidence of the labels.
        measures: further evidence.
        decision: planted, unsure, burst or natural.
        basis: evidence that decided.
    """

    label: int
    candidate: Candidate
    evidence: Evidence
    measures: Measures
    decision: Decided
    basis: Basis


class Planted(NamedTuple):
    """A planted group, and the lines that tell its members."""

    group: Group
    lines: Lines


@dataclass(frozen=True)
class Knowledge:
    """What all classes share.

    Attributes:
        model: embeddings of the model by name, float32 (N, D); rows in random order. Groups are searched in the first.
        appearance: the same rows without the model.
        conflict_N: conflict of each label without a group erased, float32.
        expected_N: disagreement that the doubt of the model explains, float32.
        fold_N: fold of each row, int64.
        is_right_N: True where the model predicts the label.
        bursty: share of the rows in bursts.
    """

    model: Mapping[str, Tensor]
    appearance: Appearance
    conflict_N: Tensor
    expected_N: Tensor
    fold_N: Tensor
    is_right_N: Tensor
    bursty: float

    @property
    def spaces(self) -> dict[str, Tensor]:
        """All embeddings by name: those of the model, then principal axes of the appearance."""
        return {**self.model, "appearance": self.appearance.z_NP}

    def of_model(self) -> Tensor:
        """Embeddings of the model side by side."""
        return torch.cat(list(self.model.values()), 1)

    @property
    def accuracy(self) -> float:
        """Share of the rows whose label the model predicts."""
        return float(self.is_right_N.double().mean())


def know(
    model: Mapping[str, Tensor], appearance_ND: Tensor, logits_NK: Tensor, labels_N: Tensor, digests_N: Tensor
) -> Knowledge:
    """Neighbours, doubt and conflict of all samples.

    Args:
        model: embeddings of the model by name, float32 (N, D), in random order.
        appearance_ND: embedding made without labels, float32.
        logits_NK: logits of the model, float32.
        labels_N: given labels, int64, each below K.
        digests_N: hashes of the rows, int64; they choose the folds.
    """
    appearance = appearance_of(appearance_ND, labels_N)
    log_p_N = logits_NK.double().log_softmax(1).gather(1, labels_N[:, None])[:, 0]
    d_N = disagreement(neighbour_labels(appearance, torch.arange(len(labels_N))), labels_N)
    expected_N = expected_disagreement(d_N, log_p_N)
    is_right_N = logits_NK.argmax(1) == labels_N
    size = appearance.duplicates_N.bincount()
    bursty = float((size[appearance.duplicates_N] >= BURST).float().mean())
    return Knowledge(model, appearance, d_N - expected_N, expected_N, digests_N % FOLDS, is_right_N, bursty)


def decision(
    evidence: Evidence, config: EvidenceConfig, has_learned: bool = True, measures: Measures = NO_MEASURES
) -> tuple[Decided, Basis]:
    """What the evidence of a group amounts to, and which evidence decided."""
    if evidence.burst >= config.burst:
        return "burst", "near-duplicates"
    planted: Decided = "planted" if has_learned else "unsure"
    stamp, separation = measures.stamp, measures.separation
    has_stamp = stamp is not None and stamp[0] >= config.stamp and stamp[1] >= config.stamp_doubled
    by_labels = is_likely(evidence, config, measures)
    if by_labels and evidence.z >= config.z_planted and evidence.outvoted >= config.outvoted:
        return planted, "labels"
    if by_labels and has_stamp:
        return planted, "labels and stamp"
    by_stamp = may_be_clean_label(evidence, config, measures)
    if by_stamp and has_stamp and separation >= config.stamp_separation:
        return planted, "stamp"
    is_core = measures.is_grown and not measures.is_bursty and separation >= config.grown_separation
    is_against = evidence.level >= config.level and evidence.outvoted >= config.outvoted
    if is_core and is_against and evidence.z >= config.grown_z:
        return planted, "labels and shape"
    if by_stamp and has_stamp and separation >= config.stamp_unsure:
        return "unsure", "stamp"
    if by_labels and evidence.z >= config.z_unsure:
        return "unsure", "labels"
    if stamp is None and needs_stamp(evidence, config, measures):
        return "unsure", "no stamp"
    return "natural", ""


def in_conflict(evidence: Evidence, config: EvidenceConfig) -> bool:
    """True where most neighbours speak against the labels of a group, beyond the doubt of the model."""
    is_against = evidence.level >= config.level and evidence.conflict >= config.conflict
    return is_against and evidence.outvoted >= config.outvoted_unsure


def may_be_clean_label(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where a stamp alone can decide."""
    is_loose = not measures.is_bursty and evidence.burst < config.stamp_burst
    return is_loose and measures.share < config.stamp_share


def is_likely(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where labels speak against a group, but do not suffice. They cannot judge a group that they chose."""
    return in_conflict(evidence, config) and not measures.is_grown and evidence.z >= config.z_likely


def wants_stamp(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where a stamp can change the decision on a group that is not planted without one."""
    if evidence.burst >= config.burst or measures.size < FEWEST_STAMPED:
        return False
    by_stamp = may_be_clean_label(evidence, config, measures) and measures.separation >= config.stamp_unsure
    return is_likely(evidence, config, measures) or by_stamp


def needs_stamp(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where a group is too odd to be called natural without a stamp.

    All clean data have groups that want a stamp. Only those far from the rest of their class make a verdict
    inconclusive; without hints from labels, those farther than the styles of clean data.
    """
    if not wants_stamp(evidence, config, measures):
        return False
    likely = is_likely(evidence, config, measures)
    return measures.separation >= (config.stamp_separation if likely else config.no_stamp_separation)


@dataclass(frozen=True)
class Weighed:
    """Groups of a class before their stamps.

    Attributes:
        label: the class.
        rows: indices of its samples.
        spaces: embeddings of its samples, by name.
        groups: its groups.
    """

    label: int
    rows: Tensor
    spaces: Mapping[str, Tensor]
    groups: Sequence[Group]


def weigh_class(
    known: Knowledge, label: int, rows: Tensor, config: EvidenceConfig, split: SplitConfig, generator: torch.Generator
) -> Weighed:
    """All groups of a class.

    Args:
        known: what all classes share.
        label: the class.
        rows: indices of its samples.
        config: settings of the decision.
        split: settings of the search.
        generator: random source of the search.
    """
    spaces = {name: x_ND[rows] for name, x_ND in known.spaces.items()}
    searched = {name: spaces[name] for name in (next(iter(known.model)), "appearance")}
    fold_n, free_n = known.fold_N[rows], torch.ones(len(rows), dtype=torch.bool)
    is_bursty = known.bursty >= config.bursty
    found = candidates(searched, known.conflict_N[rows], split, generator)
    groups: list[Group] = []
    if not found:
        return Weighed(label, rows, spaces, groups)
    axes = axes_of(spaces, split)
    for candidate in found:
        group = _weighed(known, label, rows, candidate, free_n, config, Measures(is_bursty=is_bursty))
        # The separation on the rows of the search is the larger one, nearly always.
        is_apart = candidate.separation >= config.stamp_unsure and may_be_clean_label(
            group.evidence, config, group.measures
        )
        if is_apart or is_likely(group.evidence, config, group.measures):
            apart = held_out(axes, candidate.members_n, fold_n)
            separation = 0.0 if apart is None else apart[0].separation
            group = _decided(group, config, known, group.measures._replace(separation=separation))
        groups.append(group)
    # Frames of one object are told apart best of all, so in bursty data a group grown from conflict says nothing.
    core = None if is_bursty else grown_from_conflict(axes, known.conflict_N[rows], fold_n)
    if core is not None:
        candidate = Candidate("conflict", core[0], 0.0)
        measures = Measures(separation=core[1], is_grown=True)
        groups.append(_weighed(known, label, rows, candidate, free_n, config, measures))
    groups += _parts_of_unsure(known, label, rows, spaces["appearance"], groups, config, split, generator)
    return Weighed(label, rows, spaces, groups)


def _parts_of_unsure(
    known: Knowledge,
    label: int,
    rows: Tensor,
    appearance_nP: Tensor,
    groups: Sequence[Group],
    config: EvidenceConfig,
    split: SplitConfig,
    generator: torch.Generator,
) -> list[Group]:
    """Parts of the surest group that labels leave unsure, once it is complete; none where another is planted.

    Poison from several classes conflicts most where it comes from the class that is least like its label.
    """
    unsure = [group for group in groups if group.decision == "unsure" and group.basis == "labels"]
    if not unsure or any(group.decision == "planted" for group in groups):
        return []
    surest = max(unsure, key=lambda group: group.evidence.z)
    whole = complete(known.of_model(), known.appearance, rows, surest.candidate.members_n, known.fold_N[rows], split)
    if whole is None or whole.separation < DEEPER_SEPARATION:
        return []
    is_seen_n = ~whole.members_n  # the rest that a part is compared with holds no other part
    found = []
    for part in parts(appearance_nP, whole.members_n, split, generator):
        measures = Measures(is_bursty=known.bursty >= config.bursty)
        if int(is_seen_n.sum()) >= MIN_GROUP <= int(part.members_n.sum()):
            found.append(_weighed(known, label, rows, part, is_seen_n | part.members_n, config, measures))
    return found


def measure_stamps(
    weighed: Sequence[Weighed], known: Knowledge, config: EvidenceConfig, suspect: Suspect, names: Sequence[int]
) -> list[Weighed]:
    """The same groups, decided with the stamps of at most `MOST_STAMPS` groups that need one, the surest first.

    Args:
        weighed: groups of all classes.
        known: what all classes share.
        config: settings of the decision.
        suspect: model and images.
        names: names of all samples, by which images are read.
    """
    wanted = [
        (i, j, group)
        for i, one in enumerate(weighed)
        for j, group in enumerate(one.groups)
        if group.decision != "planted" and wants_stamp(group.evidence, config, group.measures)
    ]
    likely = [item for item in wanted if is_likely(item[2].evidence, config, item[2].measures)]
    likely.sort(key=lambda item: -item[2].evidence.z)
    far = [item for item in wanted if not is_likely(item[2].evidence, config, item[2].measures)]
    far.sort(key=lambda item: -item[2].measures.separation)
    wanted = (likely + far)[:MOST_STAMPS]
    matches = []
    for i, _, group in wanted:
        members_n, rows = group.candidate.members_n, weighed[i].rows
        matches.append(matched(known.appearance, rows[members_n], rows[~members_n]))
    stamps = measure(matches, suspect, names, known.appearance.labels_N, known.is_right_N)
    decided = [list(one.groups) for one in weighed]
    for (i, j, group), stamp in zip(wanted, stamps, strict=True):
        decided[i][j] = _decided(group, config, known, group.measures._replace(stamp=stamp))
    return [replace(one, groups=groups) for one, groups in zip(weighed, decided, strict=True)]


def decide_class(weighed: Weighed, known: Knowledge, config: EvidenceConfig, split: SplitConfig) -> list[Planted]:
    """Planted groups of a class, the surest first.

    Args:
        weighed: its groups.
        known: what all classes share.
        config: settings of the decision.
        split: settings of the search.
    """
    rows, spaces, groups = weighed.rows, weighed.spaces, weighed.groups
    planted: list[Planted] = []
    free_n = torch.ones(len(rows), dtype=torch.bool)
    for _ in range(ROUNDS):
        sure = [group for group in groups if group.decision == "planted"]
        if not sure:
            break
        surest = max(sure, key=_sureness)
        members_n = surest.candidate.members_n
        lines = _grown(known, weighed, surest, free_n, config, split)
        planted.append(Planted(surest, lines))
        odds_n = log_odds(lines, torch.cat(list(spaces.values()), 1), known.fold_N[rows])
        free_n = free_n & ~(odds_n > 0) & ~members_n
        groups = [
            _weighed(known, weighed.label, rows, group.candidate, free_n, config, group.measures)
            for group in weighed.groups
            if _n_left(group.candidate.members_n, free_n) >= MIN_GROUP
        ]
    return planted


def _grown(
    known: Knowledge, weighed: Weighed, group: Group, free_n: Tensor, config: EvidenceConfig, split: SplitConfig
) -> Lines:
    """Lines of a planted group among the free samples; of the complete group, where what that adds conflicts as well.

    What a group with true labels shares is not told by images of other classes.
    """
    rows, spaces = weighed.rows[free_n], {name: x_nD[free_n] for name, x_nD in weighed.spaces.items()}
    members_n, fold_n = group.candidate.members_n[free_n], known.fold_N[rows]
    lines = grow(spaces, members_n, fold_n, split)
    if group.basis == "stamp":
        return lines
    whole = complete(known.of_model(), known.appearance, rows, members_n, fold_n, split)
    if whole is None or whole.separation < DEEPER_SEPARATION:
        return lines
    placed_n = log_odds(lines, torch.cat(list(spaces.values()), 1), fold_n) > 0
    added_n, rest_n = whole.members_n & ~placed_n, ~whole.members_n & ~placed_n
    if int(added_n.sum()) < max(MIN_GROUP, ADDED * int(placed_n.sum())) or int(rest_n.sum()) < MIN_GROUP:
        return lines
    evidence = weigh(known.appearance, rows[added_n], rows[rest_n], known.expected_N)
    if evidence.z < config.z_likely:
        return lines
    completed = grow(spaces, whole.members_n, fold_n, split)
    return completed if completed.separation >= config.grown_separation else lines


def _sureness(group: Group) -> tuple[int, float]:
    """Order of planted groups: first those that labels judge and did not choose, last those by a stamp alone."""
    if group.basis == "stamp" and group.measures.stamp is not None:
        return 0, group.measures.stamp[0] * group.measures.separation
    return 1 if group.measures.is_grown else 2, group.evidence.z


def _n_left(members_n: Tensor, free_n: Tensor) -> int:
    """Samples that no earlier round has taken, of the group or of the rest, whichever are fewer."""
    return min(int((members_n & free_n).sum()), int((~members_n & free_n).sum()))


def _weighed(
    known: Knowledge,
    label: int,
    rows: Tensor,
    candidate: Candidate,
    free_n: Tensor,
    config: EvidenceConfig,
    measures: Measures,
) -> Group:
    """The evidence of a group among the samples that no earlier round has taken."""
    group, rest = rows[candidate.members_n & free_n], rows[~candidate.members_n & free_n]
    evidence = weigh(known.appearance, group, rest, known.expected_N)
    measures = measures._replace(size=len(group), share=len(group) / len(rows))
    return _decided(Group(label, candidate, evidence, measures, "natural", ""), config, known, measures)


def _decided(group: Group, config: EvidenceConfig, known: Knowledge, measures: Measures) -> Group:
    decided, basis = decision(group.evidence, config, known.accuracy >= LEARNED, measures)
    return group._replace(measures=measures, decision=decided, basis=basis)


def reason(group: Group) -> str:
    """The evidence of a group in words."""
    n, rest = round(NEIGHBOURS * group.evidence.level), round(NEIGHBOURS * group.evidence.level_rest)
    labels = f"{n} of {NEIGHBOURS} nearest neighbours carry another label ({rest} in the rest of the class)"
    z, separation = group.evidence.z, group.measures.separation
    match group.basis:
        case "labels" | "labels and stamp" if group.decision == "planted":
            sure = f"{labels}, although the model is sure of this one: {z:.1f} standard errors"
            return sure if group.basis == "labels" else f"{sure}; {_stamped(group)}"
        case "labels":
            return f"{labels}, more than the model's doubt explains: {z:.1f} standard errors"
        case "labels and shape":
            return (
                f"{labels}, although the model is sure of this one: {z:.1f} standard errors; the group was grown from "
                f"such samples and is {separation:.1f} standard deviations from the rest of the class"
            )
        case "labels and stamp" | "stamp":
            return f"{_stamped(group)}; it is {separation:.1f} standard deviations from the rest of the class"
        case "no stamp":
            return (
                f"{labels}, {z:.1f} standard errors; the group is {separation:.1f} standard deviations from the rest "
                "of the class. A test of its pattern on other images would decide: it needs the images and the model"
            )
        case "near-duplicates":
            return (
                f"{100 * group.evidence.burst:.0f} % are near-duplicates of each other: copies or a burst, left alone"
            )
        case "":
            return labels


def _stamped(group: Group) -> str:
    """The stamp of a group in words."""
    once, doubled = group.measures.stamp or (0.0, 0.0)
    return (
        f"what its images share, put on images of other classes, turns {100 * once:.0f} % of them into the class "
        f"({100 * doubled:.0f} % at twice the strength)"
    )


def finding(
    planted: Sequence[Planted], groups: Sequence[Group], accuracy: float, clean_labels: str, twins: Twins | None = None
) -> dict[str, Any]:
    """Verdict of the data set and the groups worth showing, for scorer.json.

    Args:
        planted: planted groups of all classes.
        groups: all groups of all classes.
        accuracy: training accuracy of the model on the sample.
        clean_labels: sentence about poison with true labels (`on_clean_labels`), where nothing stands out.
        twins: near-duplicates with different labels, in data full of near-duplicates.
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
    elif twins is not None and twins.n >= MIN_GROUP:
        verdict = "inconclusive"
        why = (
            f"{twins.n} images of class {twins.label} are near-duplicates of images labelled {twins.other}: one of the "
            "two labels is wrong, and frames of one object do not tell which"
        )
    else:
        verdict, why = "nothing", f"no group of a class is in conflict with its labels; {clean_labels}"
    return {"verdict": verdict, "why": why, "groups": shown(planted, groups)}


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
        others += sorted(bursts, key=lambda g: -g.measures.size)[:1]
        others += sorted(natural, key=lambda g: -g.candidate.separation)[:1]
    rank = {"unsure": 0, "burst": 1, "natural": 2}
    others.sort(key=lambda g: (rank[g.decision], -g.candidate.separation))
    return (entries + [_entry(group, group.candidate.separation) for group in others])[:SHOWN]


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
