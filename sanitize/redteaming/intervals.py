"""Mean and confidence interval of a share over repeats with different seeds.

Student's t interval of the shares covers the variation between seeds, but has length 0 for equal shares. The exact
binomial interval of the pooled counts (Clopper & Pearson, 1934) covers the small number of samples, but assumes that
they are independent. `estimate` gives the smallest interval that holds both; with one repeat, the binomial one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """Mean share over the repeats that have samples, and its interval."""

    mean: float
    low: float
    high: float


def estimate(counts: Sequence[tuple[int, int]], level: float) -> Estimate | None:
    """The mean share over repeats.

    Args:
        counts: part and whole of each repeat.
        level: confidence level, in (0, 1).

    Returns:
        The estimate; None where no repeat has samples.
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
    """The exact interval of a binomial share; each end has confidence 1/2 + `level` / 2."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, part, whole - part + 1)) if part else 0.0
    high = float(stats.beta.ppf(1 - tail, part + 1, whole - part)) if part < whole else 1.0
    return low, high
