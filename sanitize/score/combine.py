"""One suspicion from several scorers whose scores have no common unit (Fisher, 1925).

Each scorer's score becomes an empirical p-value: the share of reference rows that score as high,
    p = (1 + #{reference >= score}) / (1 + M),
and the fused suspicion is the mean of -log p over the scorers. It needs no label and no weight, is not moved by any
monotone change of a scorer, and lets one scorer that is sure outvote one that is indifferent.

This is for ranking. Where a level is asked for, verdicts combine p-values by Cauchy's (`select/rules.py`), and both are
needed: at a correlation of .6 Fisher's level of .1 % is exceeded 5 times over, Cauchy's holds; but Cauchy's follows the
smallest p-value alone, where Fisher's adds up evidence over the whole range, and ranks better (docs/methods.md).

Shapes: S scorers, N rows, M reference rows.
"""

from collections.abc import Sequence

import numpy as np


def empirical_p_values(scores_N: np.ndarray, reference_M: np.ndarray) -> np.ndarray:
    """p (N,), float64, in (0, 1].

    Args:
        scores_N: higher is more suspicious.
        reference_M: scores of the rows compared with (those the scorer was fitted on, say), ascending. Anomalies among
            them only make p larger, by at most their share.
    """
    n_below = np.searchsorted(reference_M, scores_N, side="left")
    return (1 + len(reference_M) - n_below) / (1 + len(reference_M))


def combined_suspicion(scores: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the scorers of -log p, (N,), float64, >= 0; a higher one is more suspicious.

    2 S times this is chi-squared with 2 S degrees of freedom where the scorers are independent and the rows are normal.
    They hardly ever are independent, so use it to rank, or set its level on trusted rows.

    Args:
        scores: (N,) of each scorer.
        references: (M,) of each scorer, ascending.
    """
    logs_SN = [np.log(empirical_p_values(*pair)) for pair in zip(scores, references, strict=True)]
    return -np.mean(logs_SN, axis=0)
