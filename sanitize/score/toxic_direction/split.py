"""Split of one class in two: a backdoor's poison is a tight second cluster of its class, not a far-out one.

A model trained on poisoned data gathers the triggered samples of a class along one direction of its embedding space
(Directional Rank Reduction, Theorem 2: the third central moment points along the difference of the two means). Per
class we look for the direction v along which two Gaussians explain the class best,

    gain(v) = max over thresholds of  -sum_c p_c log(s_c / p_c) + log s        (nats a sample, Symons 1981)

with p_c, s_c the share and the standard deviation of the two sides, by alternating the best threshold with Fisher's
discriminant from many starts. The class statistic is measured on held-out samples, by cross-fitting: each fold of the
class is projected on the direction found on the other folds, and over all folds

    separation = J^2 |m1 - m0| / sqrt(s0 s1)

of a two-Gaussian EM fit. J in [0, 1] is the Jaccard index between the parts found on the folds and on the whole class:
a chance split differs from fold to fold, a backdoor does not.

Scores are log-odds of the suspicious component: the higher, the more suspicious. Shapes: N samples of one class,
D features, P principal axes, S starts, B batch, K classes.
"""

import math
from statistics import median
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize import exact
from sanitize.score.toxic_direction.sides import NO_EVIDENCE, Sides, suspicious_side
from sanitize.score.toxic_direction.two_gaussians import (
    Mixture,
    best_threshold,
    em,
    fit_mixture,
    mixture_log_odds,
    rising_odds,
    swapped,
)

SEARCH_ROWS = 1000  # most rows of the coarse search; the refinement uses all
COARSE_ROUNDS = ((2, 96), (3, 16))  # (steps, candidates kept afterwards): most starts are not worth many steps
FINE_STEPS, THIRD_MOMENT_STEPS = 12, 20
DENSE_EIGEN_DIMS = 512  # above it, a randomised range finder replaces the dense eigendecomposition
PRIOR_SAMPLES = 5.0  # pseudo-samples that pull a component's variance towards the pooled one when it is reported
UNTOUCHED_ODDS = 1e-6  # prior odds of the suspicious component in a class that cannot be split


