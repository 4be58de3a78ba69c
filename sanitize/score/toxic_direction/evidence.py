"""Evidence for and against a group of a class: do the labels of its images conflict with what the images look like?

**Disagreement** d of a sample is the share of its `NEIGHBOURS` nearest neighbours, in an embedding made without labels,
that carry another label. A trigger makes poisoned images each other's neighbours, and they agree on the wrong label; so
for each group the `ERASED` directions that tell it from the rest of its class are projected out of the embedding first
(the paper's directional rank reduction, applied to features instead of weights). Near-duplicates of a sample are not
counted among its neighbours: the frames of one traffic sign know nothing about each other's label.

**Conflict** r = d - E[d | log p] is the disagreement beyond the model's own doubt; p is the probability that the model
gives to the label, and E[d | log p] falls monotonically, estimated over the whole data set. Natural groups with many
foreign neighbours are those that the model finds hard as well. Of poison the model is sure.

A natural style that has little in common with the rest of its class disagrees as well once its own direction is
erased, but its neighbours then carry labels of all kinds. Those of poison agree on the label it was taken from: most of
a planted group is outvoted by one other label.

A group stands out by the difference of mean conflict between the group and the rest of its class; how much of that is
natural is in `natural.py`. Near-duplicates count as one observation in the standard error (cluster-robust variance,
Liang & Zeger 1986).

Shapes: N samples of all classes, n of one class, M of the reference, P axes, R directions, k neighbours.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sanitize.near_duplicates import near_duplicates, unit_rows
from sanitize.streaming import Moments

AXES = 96  # principal axes of the embedding that are compared
NEIGHBOURS, REFERENCE = 20, 8_000  # neighbours of a sample, and rows among which they are sought
COMPARED = 250  # most rows of a group, and of the rest, whose neighbours are sought
ERASED, ERASED_ROWS, ERASED_RIDGE = 6, 1_000, 0.1
BURST = 5  # fewest near-duplicates that make a burst
WITHIN = 0.8  # share of a burst that must lie in a group to count as the group's own
BINS = 20  # of the log-probabilities
LEAST_VARIANCE = 0.05  # of a mean disagreement, times the observations: a handful of samples is never sure
RESOLUTION = 1e-4  # added to the variance of a difference
_ROWS = 1000


class Appearance(NamedTuple):
    """What images look like, their labels, and which of them are near-duplicates.

    Attributes:
        z_NP: principal axes of an embedding made without labels, float32; rows in random order.
        labels_N: given labels, int64.
        duplicates_N: number of the group of near-duplicates, int64.
        mean_D: mean of the embedding, float64.
        axes_DP: the axes, float64: z = (x - mean) @ axes.
    """

    z_NP: Tensor
    labels_N: Tensor
    duplicates_N: Tensor
    mean_D: Tensor
    axes_DP: Tensor


class Evidence(NamedTuple):
    """Evidence of a group.

    Attributes:
        level: mean disagreement in the group, in [0, 1].
        level_rest: the same in the rest of its class.
        outvoted: share of the group of which more neighbours carry one other label than their own, in [0, 1].
        conflict: difference of mean conflict between the group and the rest, in [-2, 2].
        error: standard error of the conflict, > 0.
        freedom: degrees of freedom of the standard error (Welch & Satterthwaite).
        burst: share of the group in bursts of its own, in [0, 1].
        z: conflict in standard deviations of natural groups (`natural.compared`); before that in standard errors, which
            is never less.
        rarity: share of natural groups that are as odd; 1 before they are compared.
        p: probability that any natural group of the data is as odd, at most; 1 before that.
    """

    level: float
    level_rest: float
    outvoted: float
    conflict: float
    error: float
    burst: float
    z: float
    freedom: float = 100.0
    rarity: float = 1.0
    p: float = 1.0


def appearance_of(x_ND: Tensor, labels_N: Tensor) -> Appearance:
    """Principal axes and near-duplicates of the rows of an embedding made without labels.

    Args:
        x_ND: rows in random order, finite, float32.
        labels_N: given labels, int64.
    """
    moments = Moments(x_ND.shape[1])
    for rows_BD in x_ND.split(_ROWS):
        moments.update(rows_BD)
    _, vector_DD = torch.linalg.eigh(moments.covariance(0))
    axes_DP = vector_DD.flip(1)[:, :AXES].contiguous()
    z_NP = torch.cat([((rows_BD - moments.mean_D) @ axes_DP).float() for rows_BD in x_ND.split(_ROWS)])
    return Appearance(z_NP, labels_N, near_duplicates(z_NP), moments.mean_D, axes_DP)


def fisher_directions(one_nP: Tensor, other_nP: Tensor) -> Tensor:
    """Orthonormal directions (P, R) that tell two groups apart: Fisher's, each in what the ones before leave."""
    found_PR = one_nP.new_zeros(one_nP.shape[1], 0)
    eye_PP = torch.eye(one_nP.shape[1])
    for _ in range(min(ERASED, one_nP.shape[1])):
        one, other = without(one_nP, found_PR), without(other_nP, found_PR)
        difference_P = one.mean(0) - other.mean(0)
        centred = torch.cat([one - one.mean(0), other - other.mean(0)])
        within_PP = centred.T @ centred / len(centred)
        ridge = ERASED_RIDGE * within_PP.diagonal().mean() + torch.finfo(torch.float32).tiny
        direction_P = torch.linalg.solve(within_PP + ridge * eye_PP, difference_P)
        direction_P = without(direction_P[None], found_PR)[0]
        found_PR = torch.cat([found_PR, (direction_P / direction_P.norm().clamp(min=1e-12))[:, None]], 1)
    return found_PR


