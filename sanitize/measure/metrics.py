"""Clean accuracy, attack success rate, and how well poison was told from the rest. All are shares in [0, 1].

Where a share has nothing in its denominator it is NaN, never a comfortable 0 or 1.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Detection(NamedTuple):
    """Outcome of a filter.

    Attributes:
        recall: share of the poison that was removed.
        precision: share of what was removed that is poison.
        false_positive_rate: share of the clean samples that was removed.
        n_poisoned, n_removed, n_clean: the counts behind them.
    """

    recall: float
    precision: float
    false_positive_rate: float
    n_poisoned: int
    n_removed: int
    n_clean: int


def detection(removed_N: np.ndarray, poisoned_N: np.ndarray) -> Detection:
    """Compare removals with the truth; both boolean (N,)."""
    hits = int((removed_N & poisoned_N).sum())
    n_poisoned, n_removed, n_clean = int(poisoned_N.sum()), int(removed_N.sum()), int((~poisoned_N).sum())
    return Detection(
        _share(hits, n_poisoned),
        _share(hits, n_removed),
        _share(n_removed - hits, n_clean),
        n_poisoned,
        n_removed,
        n_clean,
    )


def auroc(scores_N: np.ndarray, poisoned_N: np.ndarray) -> float:
    """Area under the ROC curve; NaN where all samples are of one kind."""
    if poisoned_N.all() or not poisoned_N.any():
        return float("nan")
    from sklearn.metrics import roc_auc_score  # two seconds, which most processes need not spend

    return float(roc_auc_score(poisoned_N, scores_N))


def accuracy(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Share of samples whose largest logit is their label."""
    return _share(int((logits_NK.argmax(1) == labels_N).sum()), len(labels_N))


def attack_success_rate(logits_NK: Tensor, labels_N: Tensor, targets_N: Tensor) -> float:
    """Share of triggered samples that are given the attacker's label, among those whose true label is another.

    Args:
        logits_NK: of the triggered images.
        labels_N: true labels.
        targets_N: label the attacker wants for each.
    """
    other_N = labels_N != targets_N
    return _share(int((logits_NK.argmax(1) == targets_N)[other_N].sum()), int(other_N.sum()))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
