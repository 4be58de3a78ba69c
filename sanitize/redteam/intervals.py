"""How sure a share is that was counted a few times: mean and confidence interval over repeats.

Repeats differ by their seeds. Student's t of their shares says how much they do, but takes three equal shares for
certainty; the exact binomial interval of all counts together (Clopper & Pearson, 1934) says how few samples were
counted, but takes them for independent. The interval given is the smallest that holds both; with one repeat it is the
binomial alone, which knows nothing of other seeds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """Mean share of the repeats in which there was something to count, and its interval."""

    mean: float
    low: float
    high: float


def estimate(counts: Sequence[tuple[int, int]], level: float) -> Estimate | None:
    """The mean share over repeats.

    Args:
        counts: of each repeat how many there were, and of how many.
        level: of confidence, in (0, 1).

    Returns:
        The estimate; None where no repeat had anything to count.
    """
    counted = [(part, whole) for part, whole in counts if whole]
    if not counted:
        return None
    shares_R = np.array([part / whole for part, whole in counted])
    mean = float(shares_R.mean())
    low, high = clopper_pearson(sum(part for part, _ in counted), sum(whole for _, whole in counted), level)
    if len(counted) > 1:
        reach = float(stats.t.ppf((1 + level) / 2, len(counted) - 1) * shares_R.std(ddof=1)) / math.sqrt(len(counted))
        low, high = min(low, max(0.0, mean - reach)), max(high, min(1.0, mean + reach))
    return Estimate(mean, low, high)


def clopper_pearson(part: int, whole: int, level: float) -> tuple[float, float]:
    """The exact interval of a binomial share, with `level` / 2 + 1/2 on each side."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, part, whole - part + 1)) if part else 0.0
    high = float(stats.beta.ppf(1 - tail, part + 1, whole - part)) if part < whole else 1.0
    return low, high
