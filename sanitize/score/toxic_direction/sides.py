"""Choice of the poisoned side of a split class. Where the split is even, size cannot decide.

**Label check.** Poison with a wrong label belongs to other classes, so in an embedding that never saw a label most of
its neighbours carry another label (`neighbours.py`). The label check decides where

    disagreement of one side - 3 / (2 sqrt n)  >  1/2  >  disagreement of the other + 3 / (2 sqrt n'),

means over n and n' samples; 1 / (2 sqrt n) is the largest standard error of the mean of n numbers in [0, 1]. The level
holds on each side, not on the difference: a trigger that spreads over the image makes poisoned samples each other's
neighbours, they agree on the wrong label, and the *clean* side disagrees more. It decides only where the smaller side
is at least `EVEN` of the class: a smaller side is suspicious by its size alone, and natural groups with fewer samples
than the check has neighbours disagree for that reason.

**Shape** decides otherwise. Poison is tight along the direction of the split only; off it, poison still varies between
the classes it was taken from, in few and large principal axes. Of an even split the suspicious side has fewer axes, the
smaller tr(C)^2 / tr(C^2) of its covariance C (participation ratio): free of units, because a strong trigger shrinks
everything but the trigger. Of an uneven split, one side of which may be too small to count axes, the suspicious side
has the larger tr(C^2) / tr(C) per share of the class.

Low disagreement does not prove a side clean: poison that keeps its true label agrees with its neighbours.

Shapes: N samples of a class, D features.
"""

import math
from typing import NamedTuple

from torch import Tensor

EVEN = 0.2  # least share of the class in the smaller side of an even split
SHAPE_ROWS = 1000  # most rows of each side that its shape is estimated from


class Side(NamedTuple):
    """Mean label disagreement of the `n` checked samples of one side, in [0, 1]; 0 where n is 0."""

    disagreement: float
    n: int

    @classmethod
    def of(cls, disagreement_N: Tensor) -> "Side":
        """From the disagreement of each sample (N,), NaN where not measured."""
        checked_M = disagreement_N[~disagreement_N.isnan()]
        return cls(float(checked_M.mean()) if len(checked_M) else 0.0, len(checked_M))

    @property
    def margin(self) -> float:
        """Largest possible value of three standard errors."""
        return 1.5 / math.sqrt(self.n) if self.n else math.inf


class Sides(NamedTuple):
    """Evidence of both sides; `by_labels` is True where the label check decided, not the shape."""

    suspicious: Side
    rest: Side
    by_labels: bool


NO_EVIDENCE = Sides(Side(0.0, 0), Side(0.0, 0), False)


def suspicious_side(z_ND: Tensor, upper_N: Tensor, disagreement_N: Tensor) -> tuple[bool, Sides]:
    """True where the upper side of a split is the suspicious one; and the evidence.

    Args:
        z_ND: standardised rows of a class.
        upper_N: True on the upper side; at least two rows on each.
        disagreement_N: label disagreement in [0, 1], NaN where not measured.
    """
    share = float(upper_N.double().mean())
    is_even = min(share, 1 - share) >= EVEN
    upper, lower = Side.of(disagreement_N[upper_N]), Side.of(disagreement_N[~upper_N])
    by_labels = side_by_labels(upper, lower) if is_even else None
    is_upper = side_by_shape(z_ND, upper_N) if by_labels is None else by_labels
    return is_upper, Sides(*((upper, lower) if is_upper else (lower, upper)), by_labels is not None)


def side_by_labels(upper: Side, lower: Side) -> bool | None:
    """True where the label check finds the upper side suspicious, False for the lower one, None where it abstains."""
    if at_odds(upper, lower):
        return True
    return False if at_odds(lower, upper) else None


def side_by_shape(z_ND: Tensor, upper_N: Tensor) -> bool:
    """True where the shape of the upper side is the suspicious one.

    Args:
        z_ND: standardised rows of a class.
        upper_N: True on the upper side; at least two rows on each.
    """
    share = float(upper_N.double().mean())
    (n_axes, variance), (n_axes_below, variance_below) = axes(z_ND[upper_N]), axes(z_ND[~upper_N])
    if min(share, 1 - share) >= EVEN:
        return n_axes <= n_axes_below
    return variance * (1 - share) >= variance_below * share


def at_odds(one: Side, other: Side) -> bool:
    """True where most neighbours of one side carry other labels, and most neighbours of the other side do not."""
    return one.disagreement - one.margin > 0.5 > other.disagreement + other.margin


def axes(z_ND: Tensor) -> tuple[float, float]:
    """Number and variance of the dominant axes of the covariance C: tr(C)^2 / tr(C^2), and tr(C^2) / tr(C)."""
    z_ND = z_ND[:SHAPE_ROWS] - z_ND[:SHAPE_ROWS].mean(0)
    gram = z_ND @ z_ND.T if len(z_ND) < z_ND.shape[1] else z_ND.T @ z_ND
    trace, square = gram.trace().clamp(min=1e-12), gram.square().sum().clamp(min=1e-24)
    return float(trace.square() / square), float(square / trace) / len(z_ND)
