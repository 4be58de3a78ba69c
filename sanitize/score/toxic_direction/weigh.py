"""All candidate groups of all classes, each with its evidence and the decision on it (`rule.py`).

Groups are weighed class by class, then compared with the groups of the other classes (`natural.py`) and decided, and
decided once more where a stamp was measured.

Shapes: N samples of all classes, n of one class, D features, P axes, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.score.toxic_direction.candidates import (
    DEEPER_SEPARATION,
    MIN_GROUP,
    Candidate,
    candidates,
    is_group,
    parts,
)
from sanitize.score.toxic_direction.complete import complete
from sanitize.score.toxic_direction.evidence import (
    BURST,
    Appearance,
    Evidence,
    appearance_of,
    disagreement,
    expected_disagreement,
    neighbour_labels,
    weigh,
)
from sanitize.score.toxic_direction.grow import FOLDS, axes_of, grown_from_conflict, held_out
from sanitize.score.toxic_direction.natural import Natural, compared, natural_groups
from sanitize.score.toxic_direction.rule import (
    Basis,
    Decided,
    EvidenceConfig,
    Measures,
    decision,
    is_likely,
    leans,
    may_be_clean_label,
    stands_out,
    wants_stamp,
)
from sanitize.score.toxic_direction.split import SplitConfig
from sanitize.score.toxic_direction.stamp import Suspect, matched, measure

LEARNED = 0.5  # least training accuracy of a model whose doubt says something
NOTABLE = 2.0  # standard errors of a group whose separation is measured; beside natural groups they are fewer
MOST_STAMPS = 60  # groups of a data set whose stamps are measured


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


@dataclass(frozen=True)
class Weighed:
    """Groups of a class before their stamps.

    Attributes:
        label: the class.
        rows: indices of its samples.
        spaces: embeddings of its samples, by name.
        groups: its groups.
        natural: natural groups of the other classes; None until all classes are weighed.
    """

    label: int
    rows: Tensor
    spaces: Mapping[str, Tensor]
    groups: Sequence[Group]
    natural: Natural | None = None


def weigh_class(
    known: Knowledge, label: int, rows: Tensor, config: EvidenceConfig, split: SplitConfig, generator: torch.Generator
) -> Weighed:
    """All groups of a class, not decided yet.

    Args:
        known: facts that all classes share.
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
        group = weighed_group(known, label, rows, candidate, free_n, Measures(is_bursty=is_bursty))
        # The separation on the rows of the search is the larger one, nearly always.
        is_apart = candidate.separation >= config.near_separation and may_be_clean_label(
            group.evidence, config, group.measures
        )
        if is_apart or (leans(group.evidence, config) and group.evidence.z >= NOTABLE):
            apart = held_out(axes, candidate.members_n, fold_n)
            separation = 0.0 if apart is None else apart[0].separation
            group = group._replace(measures=group.measures._replace(separation=separation))
        groups.append(group)
    # Frames of one object are told apart best of all, so in bursty data a group grown from conflict says nothing.
    core = None if is_bursty else grown_from_conflict(axes, known.conflict_N[rows], fold_n)
    if core is not None:
        members_n, separation = core
        # Conflict finds the part of a planted group that looks least like its label.
        whole = complete(known.of_model(), known.appearance, rows, members_n, fold_n, split)
        apart = None if whole is None else held_out(axes, whole.members_n, fold_n)
        if whole is not None and apart is not None and is_group(whole.members_n):
            members_n, separation = whole.members_n, apart[0].separation
        candidate = Candidate("conflict", members_n, 0.0)
        measures = Measures(separation=separation, is_grown=True)
        groups.append(weighed_group(known, label, rows, candidate, free_n, measures))
    return Weighed(label, rows, spaces, groups)


