"""All members of a planted group, from some of them.

Poison of one trigger comes from several classes and falls into several groups of the class it is labelled with. What
tells one such group from the rest of the class tells it from the other groups of poison as well. What they share is the
trigger. It shows where a group is compared with images of *other* classes that look alike, its matches:

    v = C^-1 mean over the group of (z_i - mean z of the matches of i)

C is the covariance of the embeddings of the model within the other classes, where none of this poison lies, plus a
ridge. The samples of the class are placed on v, each by the group without its fold; two Gaussians on the line give new
members, and so on until they stay the same.

Shapes: N samples of all classes, n of one class, m of a group, D features, k matches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.near_duplicates import unit_rows
from sanitize.score.toxic_direction.evidence import ERASED_ROWS, Appearance, fisher_directions, without
from sanitize.score.toxic_direction.grow import FOLDS
from sanitize.score.toxic_direction.split import SplitConfig, separation_of, smallest_component
from sanitize.score.toxic_direction.two_gaussians import fit_mixture, rising_odds, swapped

ROUNDS, RIDGE = 6, 0.05  # most repetitions; share of the variance within the other classes
MATCHED, MATCHES, POOL = 600, 5, 6_000  # samples of a group that are matched, matches of each, and sought among
KEPT = 0.8  # least share of the group that must remain


class Completed(NamedTuple):
    """A group with what belongs to it.

    Attributes:
        members_n: bool (n,).
        separation: held-out standard deviations between group and rest.
    """

    members_n: Tensor
    separation: float


def complete(
    model_ND: Tensor, appearance: Appearance, rows: Tensor, members_n: Tensor, fold_n: Tensor, config: SplitConfig
) -> Completed | None:
    """A group with all samples of its class that have what its images have and images that look alike lack.

    None where that does not tell the group from the rest, or where there are no other classes.

    Args:
        model_ND: embeddings of the model side by side, float32.
        appearance: the same rows without the model, and labels.
        rows: indices of the samples of the class that count.
        members_n: True for the group, among these rows.
        fold_n: fold of each of these rows.
        config: settings of the split.
    """
    label = appearance.labels_N[rows[0]]
    pool = (appearance.labels_N != label).nonzero()[:POOL, 0]
    if len(pool) < MATCHES:
        return None
    scale_D, factor_DD = _within(model_ND, appearance.labels_N, int(label))
    z_nD = model_ND[rows].double() / scale_D
    smallest = smallest_component(len(rows), config)
    found_n, separation = members_n, 0.0
    for _ in range(ROUNDS):
        group, rest = rows[found_n][:ERASED_ROWS], rows[~found_n][:ERASED_ROWS]
        if min(len(group), len(rest)) < config.min_component:
            return None
        erased_PR = fisher_directions(appearance.z_NP[group], appearance.z_NP[rest])
        matched = found_n.nonzero()[:MATCHED, 0]
        unit_mP, unit_MP = (unit_rows(without(appearance.z_NP[at], erased_PR)) for at in (rows[matched], pool))
        matches_mk = pool[(unit_mP @ unit_MP.T).topk(MATCHES, dim=1).indices]
        difference_mD = z_nD[matched] - (model_ND[matches_mk].double() / scale_D).mean(1)
        place_n = torch.zeros(len(rows), dtype=torch.float64)
        for fold in range(FOLDS):
            is_other_m = fold_n[matched] != fold
            if not is_other_m.any():
                return None
            v_D1 = torch.cholesky_solve(difference_mD[is_other_m].mean(0)[:, None], factor_DD)
            here_n = fold_n == fold
            place_n[here_n] = (z_nD[here_n] @ v_D1)[:, 0] / v_D1.norm().clamp(min=1e-12)
        mixture = fit_mixture(place_n, smallest)
        mixture = mixture if mixture.mean_2[1] > mixture.mean_2[0] else swapped(mixture)
        separation = separation_of(mixture, len(place_n), smallest)
        last_n, found_n = found_n, rising_odds(mixture, place_n) > 0
        if torch.equal(last_n, found_n):
            break
    kept = float((found_n & members_n).sum()) / max(1, int(members_n.sum()))
    return Completed(found_n, separation) if kept >= KEPT and separation > 0 else None


def _within(model_ND: Tensor, labels_N: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Standard deviations (D,) within the classes other than `label`, and the Cholesky factor of their correlation."""
    scatter_DD = torch.zeros(model_ND.shape[1], model_ND.shape[1], dtype=torch.float64)
    n = 0
    for other in labels_N.unique().tolist():
        if other != label:
            x_nD = model_ND[labels_N == other].double()
            x_nD = x_nD - x_nD.mean(0)
            scatter_DD += x_nD.T @ x_nD
            n += len(x_nD)
    covariance_DD = scatter_DD / max(1, n)
    scale_D = covariance_DD.diagonal().sqrt()
    scale_D = scale_D.masked_fill(scale_D <= 1e-7 * scale_D.amax() + torch.finfo(torch.float64).tiny, torch.inf)
    correlation_DD = covariance_DD / scale_D / scale_D[:, None]
    factor_DD, _ = torch.linalg.cholesky_ex(correlation_DD + RIDGE * torch.eye(len(scale_D), dtype=torch.float64))
    return scale_D, factor_DD
