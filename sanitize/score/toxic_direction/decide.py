"""Planted groups of a class, in rounds.

The surest planted group of a class is taken out and the others are weighed again, so that two triggers in one class are
found in one run, and the rest of the class that a group is compared with holds no other group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.score.toxic_direction.candidates import DEEPER_SEPARATION, MIN_GROUP
from sanitize.score.toxic_direction.complete import complete
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
        surest = max(sure, key=_sureness)
        members_n = surest.candidate.members_n
        lines = _grown(known, weighed, surest, free_n, config, split)
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
    found = weighed_group(known, weighed.label, weighed.rows, group.candidate, free_n, group.measures)
    return decided_among(found, weighed.natural, config, known)


def _grown(
    known: Knowledge, weighed: Weighed, group: Group, free_n: Tensor, config: EvidenceConfig, split: SplitConfig
) -> Lines:
    """Lines of a planted group among the free samples; of the complete group, where what that adds conflicts as well.

    What a group with true labels shares is not told by images of other classes.
    """
    rows, spaces = weighed.rows[free_n], {name: x_nD[free_n] for name, x_nD in weighed.spaces.items()}
    members_n, fold_n = group.candidate.members_n[free_n], known.fold_N[rows]
    lines = grow(spaces, members_n, fold_n, split)
    if group.basis == "stamp" or weighed.natural is None:
        return lines
    whole = complete(known.of_model(), known.appearance, rows, members_n, fold_n, split)
    if whole is None or whole.separation < DEEPER_SEPARATION:
        return lines
    placed_n = log_odds(lines, torch.cat(list(spaces.values()), 1), fold_n) > 0
    added_n, rest_n = whole.members_n & ~placed_n, ~whole.members_n & ~placed_n
    if int(added_n.sum()) < max(MIN_GROUP, ADDED * int(placed_n.sum())) or int(rest_n.sum()) < MIN_GROUP:
        return lines
    evidence = weigh(known.appearance, rows[added_n], rows[rest_n], known.expected_N)
    if compared(evidence, weighed.natural).rarity > config.likely:
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
