"""Detectors of the Adversarial Robustness Toolbox (ART 1.20), run where it is installed, on given embeddings.

    pip install --no-deps adversarial-robustness-toolbox==1.20.1

ART asks a classifier for its activations; here
they are the embeddings that the other methods see. N samples, D features.
"""

import importlib
import importlib.util
from typing import NamedTuple

import numpy as np


class GivenActivations(NamedTuple):
    """What ART reads of a classifier, for images that are embeddings already."""

    nb_classes: int
    layer_names: tuple[str, ...] = ("penultimate",)

    def get_activations(self, x: np.ndarray, layer: int, batch_size: int) -> np.ndarray:
        """The given rows."""
        return x


def is_installed() -> bool:
    """True where ART can be imported."""
    return importlib.util.find_spec("art") is not None


def art_activation_defence(z_ND: np.ndarray, labels_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """`ActivationDefence` (activation clustering) with its defaults: the smaller cluster of every class is removed.

    ART's judgements of clusters that would spare a class do not work in 1.20.1: "relative-size" fails where a class
    has no small cluster, and "silhouette-scores" leaves the decision on larger clusters uninitialised.
    `benchmarks.baselines.activation_clustering` is what the latter should do.

    Args:
        z_ND: penultimate embeddings, float32.
        labels_N: given labels, from 0.
        seed: seed of the clusters; ART takes numpy's global generator, whose state is put back.

    Returns:
        True for removed samples, (N,).
    """
    module = importlib.import_module("art.defences.detector.poison")
    classes, label_N = np.unique(labels_N, return_inverse=True)  # ART fails on an empty class
    defence = module.ActivationDefence(GivenActivations(len(classes)), z_ND, np.eye(len(classes))[label_N])
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        _, is_clean = defence.detect_poison()
    finally:
        np.random.set_state(state)
    return ~np.asarray(is_clean, bool)


def art_spectral_signatures(z_ND: np.ndarray, labels_N: np.ndarray, rate: float) -> np.ndarray:
    """`SpectralSignatureDefense`, given the true poisoning rate: every class loses 1.5 times that share.

    Args:
        z_ND: penultimate embeddings, float32.
        labels_N: given labels, from 0.
        rate: share of poisoned samples in the data set, in [0, 1].

    Returns:
        True for removed samples, (N,).
    """
    module = importlib.import_module("art.defences.detector.poison")
    classes, label_N = np.unique(labels_N, return_inverse=True)
    defence = module.SpectralSignatureDefense(
        GivenActivations(len(classes)), z_ND, np.eye(len(classes))[label_N], expected_pp_poison=rate
    )
    _, is_clean = defence.detect_poison()
    return ~np.asarray(is_clean, bool)