def without(z_NP: Tensor, direction_PR: Tensor) -> Tensor:
    """Rows with orthonormal directions projected out."""
    return z_NP - z_NP @ direction_PR @ direction_PR.T


def neighbour_labels(appearance: Appearance, rows: Tensor, erased_PR: Tensor | None = None) -> Tensor:
    """Labels of the nearest neighbours of these rows, int64 (rows, k).

    Args:
        appearance: all samples; neighbours are sought among the first `REFERENCE` of them.
        rows: indices of samples.
        erased_PR: orthonormal directions to project out before; None compares the embedding as it is.
    """
    reference_MP, rows_BP = appearance.z_NP[:REFERENCE], appearance.z_NP[rows]
    if erased_PR is not None:
        reference_MP, rows_BP = without(reference_MP, erased_PR), without(rows_BP, erased_PR)
    reference_PM, unit_BP = unit_rows(reference_MP).T, unit_rows(rows_BP)
    duplicates_M, labels_M = appearance.duplicates_N[:REFERENCE], appearance.labels_N[:REFERENCE]
    k = min(NEIGHBOURS, len(labels_M))
    order_M = duplicates_M.argsort(stable=True)
    sorted_M = duplicates_M[order_M]
    found = []
    for part, unit_bP in zip(rows.split(_ROWS), unit_BP.split(_ROWS), strict=True):
        similarity_bM = unit_bP @ reference_PM
        # Few pairs are near-duplicates, so they are looked up, not compared one by one.
        duplicates_b = appearance.duplicates_N[part]
        first_b = torch.searchsorted(sorted_M, duplicates_b)
        n_b = torch.searchsorted(sorted_M, duplicates_b, right=True) - first_b
        at_row = torch.arange(len(part)).repeat_interleave(n_b)
        nth = torch.arange(len(at_row)) - (n_b.cumsum(0) - n_b)[at_row]
        similarity_bM[at_row, order_M[first_b[at_row] + nth]] = -torch.inf
        found.append(labels_M[similarity_bM.topk(k, dim=1).indices])
    return torch.cat(found)


def disagreement(nearest_Bk: Tensor, labels_B: Tensor) -> Tensor:
    """Share of the neighbours that carry another label, float32 (B,), in [0, 1]."""
    return (nearest_Bk != labels_B[:, None]).float().mean(1)


def outvoted(nearest_Bk: Tensor, labels_B: Tensor) -> float:
    """Share of the rows of which more neighbours carry one other label than their own, in [0, 1]."""
    _, compact = torch.cat([nearest_Bk.flatten(), labels_B]).unique(return_inverse=True)
    nearest_Bk, own_B1 = compact[: nearest_Bk.numel()].view_as(nearest_Bk), compact[nearest_Bk.numel() :, None]
    votes_BK = torch.zeros(len(labels_B), int(compact.max()) + 1)
    votes_BK = votes_BK.scatter_add(1, nearest_Bk, torch.ones(nearest_Bk.shape))
    own_votes_B = votes_BK.gather(1, own_B1)[:, 0]
    return float((votes_BK.scatter(1, own_B1, 0.0).amax(1) > own_votes_B).float().mean())


