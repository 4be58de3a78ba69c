import math

import numpy as np
import pytest
import torch

from sanitize.measure import accuracy, attack_success_rate, auroc, count_correct, detection


def test_detection_by_hand() -> None:
    removed = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    poisoned = np.array([1, 0, 1, 1, 1, 0, 0, 0], bool)
    found = detection(removed, poisoned)
    assert found == (2, 4, 3, 4)
    assert (found.recall, found.precision, found.false_positive_rate) == (2 / 4, 2 / 3, 1 / 4)
    assert (found.n_poisoned, found.n_removed, found.n_clean, found.n_false_removals) == (4, 3, 4, 1)


@pytest.mark.parametrize(
    ("removed", "poisoned", "recall", "precision", "fpr"),
    [
        ([0, 0], [1, 0], 0, math.nan, 0),  # nothing removed: no precision
        ([1, 0], [0, 0], math.nan, 0, 0.5),  # nothing poisoned: no recall
        ([1, 0], [1, 1], 0.5, 1, math.nan),  # nothing clean: no false-positive rate
        ([], [], math.nan, math.nan, math.nan),
        ([1, 0], [1, 0], 1, 1, 0),
    ],
)
def test_a_share_of_nothing_is_nan(
    removed: list[int], poisoned: list[int], recall: float, precision: float, fpr: float
) -> None:
    found = detection(np.array(removed, bool), np.array(poisoned, bool))
    np.testing.assert_equal((found.recall, found.precision, found.false_positive_rate), (recall, precision, fpr))


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    scores, poisoned = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.3
    pairs = [(p > c) + 0.5 * (p == c) for p in scores[poisoned] for c in scores[~poisoned]]
    assert auroc(scores, poisoned) == pytest.approx(np.mean(pairs))
    assert auroc(np.array([0.0, 1, 2, 3]), np.array([0, 0, 1, 1], bool)) == 1
    assert auroc(np.array([3.0, 2, 1, 0]), np.array([0, 0, 1, 1], bool)) == 0


@pytest.mark.parametrize("poisoned", [[0, 0], [1, 1], []])
def test_auroc_of_one_kind_is_nan(poisoned: list[int]) -> None:
    assert math.isnan(auroc(np.arange(len(poisoned), dtype=float), np.array(poisoned, bool)))


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[0.0, 1], [2, 1], [0, 3], [5, 4]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 1])) == 0.5
    assert math.isnan(accuracy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)))


def test_attack_success_leaves_out_samples_that_are_of_the_target_class_anyway() -> None:
    logits = torch.eye(3)[[0, 0, 0, 1, 2]]  # predictions 0 0 0 1 2
    labels = torch.tensor([0, 1, 2, 1, 2])
    assert attack_success_rate(logits, labels, torch.zeros(5, dtype=torch.int64)) == 2 / 4
    assert attack_success_rate(logits, labels, torch.tensor([1, 0, 1, 2, 0])) == 1 / 5
    assert math.isnan(attack_success_rate(logits, labels, labels))


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1] * 7])
def test_counts_over_batches_are_those_of_all_samples_at_once(sizes: list[int]) -> None:
    images = torch.arange(7)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2])
    logits = [torch.randn(7, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    batches = zip(images.split(sizes), labels.split(sizes), strict=True)
    found = count_correct([lambda rows, table=table: table[rows] for table in logits], batches, 4)
    for correct, table in zip(found, logits, strict=True):
        right = table.argmax(1) == labels
        assert correct.correct_K.tolist() == [int(right[labels == label].sum()) for label in range(4)]
        assert correct.count_K.tolist() == [2, 2, 3, 0]
        assert correct.total == (int(right.sum()), 7)
        assert correct.share == accuracy(table, labels)


def test_counts_without_samples_have_no_share() -> None:
    (nothing,) = count_correct([lambda images: images], [], 3)
    assert nothing.total == (0, 0)
    assert math.isnan(nothing.share)