def parts_of_unsure(
    known: Knowledge, weighed: Weighed, config: EvidenceConfig, split: SplitConfig, generator: torch.Generator
) -> list[Group]:
    """Parts of the surest group that labels leave unsure, once it is complete; none where another is planted.

    Poison from several classes conflicts most where it comes from the class that is least like its label.
    """
    rows, groups = weighed.rows, weighed.groups
    unsure = [group for group in groups if group.decision == "unsure" and group.basis == "labels"]
    if not unsure or any(group.decision == "planted" for group in groups):
        return []
    members_n = max(unsure, key=lambda group: group.evidence.z).candidate.members_n
    whole = complete(known.of_model(), known.appearance, rows, members_n, known.fold_N[rows], split)
    if whole is None or whole.separation < DEEPER_SEPARATION:
        return []
    is_seen_n = ~whole.members_n  # the rest that a part is compared with holds no other part
    found = []
    for part in parts(weighed.spaces["appearance"], whole.members_n, split, generator):
        # A part lies as far from the rest of the class as the group that it is a part of.
        measures = Measures(separation=whole.separation, is_bursty=known.bursty >= config.bursty)
        if int(is_seen_n.sum()) >= MIN_GROUP <= int(part.members_n.sum()):
            group = weighed_group(known, weighed.label, rows, part, is_seen_n | part.members_n, measures)
            found.append(decided_among(group, weighed.natural, config, known))
    return found


def measure_stamps(
    weighed: Sequence[Weighed], known: Knowledge, config: EvidenceConfig, suspect: Suspect, names: Sequence[int]
) -> list[Weighed]:
    """The same groups, decided with the stamps of at most `MOST_STAMPS` groups that need one, the surest first.

    Args:
        weighed: groups of all classes.
        known: facts that all classes share.
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
    groups_of = [list(one.groups) for one in weighed]
    for (i, j, group), stamp in zip(wanted, stamps, strict=True):
        groups_of[i][j] = decided(group._replace(measures=group.measures._replace(stamp=stamp)), config, known)
    return [replace(one, groups=groups) for one, groups in zip(weighed, groups_of, strict=True)]


def compare(weighed: Sequence[Weighed], known: Knowledge, config: EvidenceConfig) -> list[Weighed]:
    """The same groups compared with those of other classes, and decided without stamps."""
    natural = natural_groups(
        {one.label: _maybe_natural(one, config) for one in weighed}, sum(len(_searched(one, config)) for one in weighed)
    )
    return [
        replace(
            one,
            natural=natural[one.label],
            groups=[decided_among(group, natural[one.label], config, known) for group in one.groups],
        )
        for one in weighed
    ]


def _searched(weighed: Weighed, config: EvidenceConfig) -> list[Group]:
    """Groups of a class that labels did not choose, bursts left out."""
    return [group for group in weighed.groups if not group.measures.is_grown and group.evidence.burst < config.burst]


def _maybe_natural(weighed: Weighed, config: EvidenceConfig) -> list[Evidence]:
    """Evidence of the groups that may be natural: not those that stand out, nor other splits of the same samples.

    Where every class holds poison (all-to-all attacks), planted groups are most of the groups.
    """
    groups = _searched(weighed, config)
    standing = [group.candidate.members_n for group in groups if stands_out(group.evidence, config, group.measures)]

    def is_known(members_n: Tensor) -> bool:
        if 2 * int(members_n.sum()) > len(members_n):
            members_n = ~members_n
        return any(2 * int((members_n & one_n).sum()) > int(members_n.sum()) for one_n in standing)

    return [group.evidence for group in groups if not is_known(group.candidate.members_n)]


def weighed_group(
    known: Knowledge, label: int, rows: Tensor, candidate: Candidate, free_n: Tensor, measures: Measures
) -> Group:
    """The evidence of a group among the samples that no earlier round has taken; not decided."""
    group, rest = rows[candidate.members_n & free_n], rows[~candidate.members_n & free_n]
    candidate = candidate._replace(members_n=candidate.members_n & free_n)
    evidence = weigh(known.appearance, group, rest, known.expected_N)
    measures = measures._replace(size=len(group), share=len(group) / len(rows))
    return Group(label, candidate, evidence, measures, "natural", "")


def decided_among(group: Group, natural: Natural | None, config: EvidenceConfig, known: Knowledge) -> Group:
    """The group compared with natural groups, where they are known, and decided."""
    if natural is not None:
        group = group._replace(evidence=compared(group.evidence, natural))
    return decided(group, config, known)


def decided(group: Group, config: EvidenceConfig, known: Knowledge) -> Group:
    """The group with the decision on it."""
    found, basis = decision(group.evidence, config, known.accuracy >= LEARNED, group.measures)
    return group._replace(decision=found, basis=basis)
