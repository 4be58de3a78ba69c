"""A group as the embedding sees it that tells it apart best: from a few sure members to log-odds of every sample.

A split finds the core of a group. Fisher's line for the core, in each embedding and in all together, places the other
samples of the class; two Gaussians on the line give log-odds, and the line is fitted once more to those. A sample is
placed by a line that was fitted without its fold, because in few samples a line fits its own. The embedding with the
largest separation of these places wins, and a group that no line can tell apart keeps one line fitted to all samples.

Shapes: n samples of one class, C columns of all embeddings, A principal axes, F folds, D features, B batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize import exact
from sanitize.score.toxic_direction.candidates import MIN_GROUP, n_axes
from sanitize.score.toxic_direction.split import (
    SplitConfig,
    jaccard,
    principal_axes,
    separation_of,
    standardise,
)
from sanitize.score.toxic_direction.two_gaussians import Mixture, em, rising_odds, swapped

FOLDS, ROUNDS, EM_STEPS = 5, 2, 10
SAME_GROUP = 0.4  # least Jaccard index between a group and what a line makes of it
CERTAIN = 1e-4  # responsibilities stay this far from 0 and 1
CORE, GROWINGS = 0.08, 3  # share of a class that a group is grown from by conflict, and steps


class Lines(NamedTuple):
    """One line for the samples of each fold; a sample's place is `x_D @ weight_FD[fold] + offset_F[fold]`.

    Attributes:
        weight_FD: weights of the columns, float64.
        offset_F: float64.
        mixture: two Gaussians on the line; component 1 is the group.
        separation: held-out standard deviations between group and rest, times the root of the agreement.
        seen_in: name of the embedding.
    """

    weight_FD: Tensor
    offset_F: Tensor
    mixture: Mixture
    separation: float
    seen_in: str


def digests(rows_BD: Tensor) -> Tensor:
    """Hash of the values of each row, int64 (B,), >= 0: the same in whatever batch, shard or place the row is."""
    rows = rows_BD.float().contiguous().numpy()
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(value, "big") >> 1 for value in hashes], dtype=torch.int64)


class Axes(NamedTuple):
    """Whitened principal axes of some columns of a class.

    Attributes:
        name: name of the embedding, or "all".
        columns: the columns.
        n_columns: number of all columns C.
        y_nA: coordinates of the rows, float64.
        vector_DA: axes over the root of their eigenvalue, for standardised columns.
        center_D, scale_D: mean and standard deviation of the columns.
    """

    name: str
    columns: slice
    n_columns: int
    y_nA: Tensor
    vector_DA: Tensor
    center_D: Tensor
    scale_D: Tensor


def axes_of(spaces: Mapping[str, Tensor], config: SplitConfig) -> list[Axes]:
    """Axes of all embeddings side by side ("all"), and of each.

    Args:
        spaces: name of an embedding -> its rows (n, D).
        config: settings of the split.
    """
    x_nC = torch.cat([x_nD.double() for x_nD in spaces.values()], 1)
    found = []
    for name, columns in _columns_of(spaces).items():
        z_nD, center_D, scale_D = standardise(x_nC[:, columns])
        generator = torch.Generator().manual_seed(0)  # of the range finder in wide embeddings
        value_A, vector_DA = principal_axes(z_nD, n_axes(len(z_nD), z_nD.shape[1], config), generator)
        vector_DA = vector_DA / (value_A + config.ridge).sqrt()
        found.append(Axes(name, columns, x_nC.shape[1], z_nD @ vector_DA, vector_DA, center_D, scale_D))
    return found


def grow(spaces: Mapping[str, Tensor], members_n: Tensor, fold_n: Tensor, config: SplitConfig) -> Lines:
    """The lines that tell a group apart best.

    Args:
        spaces: name of an embedding -> its rows (n, D); the columns of the lines are theirs, side by side.
        members_n: True for the core of the group, bool (n,).
        fold_n: fold of each row, below `FOLDS`.
        config: settings of the split.
    """
    axes = axes_of(spaces, config)
    best = held_out(axes, members_n, fold_n)
    if best is not None:
        return best[0]
    whole = torch.full_like(fold_n, FOLDS)  # no row is left out
    ((lines, _), *_) = _refined(axes[0], members_n, whole)
    return lines._replace(seen_in="all, not held out")


def held_out(axes: Sequence[Axes], members_n: Tensor, fold_n: Tensor) -> tuple[Lines, Tensor] | None:
    """The lines that tell a group apart best, and log-odds (n,), each of lines fitted without the row's fold.

    None where no embedding tells the group from the rest of its class.
    """
    best: tuple[Lines, Tensor] | None = None
    for one in axes:
        for lines, odds_n in _refined(one, members_n, fold_n):
            is_same = jaccard(odds_n > 0, members_n) >= SAME_GROUP
            if is_same and lines.separation > (0.0 if best is None else best[0].separation):
                best = lines, odds_n
    return best


def grown_from_conflict(axes: Sequence[Axes], conflict_n: Tensor, fold_n: Tensor) -> tuple[Tensor, float] | None:
    """A group around the samples of which the embeddings predict most conflict: members, bool (n,), and separation.

    Ridge regression of conflict on all columns, held out; the `CORE` samples of largest prediction are grown
    `GROWINGS` times. None where the embeddings do not tell them apart.
    """
    y_nA = axes[0].y_nA / axes[0].vector_DA.norm(dim=0).clamp(min=1e-12)  # not whitened: small axes are noise
    predicted_n = y_nA.new_zeros(len(y_nA))
    for fold in range(FOLDS):
        fitted_n, here_n = fold_n != fold, fold_n == fold
        y_mA = y_nA[fitted_n]
        target_m = (conflict_n[fitted_n] - conflict_n[fitted_n].mean()).double()
        gram_AA = y_mA.T @ y_mA / max(1, len(y_mA)) + torch.eye(y_nA.shape[1], dtype=torch.float64)
        predicted_n[here_n] = y_nA[here_n] @ torch.linalg.solve(gram_AA, y_mA.T @ target_m / max(1, len(y_mA)))
    members_n = predicted_n >= predicted_n.quantile(1 - CORE)
    separation = 0.0
    for _ in range(GROWINGS):
        found = held_out(axes, members_n, fold_n)
        if found is None:
            break
        lines, odds_n = found
        members_n, separation = odds_n > 0, lines.separation
        if min(int(members_n.sum()), int((~members_n).sum())) < MIN_GROUP:
            return None
    return (members_n, separation) if separation > 0 else None


def log_odds(lines: Lines, x_BD: Tensor, fold_B: Tensor) -> Tensor:
    """Log-odds of the group, float32 (B,), nats; the bits depend on the row alone. Rows not finite score like the rest.

    Args:
        lines: lines of a group, weights for the columns of `x_BD`.
        x_BD: rows, float32.
        fold_B: fold of each row.
    """
    weight_BD = lines.weight_FD[fold_B]
    place_B = exact.total(x_BD.double().nan_to_num(0.0, 0.0, 0.0) * weight_BD) + lines.offset_F[fold_B]
    place_B = torch.where(x_BD.isfinite().all(1), place_B, lines.mixture.mean_2[0])
    return rising_odds(lines.mixture, place_B).clamp(-1e6, 1e6).float()


def _columns_of(spaces: Mapping[str, Tensor]) -> dict[str, slice]:
    """Name of an embedding -> its columns, after "all"."""
    found, start = {}, 0
    for name, x_nD in spaces.items():
        found[name] = slice(start, start + x_nD.shape[1])
        start += x_nD.shape[1]
    return {"all": slice(0, start)} | found if len(spaces) > 1 else found


def _refined(axes: Axes, members_n: Tensor, fold_n: Tensor) -> list[tuple[Lines, Tensor]]:
    """Lines and log-odds (n,) after each round, in some of the columns."""
    found = []
    responsibility_n = members_n.double()
    for _ in range(ROUNDS):
        line_FA, offset_F = _fisher_lines(axes.y_nA, responsibility_n, fold_n)
        held_out_n = fold_n % FOLDS
        place_n = (axes.y_nA * line_FA[held_out_n]).sum(1) + offset_F[held_out_n]
        mixture = em(place_n, responsibility_n, EM_STEPS)
        mixture = mixture if mixture.mean_2[1] > mixture.mean_2[0] else swapped(mixture)
        odds_n = rising_odds(mixture, place_n)
        responsibility_n = odds_n.sigmoid().clamp(CERTAIN, 1 - CERTAIN)
        separation = 0.0
        if int((odds_n > 0).sum()) >= MIN_GROUP:
            separation = separation_of(mixture, len(place_n), MIN_GROUP) * jaccard(odds_n > 0, members_n) ** 0.5
        weight_FD = line_FA @ axes.vector_DA.T / axes.scale_D
        weight_FC = weight_FD.new_zeros(FOLDS, axes.n_columns)
        weight_FC[:, axes.columns] = weight_FD
        offset_F = offset_F - weight_FD @ axes.center_D
        found.append((Lines(weight_FC, offset_F, mixture, separation, axes.name), odds_n))
    return found


def _fisher_lines(y_nA: Tensor, responsibility_n: Tensor, fold_n: Tensor) -> tuple[Tensor, Tensor]:
    """Line of each fold (F, A) and its offset (F,), fitted without the fold: 0 is the mean of the rest, 1 the group's.

    In ridge-whitened coordinates Fisher's discriminant is the difference of the two means.
    """
    inside_Fn = torch.nn.functional.one_hot(fold_n, FOLDS + 1).T[:FOLDS].to(y_nA.dtype)
    means = []
    for share_n in (responsibility_n, 1 - responsibility_n):
        share_Fn = (1 - inside_Fn) * share_n
        means.append(share_Fn @ y_nA / share_Fn.sum(1, keepdim=True).clamp(min=1e-9))
    group_FA, rest_FA = means
    line_FA = group_FA - rest_FA
    line_FA = line_FA / line_FA.square().sum(1, keepdim=True).clamp(min=1e-12)
    return line_FA, -(rest_FA * line_FA).sum(1)
