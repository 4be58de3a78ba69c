"""Published detectors on Gaussians for which the answer is known. N samples, D features, K classes."""

import numpy as np
import pytest

from benchmarks.baselines import (
    activation_clustering,
    anomaly_index,
    decomposition,
    first_division,
    flare,
    highest_of_class,
    scan,
    scan_statistic,
)

N_CLASSES, N_EACH, N_FEATURES = 8, 300, 16


def _data(n_poison: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, labels and truth: class 2 has `n_poison` further samples, moved by `shift` along one axis."""
    rng = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(N_CLASSES), N_EACH)
    means_KD = 5 * rng.normal(size=(N_CLASSES, N_FEATURES))
    labels_N = np.concatenate([labels_N, np.full(n_poison, 2)])
    z_ND = means_KD[labels_N] + rng.normal(size=(len(labels_N), N_FEATURES))
    truth_N = np.arange(len(labels_N)) >= N_CLASSES * N_EACH
    z_ND[truth_N, 0] += shift
    order_N = rng.permutation(len(labels_N))
    return z_ND[order_N].astype(np.float32), labels_N[order_N], truth_N[order_N]


@pytest.mark.parametrize("seed", range(3))
def test_a_far_cluster_is_found_by_both(seed: int) -> None:
    z_ND, labels_N, truth_N = _data(60, shift=12, seed=seed)
    assert (activation_clustering(z_ND, labels_N) == truth_N).all()
    trusted_N = ~truth_N & (np.random.default_rng(seed).random(len(truth_N)) < 0.2)
    assert (scan(z_ND, labels_N, trusted_N) == truth_N).all()


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_classes_lose_nothing(seed: int) -> None:
    z_ND, labels_N, _ = _data(0, shift=0, seed=seed)
    assert not activation_clustering(z_ND, labels_N).any()
    assert not scan(z_ND, labels_N, np.random.default_rng(seed).random(len(labels_N)) < 0.2).any()


def test_scan_removes_a_majority_by_its_trusted_samples() -> None:
    z_ND, labels_N, truth_N = _data(900, shift=12, seed=0)
    trusted_N = ~truth_N & (np.random.default_rng(0).random(len(truth_N)) < 0.2)
    assert (scan(z_ND, labels_N, trusted_N) == truth_N).all()
    assert not activation_clustering(z_ND, labels_N)[truth_N].any()  # it removes the smaller cluster only


def test_activation_clustering_keeps_an_even_split() -> None:
    z_ND, labels_N, _ = _data(300, shift=12, seed=0)
    assert not activation_clustering(z_ND, labels_N).any()


def test_small_classes_are_left_alone() -> None:
    z_ND, labels_N = np.random.default_rng(0).normal(size=(20, 4)), np.repeat([0, 1], 10)
    assert not activation_clustering(z_ND, labels_N).any()


def test_features_without_variance_change_nothing() -> None:
    z_ND, labels_N, truth_N = _data(60, shift=12, seed=0)
    z_ND = np.concatenate([z_ND, np.full((len(z_ND), 3), 7.0)], 1)
    assert (activation_clustering(z_ND, labels_N) == truth_N).all()
    trusted_N = ~truth_N & (np.random.default_rng(0).random(len(truth_N)) < 0.2)
    assert (scan(z_ND, labels_N, trusted_N) == truth_N).all()


def test_the_decomposition_recovers_both_covariances() -> None:
    rng = np.random.default_rng(0)
    scale_D = np.array([3.0, 1.0, 0.5])
    labels_N = np.repeat(np.arange(2000), 20)
    x_ND = (2 * rng.normal(size=(2000, 3)))[labels_N] + scale_D * rng.normal(size=(40_000, 3))
    between_DD, within_DD = decomposition(x_ND - x_ND.mean(0), labels_N)
    np.testing.assert_allclose(within_DD, np.diag(scale_D**2), atol=0.6)
    np.testing.assert_allclose(between_DD, 4 * np.eye(3), atol=0.5)  # 2,000 classes: standard error .13


def test_the_statistic_is_the_squared_distance_of_the_parts() -> None:
    """Shares p and 1 - p at distance d, in units of the deviation: the mean gain is p (1 - p) d^2."""
    n, share, shift = 60, 60 / 360, 12.0
    z_ND, labels_N, truth_N = _data(n, shift=shift, seed=0)
    statistic_K, _ = scan_statistic(z_ND, labels_N, ~truth_N)
    assert statistic_K[2] == pytest.approx(share * (1 - share) * shift**2, rel=0.15)
    assert statistic_K.argmax() == 2


def test_anomaly_index_by_hand() -> None:
    # median 2, absolute deviations 1, 0, 1, 8 and 0: their median is 1
    np.testing.assert_allclose(anomaly_index(np.array([1.0, 2, 3, 10, 2])), [0, 0, 1 / 1.4826, 8 / 1.4826, 0])


def test_highest_of_class_removes_as_many_as_are_poisoned() -> None:
    scores_N = np.array([5.0, 1, 9, 2, 2, 8, 7])
    labels_N, truth_N = np.array([0, 0, 0, 1, 1, 1, 2]), np.array([1, 1, 0, 1, 0, 1, 0], bool)
    np.testing.assert_array_equal(highest_of_class(scores_N, labels_N, truth_N), np.array([1, 0, 1, 1, 0, 1, 0], bool))


def _layers(n_poison: int, seed: int, overlap: bool = False) -> tuple[list[np.ndarray], np.ndarray]:
    """Three layers of one Gaussian each; poison is far away in the first two."""
    rng = np.random.default_rng(seed)
    truth_N = np.arange(2000) < n_poison
    layers = [rng.normal(size=(2000, 6)) for _ in range(3)]
    for layer in layers[:2]:
        layer[truth_N] = layer[truth_N] / 2 + 8
    if overlap:  # three natural groups far apart: the first division of all layers does not last
        layers[2] = np.array([0.0, 11, 23])[rng.integers(3, size=2000), None] + 0.1 * rng.normal(size=(2000, 60))
    return layers, truth_N


@pytest.mark.parametrize("seed", range(3))
def test_flare_removes_the_smaller_of_two_stable_clusters(seed: int) -> None:
    layers, truth_N = _layers(100, seed)
    removed_N = flare(layers)
    assert removed_N[truth_N].mean() >= 0.8  # points of low density belong to no cluster
    assert not removed_N[~truth_N].any()


@pytest.mark.parametrize("seed", range(3))
def test_flare_leaves_one_gaussian_alone(seed: int) -> None:
    assert not flare(_layers(0, seed)[0]).any()


def test_flare_leaves_late_layers_out_that_hide_the_clusters() -> None:
    layers, truth_N = _layers(100, seed=0, overlap=True)
    late_only = flare(layers[2:])
    assert not late_only.any()
    removed_N = flare(layers)
    assert removed_N[truth_N].mean() >= 0.8
    assert not removed_N[~truth_N].any()


def test_a_division_that_does_not_last_removes_nothing() -> None:
    """Three groups on a line, 11 and 10 apart: behind the first division the largest cluster falls apart at once."""
    line = np.concatenate([np.linspace(0, 1, 400), np.linspace(11, 12, 400), np.linspace(23, 24, 300)])
    removed_N, gap = first_division(line[:, None], smallest=30)
    np.testing.assert_array_equal(removed_N, line > 20)
    assert gap == pytest.approx(1.1, rel=0.03)
    assert not flare([line[:, None]]).any()


def test_the_gap_is_the_ratio_of_two_distances() -> None:
    """Points on a line: a group at distance 40, and the rest in two halves 10 apart; gap 40 / 10."""
    line = np.concatenate([np.linspace(0, 1, 400), np.linspace(11, 12, 400), np.linspace(52, 53, 100)])
    removed_N, gap = first_division(line[:, None], smallest=30)
    np.testing.assert_array_equal(removed_N, line > 50)
    assert gap == pytest.approx(4, rel=0.05)