def expected_disagreement(d_N: Tensor, log_p_N: Tensor) -> Tensor:
    """E[d | log p] of each sample, float32 (N,): falling in log p, linear between the means of `BINS` bins.

    Args:
        d_N: disagreement, in [0, 1].
        log_p_N: log-probability that the model gives to the label, <= 0.
    """
    bins = [rows for rows in log_p_N.argsort(stable=True).tensor_split(BINS) if len(rows)]
    x, at_x = np.unique([float(log_p_N[rows].double().mean()) for rows in bins], return_inverse=True)
    y_of_bin = np.array([float(d_N[rows].double().mean()) for rows in bins])
    weight = np.bincount(at_x).astype(float)
    y = falling(np.bincount(at_x, y_of_bin) / weight, weight)
    return torch.from_numpy(np.interp(log_p_N.double().numpy(), x, y)).float()


def falling(y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The falling sequence closest to y in weighted squares: pool adjacent violators (Ayer et al. 1955)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for mean, mass in zip(y.tolist(), weight.tolist(), strict=True):
        length = 1
        while blocks and blocks[-1][0] < mean:
            before, mass_before, length_before = blocks.pop()
            mean = (before * mass_before + mean * mass) / (mass_before + mass)
            mass, length = mass + mass_before, length + length_before
        blocks.append((mean, mass, length))
    return np.concatenate([np.full(length, mean) for mean, _, length in blocks])


def weigh(appearance: Appearance, group: Tensor, rest: Tensor, expected_N: Tensor) -> Evidence:
    """Evidence of a group against the rest of its class.

    Args:
        appearance: all samples.
        group: indices of the group, in random order.
        rest: indices of the rest of its class, in random order.
        expected_N: disagreement that the doubt of the model explains (`expected_disagreement`).
    """
    erased_PR = fisher_directions(appearance.z_NP[group[:ERASED_ROWS]], appearance.z_NP[rest[:ERASED_ROWS]])
    here, there = group[:COMPARED], rest[:COMPARED]
    labels_here, labels_there = appearance.labels_N[here], appearance.labels_N[there]
    nearest = neighbour_labels(appearance, torch.cat([here, there]), erased_PR)
    nearest_here, nearest_there = nearest[: len(here)], nearest[len(here) :]
    d_here, d_there = disagreement(nearest_here, labels_here), disagreement(nearest_there, labels_there)
    r_here, r_there = d_here - expected_N[here], d_there - expected_N[there]
    conflict = float(r_here.mean() - r_there.mean())
    (v_here, m_here), (v_there, m_there) = (
        _variance(r_n, appearance.duplicates_N[rows]) for r_n, rows in ((r_here, here), (r_there, there))
    )
    error = math.sqrt(v_here + v_there + RESOLUTION)
    uncertain = v_here**2 / max(1, m_here - 1) + v_there**2 / max(1, m_there - 1)
    return Evidence(
        level=float(d_here.mean()),
        level_rest=float(d_there.mean()),
        outvoted=outvoted(nearest_here, labels_here),
        conflict=conflict,
        error=error,
        burst=burst_share(appearance.duplicates_N, group),
        z=conflict / error,
        freedom=(v_here + v_there) ** 2 / uncertain,
    )


def _variance(u_n: Tensor, duplicates_n: Tensor) -> tuple[float, int]:
    """Variance of the mean of u where near-duplicates count as one observation, and the number of observations."""
    groups, at_n = duplicates_n.unique(return_inverse=True)
    m = len(groups)
    sums_m = torch.zeros(m).index_add_(0, at_n, u_n - u_n.mean())
    robust = float(sums_m.square().sum()) / len(u_n) ** 2 * m / max(1, m - 1)
    return max(robust, LEAST_VARIANCE / m), m


def burst_share(duplicates_N: Tensor, group: Tensor) -> float:
    """Share of a group in sets of `BURST` near-duplicates or more that lie in the group almost whole."""
    size = duplicates_N.bincount()
    inside = duplicates_N[group].bincount(minlength=len(size))
    is_own = (size >= BURST) & (inside >= WITHIN * size)
    return float(is_own[duplicates_N[group]].float().mean())
