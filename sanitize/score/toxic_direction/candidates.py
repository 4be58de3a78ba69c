"""Groups of a class that may be planted: sides of splits, and sides of splits of a side.

A split is a local optimum of the gain of two Gaussians (`split.py`). Several are kept, in several embeddings: a trigger
that a small model hardly separates can be the first axis of what images look like, and two triggers in one class are
two optima. The side whose labels are in more conflict is split again: poison may be one of several styles in it.

Shapes: n samples of one class, D features, P principal axes, S starts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.score.toxic_direction.split import (
    COARSE_ROUNDS,
    FINE_STEPS,
    SEARCH_ROWS,
    SplitConfig,
    alternate,
    jaccard,
    principal_axes,
    separation_of,
    smallest_component,
    standardise,
    start_directions,
)
from sanitize.score.toxic_direction.two_gaussians import best_threshold, em, rising_odds

MIN_GROUP = 8  # fewest samples of a group
KEPT = (3, 2)  # optima kept of a class, and of a side, in each embedding
DEEPER_ROWS, DEEPER_SEPARATION = 60, 3.0  # least size of a side that is split again, and separation of its split
SAME_SPLIT, SAME_GROUP = 0.6, 0.9  # Jaccard index above which two splits, or two groups, count as one
SAME_START = 0.95  # the same of two sides of a best threshold


class Candidate(NamedTuple):
    """A group of a class.

    Attributes:
        found_in: embeddings that were split, from the class to the group.
        members_n: True for members, bool (n,).
        separation: standard deviations between the sides of the split, on the rows it was found on.
    """

    found_in: str
    members_n: Tensor
    separation: float


def optima(x_nD: Tensor, config: SplitConfig, generator: torch.Generator, n_kept: int) -> list[tuple[Tensor, float]]:
    """Distinct splits that are local optima, the best first: upper side, bool (n,), and separation.

    Args:
        x_nD: rows of a class in random order.
        config: settings of the search.
        generator: random source of the search.
        n_kept: most splits to return.
    """
    z_nD, _, scale_D = standardise(x_nD.double())
    if len(z_nD) < config.min_class or not scale_D.isfinite().any():
        return []
    value_P, vector_DP = principal_axes(z_nD, n_axes(len(z_nD), z_nD.shape[1], config), generator)
    scale_P = (value_P + config.ridge).sqrt()
    y_nP = z_nD @ vector_DP / scale_P
    v_PS = start_directions(y_nP, value_P, scale_P, config.n_starts, generator)
    for n_steps, n_best in COARSE_ROUNDS:
        v_PS, gain_S = alternate(y_nP[:SEARCH_ROWS].float(), v_PS.float(), n_steps, config)
        v_PS = v_PS[:, gain_S.argsort(descending=True, stable=True)[:n_best]].double()
    v_PS, _ = alternate(y_nP, v_PS, FINE_STEPS, config)
    smallest = smallest_component(len(y_nP), config)
    place_Sn = v_PS.T @ y_nP.T
    hard_Sn, gain_S = best_threshold(place_Sn, smallest)
    found: list[tuple[Tensor, float]] = []
    seen: list[Tensor] = []
    for s in gain_S.argsort(descending=True, stable=True).tolist():
        hard_n, place_n = hard_Sn[s] > 0, place_Sn[s]
        if any(max(jaccard(hard_n, n), jaccard(~hard_n, n)) > SAME_START for n in seen):
            continue  # several starts end in one optimum
        seen.append(hard_n)
        mixture = em(place_n, hard_Sn[s])
        upper_n = rising_odds(mixture, place_n) > 0
        is_known = any(max(jaccard(upper_n, n), jaccard(~upper_n, n)) > SAME_SPLIT for n, _ in found)
        if is_group(upper_n) and not is_known:
            found.append((upper_n, separation_of(mixture, len(y_nP), smallest)))
        if len(found) == n_kept:
            break
    return found


def parts(x_nD: Tensor, members_n: Tensor, config: SplitConfig, generator: torch.Generator) -> list[Candidate]:
    """Sides of the best splits of a group: of poison from several classes, the part from one of them.

    Args:
        x_nD: appearance of the samples of a class, in random order.
        members_n: True for the group, bool (n,).
        config: settings of the search.
        generator: random source of the search.
    """
    rows = members_n.nonzero()[:, 0]
    found = []
    for upper, separation in optima(x_nD[rows], config, generator, KEPT[0]):
        for side in (rows[upper], rows[~upper]):
            part_n = torch.zeros(len(x_nD), dtype=torch.bool).index_fill_(0, side, True)
            found.append(Candidate("completed, appearance", part_n, separation))
    return found


def is_group(members_n: Tensor) -> bool:
    """True where the members, and the others, are enough to be weighed."""
    return MIN_GROUP <= int(members_n.sum()) <= len(members_n) - MIN_GROUP


def n_axes(n_rows: int, n_features: int, config: SplitConfig) -> int:
    """Principal axes that the rows of a search justify; those that two clusters need anyway do not."""
    n_justified = int((n_rows - 4 * config.min_component) / config.samples_per_dim)
    return max(2, min(config.max_dims, n_features, n_justified))


def candidates(
    spaces: Mapping[str, Tensor], conflict_n: Tensor, config: SplitConfig, generator: torch.Generator
) -> list[Candidate]:
    """All candidates of a class, the best splits of the whole class first.

    Args:
        spaces: name of an embedding -> its rows (n, D).
        conflict_n: conflict of each label, float32; decides which side is split again.
        config: settings of the search.
        generator: random source of the searches.
    """
    found: list[Candidate] = []

    def add(found_in: str, members_n: Tensor, separation: float) -> None:
        is_known = any(jaccard(members_n, known.members_n) > SAME_GROUP for known in found)
        if is_group(members_n) and not is_known:
            found.append(Candidate(found_in, members_n, separation))

    def split(rows: Tensor, found_in: str, depth: int) -> None:
        for name, x_nD in spaces.items():
            here = f"{found_in}, {name}" if found_in else name
            for upper, separation in optima(x_nD[rows], config, generator, KEPT[depth]):
                for side in (rows[upper], rows[~upper]):
                    add(here, torch.zeros(len(conflict_n), dtype=torch.bool).index_fill_(0, side, True), separation)
                worse = float(conflict_n[rows[upper]].mean()) > float(conflict_n[rows[~upper]].mean())
                side = rows[upper if worse else ~upper]
                if depth + 1 < len(KEPT) and separation > DEEPER_SEPARATION and len(side) >= DEEPER_ROWS:
                    split(side, here, depth + 1)

    split(torch.arange(len(conflict_n)), "", 0)
    return found
