"""Planted groups of a class, in rounds.

The surest planted group of a class is taken out and the others are weighed again, so that two triggers in one class are
found in one run, and the rest of the class that a group is compared with holds no other group. A group that lost more
than a fifth of its members in an earlier round is another group: it must be odd by its labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.score.toxic_direction.candidates import DEEPER_SEPARATION, MIN_GROUP
from sanitize.score.toxic_direction.complete import KEPT, complete
from sanitize.score.toxic_direction.evidence import weigh
from sanitize.score.toxic_direction.grow import Lines, grow, log_odds
from sanitize.score.toxic_direction.natural import compared
from sanitize.score.toxic_direction.rule import EvidenceConfig
from sanitize.score.toxic_direction.split import SplitConfig
from sanitize.score.toxic_direction.weigh import Group, Knowledge, Weighed, decided_among, weighed_group

ROUNDS = 3  # most planted groups of a class
ADDED = 0.1  # least growth of a group that is worth another look


class Planted(NamedTuple):
    """A planted group, and the lines that tell its members."""

    group: Group
    lines: Lines


def decide_class(weighed: Weighed, known: Knowledge, config: EvidenceConfig, split: SplitConfig) -> list[Planted]:
    """Planted groups of a class, the surest first.

    Args:
        weighed: its groups.
        known: facts that all classes share.
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
        sure.sort(key=_sureness, reverse=True)
        surest = sure[0]
        members_n = surest.candidate.members_n
        lines = _grown(known, weighed, sure, free_n, config, split)
        planted.append(Planted(surest, lines))
        odds_n = log_odds(lines, torch.cat(list(spaces.values()), 1), known.fold_N[rows])
        free_n = free_n & ~(odds_n > 0) & ~members_n
        groups = [
            weighed_again(weighed, group, known, free_n, config)
            for group in weighed.groups
            if _n_left(group.candidate.members_n, free_n) >= MIN_GROUP
        ]
    return planted


def weighed_again(weighed: Weighed, group: Group, known: Knowledge, free_n: Tensor, config: EvidenceConfig) -> Group:
    """The group among the samples that no earlier round has taken, decided."""
    members_n, measures = group.candidate.members_n, group.measures
    if _holds(free_n, members_n):
        found = weighed_group(known, weighed.label, weighed.rows, group.candidate, free_n, measures)
        return decided_among(found, weighed.natural, config, known)
    # Distance and stamp are those of the members that are gone: labels must do without them.
    found = weighed_group(known, weighed.label, weighed.rows, group.candidate, free_n, measures._replace(stamp=None))
    found = decided_among(found, weighed.natural, config, known)
    is_odd = found.evidence.p <= config.false_alarm_rate
    return found if is_odd else found._replace(decision="natural", basis="")


def _grown(
    known: Knowledge, weighed: Weighed, sure: list[Group], free_n: Tensor, config: EvidenceConfig, split: SplitConfig
) -> Lines:
    """Lines of the surest planted group among the free samples; of the complete group, where what that adds conflicts.

    Any planted group of the same samples may lead to the complete one. What a group with true labels shares is not told
    by images of other classes.
    """
    rows, spaces = weighed.rows[free_n], {name: x_nD[free_n] for name, x_nD in weighed.spaces.items()}
    fold_n, x_nC = known.fold_N[rows], torch.cat(list(spaces.values()), 1)
    lines = grow(spaces, sure[0].candidate.members_n[free_n], fold_n, split)
    if sure[0].basis == "stamp" or weighed.natural is None:
        return lines
    placed_n = log_odds(lines, x_nC, fold_n) > 0
    for group in sure:
        members_n = group.candidate.members_n[free_n]
        if group.basis == "stamp" or 2 * int((members_n & placed_n).sum()) < int(members_n.sum()):
            continue
        whole = complete(known.of_model(), known.appearance, rows, members_n, fold_n, split)
        if whole is None or whole.separation < DEEPER_SEPARATION:
            continue
        completed = grow(spaces, whole.members_n, fold_n, split)
        whole_n = log_odds(completed, x_nC, fold_n) > 0
        added_n, rest_n = whole_n & ~placed_n, ~whole_n & ~placed_n
        is_larger = int(added_n.sum()) >= max(MIN_GROUP, ADDED * int(placed_n.sum())) and int(rest_n.sum()) >= MIN_GROUP
        if completed.separation < config.grown_separation or not is_larger or not _holds(whole_n, placed_n):
            continue
        evidence = weigh(known.appearance, rows[added_n], rows[rest_n], known.expected_N)
        if compared(evidence, weighed.natural).rarity <= config.likely:
            return completed
    return lines


def _holds(whole_n: Tensor, part_n: Tensor) -> bool:
    """True where a group holds nearly all of its part."""
    return int((whole_n & part_n).sum()) >= KEPT * int(part_n.sum())


def _sureness(group: Group) -> tuple[int, float]:
    """Order of planted groups: first those that labels judge and did not choose, last those by a stamp alone.

    Among them by oddness and distance: a part of a planted group is not far from the rest, which holds the other parts.
    """
    if group.basis == "stamp" and group.measures.stamp is not None:
        return 0, group.measures.stamp[0] * group.measures.separation
    return 1 if group.measures.is_grown else 2, group.evidence.z * group.measures.separation


def _n_left(members_n: Tensor, free_n: Tensor) -> int:
    """Samples that no earlier round has taken, of the group or of the rest, whichever are fewer."""
    return min(int((members_n & free_n).sum()), int((~members_n & free_n).sum()))
