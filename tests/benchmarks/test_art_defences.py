"""The detectors of ART on given embeddings; skipped where ART is not installed."""

import numpy as np
import pytest

from benchmarks.art_defences import art_activation_defence, art_spectral_signatures, is_installed

pytestmark = pytest.mark.skipif(not is_installed(), reason="adversarial-robustness-toolbox is not installed")


def _embeddings() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three classes of 200 (numbers 0, 1, 5) in 40 dimensions; 20 samples of class 1 lie far from the rest."""
    generator = np.random.default_rng(0)
    labels_N = np.repeat([0, 1, 5], 200)
    z_ND = generator.normal(size=(600, 40)).astype(np.float32)
    poisoned_N = np.zeros(600, bool)
    poisoned_N[200:220] = True
    z_ND[poisoned_N, 0] += 30
    return z_ND, labels_N, poisoned_N


def test_activation_defence_removes_the_far_cluster_and_keeps_the_generator() -> None:
    z_ND, labels_N, poisoned_N = _embeddings()
    state = np.random.get_state()[1].copy()
    removed_N = art_activation_defence(z_ND, labels_N, seed=0)
    assert removed_N.shape == (600,)
    assert removed_N[poisoned_N].all()
    assert not removed_N[200:400][20:].any()
    assert np.array_equal(np.random.get_state()[1], state)


def test_spectral_signatures_remove_one_and_a_half_times_the_rate() -> None:
    z_ND, labels_N, poisoned_N = _embeddings()
    removed_N = art_spectral_signatures(z_ND, labels_N, poisoned_N.mean())
    assert 25 <= removed_N.sum() <= 35  # 1.5 * 600 / 30 = 30, in whole samples of each class
    assert np.bincount(labels_N[removed_N]).tolist()[1] >= 9
