"""Clean accuracy, attack success rate, and how well a filter finds poison. All are shares in [0, 1].

A share with an empty denominator is NaN, never 0 or 1. Shapes: N samples, B batch, K classes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> logits (B, K) on the CPU


class Detection(NamedTuple):
    """Outcome of a filter.

    Attributes:
        n_found: poisoned samples that were removed.
        n_poisoned, n_removed, n_clean: samples that are poisoned, removed, clean.
    """

    n_found: int
    n_poisoned: int
    n_removed: int
    n_clean: int

    @property
    def recall(self) -> float:
        """Share of the poisoned samples that was removed."""
        return _share(self.n_found, self.n_poisoned)

    @property
    def precision(self) -> float:
        """Share of the removed samples that is poisoned."""
        return _share(self.n_found, self.n_removed)

    @property
    def n_false_removals(self) -> int:
        """Clean samples that were removed."""
        return self.n_removed - self.n_found

    @property
    def false_positive_rate(self) -> float:
        """Share of the clean samples that was removed."""
        return _share(self.n_false_removals, self.n_clean)


def detection(removed_N: np.ndarray, poisoned_N: np.ndarray) -> Detection:
    """Compare removals with the truth; both boolean (N,)."""
    n_found, n_poisoned = int((removed_N & poisoned_N).sum()), int(poisoned_N.sum())
    return Detection(n_found, n_poisoned, int(removed_N.sum()), len(poisoned_N) - n_poisoned)


def auroc(scores_N: np.ndarray, poisoned_N: np.ndarray) -> float:
    """Area under the ROC curve; NaN where all samples are of one kind."""
    if poisoned_N.all() or not poisoned_N.any():
        return float("nan")
    from sklearn.metrics import roc_auc_score  # two seconds, which most processes need not spend

    return float(roc_auc_score(poisoned_N, scores_N))


def accuracy(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Share of samples whose largest logit is their label."""
    return _share(int((logits_NK.argmax(1) == labels_N).sum()), len(labels_N))


class Correct(NamedTuple):
    """Correct predictions of a network, by label.

    Attributes:
        correct_K: samples of each label that are predicted right, int64.
        count_K: samples of each label, int64.
    """

    correct_K: Tensor
    count_K: Tensor

    @property
    def total(self) -> tuple[int, int]:
        """Number of correct predictions, and of samples."""
        return int(self.correct_K.sum()), int(self.count_K.sum())

    @property
    def share(self) -> float:
        """Clean accuracy, or for labels the attacker wants the attack success rate."""
        return _share(*self.total)


def count_correct(
    networks: Sequence[Logits], batches: Iterable[tuple[Tensor, Tensor]], n_classes: int
) -> list[Correct]:
    """Correct predictions of each network, in one pass over the batches.

    Args:
        networks: functions from images to logits.
        batches: images (B, C, H, W), and labels (B,): true ones, or those the attacker wants; int64 below `n_classes`.
        n_classes: K.
    """
    count_K = torch.zeros(n_classes, dtype=torch.int64)
    correct_MK = torch.zeros(len(networks), n_classes, dtype=torch.int64)
    for images_BCHW, labels_B in batches:
        count_K += labels_B.bincount(minlength=n_classes)
        for network, correct_K in zip(networks, correct_MK, strict=True):
            is_correct_B = network(images_BCHW).argmax(1) == labels_B
            correct_K += labels_B[is_correct_B].bincount(minlength=n_classes)
    return [Correct(correct_K, count_K) for correct_K in correct_MK]


def attack_success_rate(logits_NK: Tensor, labels_N: Tensor, targets_N: Tensor) -> float:
    """Share of triggered samples that get the attacker's label, among those whose true label is another.

    Args:
        logits_NK: logits of the triggered images.
        labels_N: true labels.
        targets_N: labels the attacker wants.
    """
    other_N = labels_N != targets_N
    return accuracy(logits_NK[other_N], targets_N[other_N])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
