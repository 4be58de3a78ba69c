"""Published detectors beside which benchmarks put the library: pure functions of embeddings and labels.

Each returns the samples it removes. N samples, D features, K classes, k reduced features.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

SCAN_LIMIT = np.exp(2)  # anomaly index above which a class counts as contaminated (Tang et al., section 4)
_MAX_STEPS = 100  # of the decomposition
_MAX_SILHOUETTE_ROWS = 2000  # the silhouette costs a distance for every pair


def highest_of_class(scores_N: np.ndarray, labels_N: np.ndarray, truth_N: np.ndarray) -> np.ndarray:
    """Removals of a scorer that is given the number of poisoned samples in each class: the highest scores of the class.

    Args:
        scores_N: scores; higher = more suspicious.
        labels_N: given labels.
        truth_N: True for poisoned samples; only counts are used.

    Returns:
        True for removed samples, (N,); on ties the later samples stay.
    """
    removed_N = np.zeros(len(labels_N), bool)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        order = np.argsort(-scores_N[rows], kind="stable")
        removed_N[rows[order[: truth_N[rows].sum()]]] = True
    return removed_N


def activation_clustering(
    z_ND: np.ndarray,
    labels_N: np.ndarray,
    n_components: int = 10,
    largest_share: float = 0.35,
    least_silhouette: float = 0.1,
    seed: int = 0,
) -> np.ndarray:
    """Activation clustering (Chen et al., 2018, sections 3 and 4): 2-means on principal components of each class.

    The smaller cluster of a class is removed if it is small and the silhouette is high; components and limits are the
    defaults of ART 1.20 (`ClusteringAnalyzer.analyze_by_silhouette_score`). The paper's independent components
    have unit variance, and 2-means on them misses clusters that lie far apart.

    Args:
        z_ND: penultimate embeddings.
        labels_N: given labels.
        n_components: number of principal components.
        largest_share: share of the class in [0, 1/2] below which the smaller cluster may be poison.
        least_silhouette: mean silhouette in [-1, 1] above which two clusters are distinct.
        seed: seed of the means.

    Returns:
        True for removed samples, (N,).
    """
    removed_N = np.zeros(len(labels_N), bool)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        if len(rows) <= n_components:
            continue
        y_Nk = _principal(z_ND[rows].astype(np.float64), n_components)
        first_N = KMeans(2, n_init=10, random_state=seed).fit_predict(y_Nk).astype(bool)
        smaller_N = first_N if first_N.mean() <= 0.5 else ~first_N
        if 1 < smaller_N.sum() < largest_share * len(rows):
            silhouette = silhouette_score(
                y_Nk, first_N, sample_size=min(len(rows), _MAX_SILHOUETTE_ROWS), random_state=seed
            )
            removed_N[rows] = smaller_N & (silhouette > least_silhouette)
    return removed_N


def _principal(x_ND: np.ndarray, n_components: int) -> np.ndarray:
    """Leading principal components (N, k); k is at most the rank of the data."""
    centred_ND = x_ND - x_ND.mean(0)
    left_NR, values_R, _ = np.linalg.svd(centred_ND, full_matrices=False)
    return (left_NR * values_R)[:, :n_components]


def scan(z_ND: np.ndarray, labels_N: np.ndarray, trusted_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """SCAn (Tang et al., 2021, section 4): a class that two Gaussians explain far better than one is contaminated.

    Both Gaussians share the covariance within classes. It comes from the trusted samples, which the method is given.
    Of a contaminated class the side with the smaller share of trusted samples is removed; the smaller one on a tie.

    Args:
        z_ND: penultimate embeddings.
        labels_N: given labels.
        trusted_N: True for samples known to be clean; at least two in two classes.
        seed: seed of the split.

    Returns:
        True for removed samples, (N,).
    """
    removed_N = np.zeros(len(labels_N), bool)
    statistic_K, side_N = scan_statistic(z_ND, labels_N, trusted_N, seed)
    classes = np.unique(labels_N)
    for label in classes[anomaly_index(statistic_K) > SCAN_LIMIT]:
        rows = np.flatnonzero(labels_N == label)
        sides = [rows[side_N[rows]], rows[~side_N[rows]]]
        removed_N[min(sides, key=lambda side: (trusted_N[side].mean(), len(side)) if len(side) else (1.0, 0))] = True
    return removed_N


def scan_statistic(
    z_ND: np.ndarray, labels_N: np.ndarray, trusted_N: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Likelihood ratio of two Gaussians against one, a sample of the class, and the side of each sample.

    Args:
        z_ND, labels_N, trusted_N, seed: as for `scan`.

    Returns:
        (statistic (K,) of the classes in `np.unique(labels_N)`, side (N,) bool). The statistic is
        mean [(x - m)^T F (x - m) - (x - m_j)^T F (x - m_j)], F the inverse covariance within classes, m_j the mean of
        the side of x, m the mean of the class under its prior.
    """
    x_ND = z_ND.astype(np.float64) - z_ND[trusted_N].astype(np.float64).mean(0)
    between_DD, within_DD = decomposition(x_ND[trusted_N], labels_N[trusted_N])
    values_D, vectors_DD = np.linalg.eigh(within_DD)
    kept_D = values_D > 1e-10 * max(values_D[-1], 1e-300)  # a pseudo-inverse: dead features say nothing
    whitener_Dk = vectors_DD[:, kept_D] / np.sqrt(values_D[kept_D])
    classes, side_N = np.unique(labels_N), np.zeros(len(labels_N), bool)
    statistic_K = np.zeros(len(classes))
    for k, label in enumerate(classes):
        rows = np.flatnonzero(labels_N == label)
        if len(rows) < 2:
            continue
        y_Nk = x_ND[rows] @ whitener_Dk
        upper_N = KMeans(2, n_init=4, random_state=seed).fit_predict(y_Nk).astype(bool)
        mean_k = _posterior_mean(x_ND[rows].sum(0), len(rows), between_DD, within_DD) @ whitener_Dk
        halves = [half for half in (upper_N, ~upper_N) if half.any()]
        means_Nk = np.zeros_like(y_Nk)
        for half in halves:
            means_Nk[half] = y_Nk[half].mean(0)
        statistic_K[k] = ((y_Nk - mean_k) ** 2 - (y_Nk - means_Nk) ** 2).sum(1).mean()
        side_N[rows] = upper_N
    return statistic_K, side_N


