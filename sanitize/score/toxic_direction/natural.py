"""How odd a group is among the natural groups of the same data.

Natural groups of a class, its styles and camera angles, differ in conflict by more than the chance of their samples: in
data whose classes are made of unlike things by much, in others hardly. How much is measured on the data themselves, as
the between-group variance of a random-effects model (DerSimonian & Laird, 1986):

    conflict of a natural group ~ N(0, spread^2 + error^2)
    z = conflict / sqrt(spread^2 + error^2)
    rarity = P(T >= z)                 T: Student's t, degrees of freedom of both estimates (Welch & Satterthwaite)
    p = min(1, G rarity)               G: number of groups of the data set (Bonferroni)

The spread that a class is compared with comes from the groups of all other classes, as the value for which half of
their z^2 lie below the median of chi-squared: where fewer than half of those groups hold poison, it hardly changes.
Groups that stand out by their labels and by their distance from the rest of their class are left out of the estimate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from sanitize.score.toxic_direction.evidence import Evidence

MEDIAN_CHI2 = 0.4549  # of one degree of freedom
FEWEST_GROUPS = 10  # groups from which a spread is estimated
UNKNOWN_SPREAD = 0.2  # with fewer groups: that of classes made of unlike styles (tests/score/test_evidence.py)
OVERLAP = 4  # groups that tell as much as one: both sides of a split, found in about two embeddings
_STEPS = 40  # of the bisection


class Natural(NamedTuple):
    """What a group is compared with.

    Attributes:
        spread: standard deviation of the conflict of natural groups beyond the chance of their samples.
        freedom: degrees of freedom of the spread.
        n_groups: number of groups of the data set.
    """

    spread: float
    freedom: float
    n_groups: int


def spread_of(conflict_G: Tensor, error_G: Tensor) -> float:
    """Spread s for which the median of conflict^2 / (s^2 + error^2) is that of chi-squared; 0 where none is needed.

    Args:
        conflict_G: conflict of each group.
        error_G: its standard error, > 0.
    """
    square_G, variance_G = conflict_G.double().square(), error_G.double().square()
    low, high = 0.0, float(square_G.max()) / MEDIAN_CHI2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        is_wide = float((square_G / (middle + variance_G)).quantile(0.5)) <= MEDIAN_CHI2
        low, high = (low, middle) if is_wide else (middle, high)
    return math.sqrt(high) if low > 0 else 0.0


def natural_groups(evidence: Mapping[int, Sequence[Evidence]], n_groups: int) -> dict[int, Natural]:
    """What the groups of each class are compared with.

    Args:
        evidence: label -> evidence of its groups that may be natural.
        n_groups: number of groups of the data set that are judged.
    """
    found = {}
    for label in evidence:
        others = [e for other, of_class in evidence.items() if other != label for e in of_class]
        spread = UNKNOWN_SPREAD
        if len(others) >= FEWEST_GROUPS:
            spread = spread_of(torch.tensor([e.conflict for e in others]), torch.tensor([e.error for e in others]))
        found[label] = Natural(spread, max(1.0, len(others) / OVERLAP), n_groups)
    return found


def compared(evidence: Evidence, natural: Natural) -> Evidence:
    """The evidence with z, rarity and p."""
    chance, spread = evidence.error**2, natural.spread**2
    freedom = (chance + spread) ** 2 / (chance**2 / evidence.freedom + spread**2 / natural.freedom)
    z = evidence.conflict / math.sqrt(chance + spread)
    rarity = float(student.sf(z, freedom))
    return evidence._replace(z=z, rarity=rarity, p=min(1.0, max(1, natural.n_groups) * rarity))