class SplitConfig(BaseModel):
    """Settings of a split; the defaults were tuned once for Fashion-MNIST, CIFAR-10 and digits together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_starts: int = Field(default=256, ge=16, le=4096, description="random start directions of a search")
    ridge: float = Field(default=0.03, gt=0, le=10, description="added to the correlation matrix's eigenvalues")
    samples_per_dim: float = Field(default=6.0, ge=1, le=100, description="rows a search needs per principal axis")
    max_dims: int = Field(default=256, ge=2, le=1024, description="most principal axes a search uses")
    min_component: int = Field(default=8, ge=3, description="fewest samples that make a cluster")
    min_component_fraction: float = Field(default=0.01, ge=0, le=0.4, description="the same as a share of the class")
    min_class: int = Field(default=40, ge=8, description="a class with fewer finite rows is never touched")
    small_class: int = Field(default=500, ge=8, description="a class with fewer rows is cross-fitted in 5 folds, not 2")


class ClassSplit(NamedTuple):
    """A class split in two; component 1 of `mixture` is the suspicious one.

    Attributes:
        direction_D: direction of the line, float64; centre, scale and principal axes are folded in.
        offset: a sample's place on the line is `x_D @ direction_D + offset`.
        mixture: two Gaussians on the line.
        separation: held-out separation times the squared agreement, >= 0; 0 for a class that cannot be split.
        agreement: median Jaccard index between the suspicious parts of the folds and of the whole class, in [0, 1].
        n_samples: finite rows of the class.
        minority_fraction: share of the suspicious component; above 1/2 where poison outnumbers the clean samples.
        sides: evidence for the choice of the suspicious component.
    """

    direction_D: Tensor
    offset: float
    mixture: Mixture
    separation: float
    agreement: float
    n_samples: int
    minority_fraction: float
    sides: Sides


def fit_class(
    x_ND: Tensor,
    config: SplitConfig,
    generator: torch.Generator,
    disagreement_N: Tensor | None = None,
    at_least: float = 0.0,
) -> ClassSplit:
    """Split one class in two and measure the separation of the parts on held-out samples.

    Args:
        x_ND: embeddings of the samples labelled with this class, any real dtype; rows with NaN or inf are left out.
        config: settings.
        generator: CPU generator; the same seed gives the same split, whatever the order of the rows.
        disagreement_N: label disagreement of the rows in [0, 1], NaN where not measured; None if nowhere measured.
        at_least: smallest separation of interest. Parts that are closer than this on the rows they were found on are
            not cross-fitted, which saves two thirds of the time, and get separation 0.
    """
    disagreement_N = torch.full((len(x_ND),), math.nan) if disagreement_N is None else disagreement_N
    finite_N = x_ND.isfinite().all(1)
    x_ND, disagreement_N = x_ND[finite_N].double(), disagreement_N[finite_N]
    z_ND, center_D, scale_D = standardise(x_ND)
    if len(z_ND) < config.min_class or not scale_D.isfinite().any():
        return untouched(x_ND)
    order_N = random_order(z_ND, generator)
    z_ND, disagreement_N = z_ND[order_N], disagreement_N[order_N]
    direction_D = search_direction(z_ND, config, generator)
    place_N = z_ND @ direction_D
    min_count = smallest_component(len(z_ND), config)
    mixture, sides = suspicious_last(z_ND, place_N, fit_mixture(place_N, min_count), disagreement_N)
    suspicious_N = rising_odds(mixture, place_N) > 0
    separation, agreement = separation_of(mixture, len(z_ND), min_count), 0.0
    if separation >= at_least:
        place_N, agreement = cross_fit(z_ND, suspicious_N, config, generator)
        separation = separation_of(em(place_N, (place_N > 0.5).double()), len(z_ND), min_count)
    folded_D = direction_D / scale_D
    return ClassSplit(
        direction_D=folded_D,
        offset=-float(center_D @ folded_D),
        mixture=mixture,
        separation=separation * agreement**2,
        agreement=agreement,
        n_samples=len(z_ND),
        minority_fraction=float(suspicious_N.double().mean()),
        sides=sides,
    )


def cross_fit(
    z_ND: Tensor, suspicious_N: Tensor, config: SplitConfig, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Place every sample on a line that was found without the sample.

    Each fold is projected on the direction found on the other folds, in units of their two means: 0 is the main
    component, 1 the suspicious one. Two folds are enough for a large class; in a small class, half of a small cluster
    is too little to be found, so there are five.

    Args:
        z_ND: standardised rows in random order.
        suspicious_N: suspicious part of the whole class; it only decides which end of each line is called 1.
        config: settings.
        generator: random source of the searches.

    Returns:
        Places (N,), and the median Jaccard index between the suspicious parts of the folds and of the whole class.
    """
    n_folds = 2 if len(z_ND) >= config.small_class else 5
    fold_N = torch.arange(len(z_ND)) % n_folds
    place_N = torch.zeros(len(z_ND), dtype=torch.float64)
    agreements = []
    for fold in range(n_folds):
        rest_MD = z_ND[fold_N != fold]
        direction_D = search_direction(rest_MD, config, generator)
        mixture = fit_mixture(rest_MD @ direction_D, smallest_component(len(rest_MD), config))
        projected_N = z_ND @ direction_D
        upper, lower = (jaccard(rising_odds(m, projected_N) > 0, suspicious_N) for m in (mixture, swapped(mixture)))
        main, suspicious = (mixture if upper >= lower else swapped(mixture)).mean_2
        agreements.append(max(upper, lower))
        place_N[fold_N == fold] = ((projected_N - main) / (suspicious - main))[fold_N == fold]
    return place_N, median(agreements)


def jaccard(one_N: Tensor, other_N: Tensor) -> float:
    """Size of the intersection of two subsets over the size of their union; 0 where both are empty."""
    return float((one_N & other_N).sum()) / max(1.0, float((one_N | other_N).sum()))


def log_odds(split: ClassSplit, x_BD: Tensor) -> Tensor:
    """Log-odds of the suspicious component, shape (B,), float32, nats; above 0 = more likely suspicious than not.

    Rows with NaN or inf score like the main component's mean.
    """
    # The rows are not centred, so the products may be much larger than their sum, which is taken in full float64.
    products_BD = x_BD.double().nan_to_num(0.0, 0.0, 0.0) * split.direction_D
    place_B = exact.total(products_BD) + split.offset
    place_B = torch.where(x_BD.isfinite().all(1), place_B, split.mixture.mean_2[0])
    return rising_odds(split.mixture, place_B).clamp(-1e6, 1e6).float()


