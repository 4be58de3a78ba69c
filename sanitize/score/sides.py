"""Which side of a split class is the poison. Where the split is even, statistics of the class cannot tell.

**Labels** can, if the poison was given a wrong label: its images belong to other classes, so in an embedding that never
saw a label most of their neighbours carry another one (`neighbours.py`). The labels decide where

    disagreement of one side - 3 / (2 sqrt n)  >  1/2  >  disagreement of the other + 3 / (2 sqrt n'),

means over n and n' samples; 1 / (2 sqrt n) is the largest standard error that n numbers in [0, 1] can have. A level on
each side, not on the difference: a trigger that spreads over the image makes poisoned samples each other's neighbours,
they agree on the wrong label, and then the *clean* side disagrees more. And only where the smaller side is at least
`EVEN` of the class: a small side is the suspect by its size alone, and natural groups that are smaller than the number
of neighbours asked disagree for that reason.

**Shape** decides otherwise. Poison is tight along the direction of the split only; off it, it still varies between the
classes it was taken from, in few and large principal axes. Of an even split the side with fewer axes is the suspect,
the smaller tr(C)^2 / tr(C^2) of its covariance C (participation ratio): without a unit, for a strong trigger shrinks
all that is not the trigger. Of an uneven split, one side of which may be too small to count axes, the suspect has the
larger tr(C^2) / tr(C) per share of the class.

Low disagreement acquits nobody: poison that keeps its true label agrees with its neighbours like clean samples do.

Shapes: N samples of a class, D features.
"""

import math
from typing import NamedTuple

from torch import Tensor

EVEN = 0.2  # share of the class that the smaller side of an even split has at least
SHAPE_ROWS = 1000  # of each side, whose covariance is estimated


class Side(NamedTuple):
    """Mean label disagreement of `n` samples of one side, in [0, 1]; 0 where nobody was asked."""

    disagreement: float
    n: int

    @classmethod
    def of(cls, disagreement_N: Tensor) -> "Side":
        """From shares (N,), NaN where a sample was not asked."""
        asked_M = disagreement_N[~disagreement_N.isnan()]
        return cls(float(asked_M.mean()) if len(asked_M) else 0.0, len(asked_M))

    @property
    def margin(self) -> float:
        """Three standard errors, as large as they can be."""
        return 1.5 / math.sqrt(self.n) if self.n else math.inf


class Sides(NamedTuple):
    """The evidence; `by_labels`: the labels decided, not the shape."""

    suspicious: Side
    rest: Side
    by_labels: bool


NO_EVIDENCE = Sides(Side(0.0, 0), Side(0.0, 0), False)


def suspicious_side(z_ND: Tensor, upper_N: Tensor, disagreement_N: Tensor) -> tuple[bool, Sides]:
    """Whether the upper side of a split is the suspicious one, and what says so.

    Args:
        z_ND: standardised rows of a class.
        upper_N: True on the upper side; at least two rows on each.
        disagreement_N: label disagreement in [0, 1], NaN where it was not measured.
    """
    share = float(upper_N.double().mean())
    upper, lower = Side.of(disagreement_N[upper_N]), Side.of(disagreement_N[~upper_N])
    is_even = min(share, 1 - share) >= EVEN
    by_labels = is_even and (at_odds(upper, lower) or at_odds(lower, upper))
    (n_axes, variance), (n_axes_below, variance_below) = axes(z_ND[upper_N]), axes(z_ND[~upper_N])
    if by_labels:
        is_upper = at_odds(upper, lower)
    elif is_even:
        is_upper = n_axes <= n_axes_below
    else:
        is_upper = variance * (1 - share) >= variance_below * share
    return is_upper, Sides(*((upper, lower) if is_upper else (lower, upper)), by_labels)


def at_odds(one: Side, other: Side) -> bool:
    """Whether most neighbours of one side carry other labels, and most of those of the other side do not."""
    return one.disagreement - one.margin > 0.5 > other.disagreement + other.margin


def axes(z_ND: Tensor) -> tuple[float, float]:
    """Number and variance of the dominant axes of the covariance C: tr(C)^2 / tr(C^2), and tr(C^2) / tr(C)."""
    z_ND = z_ND[:SHAPE_ROWS] - z_ND[:SHAPE_ROWS].mean(0)
    gram = z_ND @ z_ND.T if len(z_ND) < z_ND.shape[1] else z_ND.T @ z_ND
    trace, square = gram.trace().clamp(min=1e-12), gram.square().sum().clamp(min=1e-24)
    return float(trace.square() / square), float(square / trace) / len(z_ND)