def decomposition(x_ND: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Covariance between and within classes of x = m_class + e, by expectation-maximisation (Tang et al., section 4).

    Args:
        x_ND: centred embeddings.
        labels_N: labels; at least two classes.

    Returns:
        (between (D, D), within (D, D)).
    """
    classes, of_N = np.unique(labels_N, return_inverse=True)
    count_K = np.bincount(of_N)
    sum_KD = np.stack([x_ND[of_N == k].sum(0) for k in range(len(classes))])
    mean_KD = sum_KD / count_K[:, None]
    between_DD, within_DD = np.cov(mean_KD[of_N].T), np.cov((x_ND - mean_KD[of_N]).T)
    for _ in range(_MAX_STEPS):
        mean_KD = np.stack([_posterior_mean(s, n, between_DD, within_DD) for s, n in zip(sum_KD, count_K, strict=True)])
        last = between_DD, within_DD
        between_DD, within_DD = np.cov(mean_KD[of_N].T), np.cov((x_ND - mean_KD[of_N]).T)
        if np.linalg.norm(between_DD - last[0]) + np.linalg.norm(within_DD - last[1]) < 1e-5:
            break
    return between_DD, within_DD


def _posterior_mean(sum_D: np.ndarray, n: int, between_DD: np.ndarray, within_DD: np.ndarray) -> np.ndarray:
    """Mean of a class given the sum of its `n` samples: S_m (n S_m + S_e)^-1 sum."""
    return between_DD @ np.linalg.pinv(n * between_DD + within_DD, hermitian=True) @ sum_D


def anomaly_index(statistic_K: np.ndarray) -> np.ndarray:
    """Distance above the median in units of 1.4826 times the median absolute deviation, (K,); 0 below the median."""
    above_K = statistic_K - np.median(statistic_K)
    deviation = 1.4826 * np.median(np.abs(above_K))
    return np.maximum(above_K, 0) / max(deviation, 1e-12)


def flare(
    layers: Sequence[np.ndarray],
    least_gap: float = 1.5,
    smallest_share: float = 1 / 400,
    n_components: int = 32,
    seed: int = 0,
) -> np.ndarray:
    """FLARE (Hou et al., 2024): all samples of all classes fall apart into two stable clusters.

    Density clustering (HDBSCAN) of what is unusual in the layers; labels are not used. The first division that
    lasts is looked for: behind it, the largest cluster stays whole while the density grows by the factor `least_gap`.
    Where no division of all layers does, the last layers are left out one by one (the adaptive subspace). All clusters
    but the largest are removed; samples of no cluster stay.

    Simplified: principal components in place of UMAP, and so a factor of densities in place of the paper's difference,
    which depends on the scale of UMAP; largest and smallest activation of every channel in place of one number for each
    layer, as the suspect has 3 layers and not 20; the first division only, not the first three.

    Args:
        layers: one array (N, 2 C) for each layer, in their order (`benchmarks.proactive.extremes`).
        least_gap: factor, above 1, of the density up to which the largest cluster stays whole.
        smallest_share: share of the samples that a cluster has at least.
        n_components: number of principal components of the standardised activations.
        seed: seed of the components.

    Returns:
        True for removed samples, (N,).
    """
    for n_layers in range(len(layers), 0, -1):
        x_ND = np.concatenate(layers[:n_layers], 1).astype(np.float64)
        x_ND = (x_ND - x_ND.mean(0)) / (x_ND.std(0) + 1e-9)
        axes = PCA(min(n_components, *x_ND.shape), random_state=seed)
        removed_N, gap = first_division(axes.fit_transform(x_ND), max(20, round(smallest_share * len(x_ND))))
        if gap >= least_gap:
            return removed_N
    return np.zeros(len(layers[0]), bool)


def first_division(x_Nk: np.ndarray, smallest: int, n_cuts: int = 300) -> tuple[np.ndarray, float]:
    """The first division of the density tree into clusters, from the lowest density up.

    Args:
        x_Nk: points.
        smallest: number of points that a cluster has at least.
        n_cuts: number of densities that are tried; each is 2 % above the one before.

    Returns:
        (True for points of all clusters but the largest (N,); the factor of the density, 1 or more, up to which
        the largest then stays whole; 1 where there is no division).
    """
    tree = HDBSCAN(min_cluster_size=smallest, copy=True).fit(x_Nk)
    widest = 2 * float(np.linalg.norm(x_Nk - x_Nk.mean(0), axis=1).max())
    divided: tuple[float, np.ndarray, np.ndarray] | None = None
    for cut in widest * 0.98 ** np.arange(n_cuts):
        labels_N = tree.dbscan_clustering(cut, min_cluster_size=smallest)
        if divided is None:
            sizes = np.bincount(labels_N[labels_N >= 0])
            if len(sizes) > 1:
                largest = int(sizes.argmax())
                divided = cut, (labels_N >= 0) & (labels_N != largest), labels_N == largest
        else:
            inside = labels_N[divided[2]]
            if len(np.unique(inside[inside >= 0])) != 1:
                return divided[1], float(divided[0] / cut)
    return np.zeros(len(x_Nk), bool), 1.0