def untouched(x_ND: Tensor) -> ClassSplit:
    """The split of a class that is too small or too uniform: every sample scores log(UNTOUCHED_ODDS)."""
    weight_2 = torch.tensor([1.0, UNTOUCHED_ODDS], dtype=torch.float64)
    mixture = Mixture(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), weight_2)
    direction_D = torch.zeros(x_ND.shape[1], dtype=torch.float64)
    return ClassSplit(direction_D, 0.0, mixture, 0.0, 0.0, len(x_ND), 0.0, NO_EVIDENCE)


def standardise(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns to mean 0 and variance 1. Returns (z_ND, center_D, scale_D); a constant column gets z = 0, scale inf."""
    if len(x_ND) == 0:
        return x_ND, x_ND.new_zeros(x_ND.shape[1]), x_ND.new_full((x_ND.shape[1],), math.inf)
    center_D = x_ND.mean(0)
    scale_D = x_ND.std(0, correction=0)
    # relative to the column's own size: the rounding of a large constant is not a signal
    constant_D = scale_D <= 1e-7 * center_D.abs() + torch.finfo(torch.float64).tiny
    scale_D = scale_D.masked_fill(constant_D, math.inf)
    return (x_ND - center_D) / scale_D, center_D, scale_D


def random_order(z_ND: Tensor, generator: torch.Generator) -> Tensor:
    """A random order (N,) of the rows that depends on their values, not on their given order."""
    key_D = torch.randn(z_ND.shape[1], generator=generator, dtype=torch.float64)
    by_value_N = (z_ND @ key_D).argsort(stable=True)
    return by_value_N[torch.randperm(len(z_ND), generator=generator)]


def principal_axes(z_ND: Tensor, n_axes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues (P,) and eigenvectors (D, P) of z^T z / N, in falling order.

    Above DENSE_EIGEN_DIMS features by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    n_rows, n_dims = z_ND.shape
    if n_dims <= DENSE_EIGEN_DIMS:
        value_D, vector_DD = torch.linalg.eigh(z_ND.T @ z_ND / n_rows)
        return value_D.flip(0)[:n_axes].clamp(min=0), vector_DD.flip(1)[:, :n_axes]
    basis_DQ = torch.randn(n_dims, min(n_axes + 16, n_dims), generator=generator, dtype=torch.float64)
    for _ in range(3):
        basis_DQ = torch.linalg.qr(z_ND.T @ (z_ND @ basis_DQ)).Q
    image_NQ = z_ND @ basis_DQ
    value_Q, vector_QQ = torch.linalg.eigh(image_NQ.T @ image_NQ / n_rows)
    return value_Q.flip(0)[:n_axes].clamp(min=0), (basis_DQ @ vector_QQ.flip(1))[:, :n_axes]


def third_moment_directions(z_NP: Tensor, start_PS: Tensor) -> Tensor:
    """Fixed points of v <- E[x (x.v)^2], unit length: local maxima of the third moment (DRR, equation of Theorem 2)."""
    for _ in range(THIRD_MOMENT_STEPS):
        start_PS = unit(z_NP.T @ (z_NP @ start_PS).square() / len(z_NP))
    return start_PS


def search_direction(z_ND: Tensor, config: SplitConfig, generator: torch.Generator) -> Tensor:
    """The direction (D,) of standardised space along which two Gaussians explain these rows best.

    In ridge-whitened coordinates Fisher's discriminant is the difference of the two means, so one step is: best
    threshold of every candidate, then the mean difference of its two sides.
    """
    z_ND = z_ND - z_ND.mean(0)
    # rows that two clusters need anyway do not justify more axes
    n_evidence = len(z_ND) - 4 * config.min_component
    n_axes = max(2, min(config.max_dims, z_ND.shape[1], int(n_evidence / config.samples_per_dim)))
    value_P, vector_DP = principal_axes(z_ND, n_axes, generator)
    # the mean eigenvalue of standardised features is 1, so the ridge is relative to it
    scale_P = (value_P + config.ridge).sqrt()
    y_NP = z_ND @ vector_DP / scale_P
    v_PS = start_directions(y_NP, value_P, scale_P, config.n_starts, generator)
    for n_steps, n_kept in COARSE_ROUNDS:  # in float32: twice as fast, and only the ranking matters
        v_PS, gain_S = alternate(y_NP[:SEARCH_ROWS].float(), v_PS.float(), n_steps, config)
        v_PS = v_PS[:, gain_S.argsort(descending=True, stable=True)[:n_kept]].double()
    v_PS, gain_S = alternate(y_NP, v_PS, FINE_STEPS, config)
    return vector_DP @ (v_PS[:, gain_S.argmax()] / scale_P)


def start_directions(
    y_NP: Tensor, value_P: Tensor, scale_P: Tensor, n_random: int, generator: torch.Generator
) -> Tensor:
    """Unit start directions (P, S) in whitened coordinates: principal axes, third-moment maxima, random draws.

    Random draws follow the spectrum (half of them with variance value_P, half with its square): what a network has
    learned to react to has a large variance, and uniform draws almost never lead there.
    """
    n_axes = len(value_P)
    draw_PS = torch.randn(n_axes, n_random + 8, generator=generator, dtype=torch.float64)
    spectrum_P1 = (value_P / value_P[0].clamp(min=1e-12)).sqrt()[:, None]
    # the raw third moment is taken before whitening, where DRR's criterion works
    third_PS = scale_P[:, None] * third_moment_directions(y_NP * scale_P, draw_PS[:, :8])
    flat_PS, steep_PS = draw_PS[:, 8:].tensor_split(2, dim=1)
    axes_PS = torch.eye(n_axes, dtype=torch.float64)[:, :16]
    return unit(torch.cat([axes_PS, third_PS, spectrum_P1 * flat_PS, spectrum_P1.square() * steep_PS], 1))


def alternate(y_NP: Tensor, v_PS: Tensor, n_steps: int, config: SplitConfig) -> tuple[Tensor, Tensor]:
    """`n_steps` of (best threshold, mean difference) for every candidate. Returns directions (P, S) and gains (S,).

    Fewer steps where no candidate changes any more.
    """
    min_count = smallest_component(len(y_NP), config)
    total_P = y_NP.sum(0)
    last_SN: Tensor | None = None
    for _ in range(n_steps):
        upper_SN, _ = best_threshold(v_PS.T @ y_NP.T, min_count)
        if last_SN is not None and torch.equal(upper_SN, last_SN):
            break
        last_SN = upper_SN
        n_upper_S1 = upper_SN.sum(1, keepdim=True).clamp(1, len(y_NP) - 1)  # 0 where all places coincide
        sum_SP = upper_SN @ y_NP
        v_PS = unit((sum_SP / n_upper_S1 - (total_P - sum_SP) / (len(y_NP) - n_upper_S1)).T)
    return v_PS, best_threshold(v_PS.T @ y_NP.T, min_count)[1]


def separation_of(mixture: Mixture, n_rows: int, min_count: int) -> float:
    """|m1 - m0| / sqrt(s0 s1); 0 where a component has fewer than `min_count` samples.

    A component's variance is first drawn towards the pooled variance by PRIOR_SAMPLES: a handful of samples that happen
    to lie close together is not a tight cluster.
    """
    count_2 = mixture.weight_2 * n_rows
    if count_2.min() < min_count:
        return 0.0
    pooled = (mixture.weight_2 * mixture.sd_2.square()).sum()
    variance_2 = (count_2 * mixture.sd_2.square() + PRIOR_SAMPLES * pooled) / (count_2 + PRIOR_SAMPLES)
    return float((mixture.mean_2[1] - mixture.mean_2[0]).abs() / variance_2.prod().pow(0.25))


def suspicious_last(z_ND: Tensor, place_N: Tensor, mixture: Mixture, disagreement_N: Tensor) -> tuple[Mixture, Sides]:
    """Order the components so that component 1 is the suspicious one; and the evidence for it."""
    upper_N = mixture_log_odds(mixture, place_N) > 0
    if not 2 <= int(upper_N.sum()) <= len(z_ND) - 2:
        return mixture, NO_EVIDENCE
    is_upper, sides = suspicious_side(z_ND, upper_N, disagreement_N)
    return mixture if is_upper else swapped(mixture), sides


def smallest_component(n_rows: int, config: SplitConfig) -> int:
    """Fewest of `n_rows` samples that count as a cluster; at most a quarter of them."""
    return min(max(config.min_component, int(config.min_component_fraction * n_rows)), n_rows // 4)


def unit(v_PS: Tensor) -> Tensor:
    """Columns scaled to length 1."""
    length_S: Tensor = v_PS.norm(dim=0).clamp(min=1e-12)
    return v_PS / length_S
