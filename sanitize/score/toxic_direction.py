"""Toxic direction: a backdoor's poison is a tight second cluster of its class, not a far-out one.

A model trained on poisoned data gathers the triggered samples of a class along one direction of its embedding space
(Directional Rank Reduction, Theorem 2: the third central moment points along the difference of the two means). Per
class we look for the direction v along which two Gaussians explain the class best,

    gain(v) = max over thresholds of  -sum_c p_c log(s_c / p_c) + log s        (nats a sample, Symons 1981)

with p_c, s_c the share and the standard deviation of the two sides, by alternating the best threshold with Fisher's
discriminant from many starts. The class statistic is measured on samples that chose nothing: each half of the class
proposes a direction, the other half is projected on it and gets its own two-Gaussian EM fit, and

    separation = J^2 x geometric mean over the halves of |m1 - m0| / sqrt(s0 s1),

J in [0, 1] the Jaccard index of the minorities that the two halves single out: a natural split differs from half to
half, a backdoor does not. Small classes are halved several times, and the median counts.

Scores are log-odds of the suspicious component: the higher, the more suspicious. Shapes: N samples of one class,
D features, P principal axes, S starts, B batch, K classes.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

SEARCH_ROWS = 1000  # the coarse search sees at most this many rows; the refinement sees all
COARSE_ROUNDS = ((2, 96), (3, 16))  # (steps, candidates kept afterwards): most starts are not worth many steps
FINE_STEPS, THIRD_MOMENT_STEPS, EM_STEPS = 12, 20, 30
DENSE_EIGEN_DIMS = 512  # above it, a randomised range finder replaces the dense eigendecomposition
MIN_VARIANCE = 1e-3  # floor of a component's variance, relative to the variance of the whole projection
PRIOR_SAMPLES = 5.0  # pseudo-samples that pull a component's variance towards the pooled one when it is reported
UNTOUCHED_ODDS = 1e-6  # prior odds of the suspicious component in a class that cannot be split


class ToxicDirectionConfig(BaseModel):
    """Settings of the detector; the defaults were tuned once for Fashion-MNIST, CIFAR-10 and digits together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["toxic_direction"] = "toxic_direction"
    embedding: str = Field(default="pooled", description="name of the embedding to score")
    n_starts: int = Field(default=256, ge=16, le=4096, description="random start directions of a search")
    ridge: float = Field(default=0.03, gt=0, le=10, description="added to the correlation matrix's eigenvalues")
    samples_per_dim: float = Field(default=6.0, ge=1, le=100, description="rows a search needs per principal axis")
    max_dims: int = Field(default=256, ge=2, le=1024, description="most principal axes a search uses")
    min_component: int = Field(default=8, ge=3, description="fewest samples, in half a class, that make a cluster")
    min_component_fraction: float = Field(default=0.01, ge=0, le=0.4, description="the same as a share of the half")
    min_class: int = Field(default=40, ge=8, description="a class with fewer finite rows is never touched")


class Mixture(NamedTuple):
    """Two Gaussians on a line. `mean_2`, `sd_2`, `weight_2`: float64 tensors of shape (2,), weights sum to 1."""

    mean_2: Tensor
    sd_2: Tensor
    weight_2: Tensor


class ClassSplit(NamedTuple):
    """What it takes to score a sample of one class; component 1 of `mixture` is the suspicious one.

    A sample's place on the line is `x_D @ direction_D + offset`: centre, scale and principal axes are folded in.
    `separation` is the held-out one (0 = cannot be split), `agreement` in [0, 1] says how far the directions of the
    two halves single out the same samples, `minority_fraction` is the suspicious component's share of the class.
    """

    direction_D: Tensor
    offset: float
    mixture: Mixture
    separation: float
    agreement: float
    n_samples: int
    minority_fraction: float


def fit_class(x_ND: Tensor, config: ToxicDirectionConfig, generator: torch.Generator) -> ClassSplit:
    """Split one class in two and measure on held-out halves how separate the parts are.

    Args:
        x_ND: embeddings of the samples labelled with this class, any real dtype; rows with NaN or inf are left out.
        config: settings.
        generator: CPU generator; the same seed gives the same split, whatever the order of the rows.
    """
    x_ND = x_ND.double()
    x_ND = x_ND[x_ND.isfinite().all(1)]
    z_ND, center_D, scale_D = standardise(x_ND)
    if len(z_ND) < config.min_class or not scale_D.isfinite().any():
        return untouched(x_ND)
    checks = [cross_check(shuffled(z_ND, generator), config, generator) for _ in range(n_repeats(len(z_ND)))]
    z_ND = shuffled(z_ND, generator)
    direction_D = search_direction(z_ND, config, generator, starts_DS=torch.cat([c.directions_DS for c in checks], 1))
    mixture = suspicious_last(z_ND, direction_D, fit_mixture(z_ND @ direction_D, config))
    folded_D = direction_D / scale_D
    return ClassSplit(
        direction_D=folded_D,
        offset=-float(center_D @ folded_D),
        mixture=mixture,
        separation=median(check.separation for check in checks),
        agreement=median(check.agreement for check in checks),
        n_samples=len(z_ND),
        minority_fraction=float((mixture_log_odds(mixture, z_ND @ direction_D) > 0).double().mean()),
    )


class CrossCheck(NamedTuple):
    """What two halves of a class say of each other: their directions (D, 2), separation and agreement."""

    directions_DS: Tensor
    separation: float
    agreement: float


def cross_check(z_ND: Tensor, config: ToxicDirectionConfig, generator: torch.Generator) -> CrossCheck:
    """Let each half of the rows (in random order) propose a direction, and measure it on the other half."""
    halves = z_ND.tensor_split(2)
    directions = [search_direction(half_ND, config, generator) for half_ND in halves]
    mixtures = [held_out_mixture(halves[h], halves[1 - h], directions[h], config) for h in (0, 1)]
    separations = [separation_of(mixtures[h], len(halves[1 - h]), config) for h in (0, 1)]
    agreement = agreement_of(*[smaller_part(mixtures[h], z_ND @ directions[h]) for h in (0, 1)])
    separation = math.sqrt(separations[0] * separations[1]) * agreement**2
    return CrossCheck(torch.stack(directions, 1), separation, agreement)


def n_repeats(n_rows: int) -> int:
    """Random halvings of a class, an odd number: for a small class one halving is a lottery."""
    return 3 if n_rows <= 2000 else 1


def log_odds(split: ClassSplit, x_BD: Tensor) -> Tensor:
    """Log-odds of the suspicious component, shape (B,), float32, nats; above 0 = more likely suspicious than not.

    Strictly increasing along the direction: the two-Gaussian log-ratio between the two means, and its tangents beyond
    them, since with unequal variances the ratio itself turns back far out. Rows with NaN or inf score as the main
    component's mean: nothing is known against them.
    """
    place_B = x_BD.double().nan_to_num(0.0, 0.0, 0.0) @ split.direction_D + split.offset
    main, suspicious = split.mixture.mean_2
    place_B = torch.where(x_BD.isfinite().all(1), place_B, main)
    inner_B = place_B.clamp(torch.minimum(main, suspicious), torch.maximum(main, suspicious))
    gap, var_2 = suspicious - main, split.mixture.sd_2.square()
    slope_B = torch.where((place_B - suspicious) * gap > 0, gap / var_2[0], gap / var_2[1])
    odds_B = mixture_log_odds(split.mixture, inner_B) + (place_B - inner_B) * slope_B
    return odds_B.clamp(-1e6, 1e6).float()


def separation_threshold(
    separations_K: Sequence[float], floor: float = 5.0, n_sigmas: float = 3.0, ceiling: float | None = None
) -> float:
    """The separation above which a class is touched: an absolute floor, raised where the run's classes split by nature.

        threshold = clip(median_K + n_sigmas * 1.4826 * median_K |separation - median_K|, floor, ceiling)

    Median and MAD over the classes that could be split at all (separation > 0). A poisoned minority of the classes
    moves neither far, and the ceiling, above every natural split seen, keeps a poisoned majority from hiding itself.
    With fewer than 4 such classes there is nothing to calibrate on and the floor decides alone.

    Args:
        separations_K: `ClassSplit.separation` of every class of the run, in any order.
        floor: lowest threshold, in units of the components' geometric-mean standard deviation.
        n_sigmas: robust standard deviations above the median class.
        ceiling: highest threshold; None = 1.2 x `floor`.
    """
    split_K = [float(s) for s in separations_K if math.isfinite(float(s)) and float(s) > 0]
    if len(split_K) < 4:
        return floor
    values_K = torch.tensor(split_K, dtype=torch.float64)
    center = values_K.quantile(0.5)
    spread = 1.4826 * (values_K - center).abs().quantile(0.5)
    return min(max(floor, float(center + n_sigmas * spread)), 1.2 * floor if ceiling is None else max(ceiling, floor))


def untouched(x_ND: Tensor) -> ClassSplit:
    """The split of a class that is too small or too uniform: every sample scores log(UNTOUCHED_ODDS)."""
    weight_2 = torch.tensor([1.0, UNTOUCHED_ODDS], dtype=torch.float64)
    mixture = Mixture(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), weight_2)
    return ClassSplit(torch.zeros(x_ND.shape[1], dtype=torch.float64), 0.0, mixture, 0.0, 0.0, len(x_ND), 0.0)


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


def shuffled(z_ND: Tensor, generator: torch.Generator) -> Tensor:
    """The rows in a random order that does not depend on the order they came in, only on their values."""
    key_D = torch.randn(z_ND.shape[1], generator=generator, dtype=torch.float64)
    by_value_N = (z_ND @ key_D).argsort(stable=True)
    return z_ND[by_value_N[torch.randperm(len(z_ND), generator=generator)]]


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


def search_direction(
    z_ND: Tensor, config: ToxicDirectionConfig, generator: torch.Generator, starts_DS: Tensor | None = None
) -> Tensor:
    """The direction (D,) of standardised space along which two Gaussians explain these rows best.

    In ridge-whitened coordinates Fisher's discriminant is the difference of the two means, so one step is: best
    threshold of every candidate, then the mean difference of its two sides.
    """
    z_ND = z_ND - z_ND.mean(0)
    # the rows that two clusters need anyway are no evidence for more axes
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
    if starts_DS is not None:
        v_PS = torch.cat([v_PS, unit(scale_P[:, None] * (vector_DP.T @ starts_DS))], 1)
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


def alternate(y_NP: Tensor, v_PS: Tensor, n_steps: int, config: ToxicDirectionConfig) -> tuple[Tensor, Tensor]:
    """`n_steps` of (best threshold, mean difference) for every candidate. Returns directions (P, S) and gains (S,)."""
    min_count = smallest_component(len(y_NP), config)
    total_P = y_NP.sum(0)
    for _ in range(n_steps):
        upper_SN, _ = best_threshold(v_PS.T @ y_NP.T, min_count)
        n_upper_S1 = upper_SN.sum(1, keepdim=True)
        sum_SP = upper_SN @ y_NP
        v_PS = unit((sum_SP / n_upper_S1 - (total_P - sum_SP) / (len(y_NP) - n_upper_S1)).T)
    return v_PS, best_threshold(v_PS.T @ y_NP.T, min_count)[1]


def best_threshold(place_SN: Tensor, min_count: int) -> tuple[Tensor, Tensor]:
    """The cut of each row of numbers that two Gaussians with hard membership like best (Symons 1981), in O(N log N).

    Returns membership of the upper side, 0 or 1, (S, N), and the gain in log-likelihood over one Gaussian, nats a
    sample, (S,), both in the dtype of `place_SN`. Neither side gets fewer than `min_count` samples, ties aside.
    """
    n_total = place_SN.shape[1]
    place_SN = place_SN - place_SN.mean(1, keepdim=True)
    sorted_SN = torch.from_numpy(np.sort(place_SN.numpy(), axis=1))  # several times faster than torch's sort
    sum_SN, square_SN = sorted_SN.cumsum(1), sorted_SN.square().cumsum(1)
    variance_S1 = square_SN[:, -1:] / n_total
    floor_S1 = MIN_VARIANCE * variance_S1 + torch.finfo(place_SN.dtype).tiny
    n_lower_C = torch.arange(min_count, n_total - min_count + 1, dtype=place_SN.dtype)
    sum_SC, square_SC = (t_SN[:, min_count - 1 : n_total - min_count] for t_SN in (sum_SN, square_SN))
    gain_SC = (variance_S1 + floor_S1).log() / 2
    for count_C, squares_SC in ((n_lower_C, square_SC), (n_total - n_lower_C, square_SN[:, -1:] - square_SC)):
        # the sum of the upper side is minus that of the lower one, for the mean is 0
        variance_SC = (squares_SC / count_C - (sum_SC / count_C).square()).clamp_(min=0) + floor_S1
        gain_SC = gain_SC + count_C / n_total * ((count_C / n_total).log() - variance_SC.log_() / 2)
    gain_S, cut_S = gain_SC.max(1)
    upper_SN = place_SN > sorted_SN.gather(1, cut_S[:, None] + min_count - 1)
    return upper_SN.to(place_SN.dtype), gain_S


def fit_mixture(place_N: Tensor, config: ToxicDirectionConfig) -> Mixture:
    """Two Gaussians by EM from the best threshold; component 1 is the upper one at the start."""
    upper_1N, _ = best_threshold(place_N[None], smallest_component(len(place_N), config))
    return em(place_N, upper_1N[0])


def em(place_N: Tensor, responsibility_N: Tensor, n_steps: int = EM_STEPS) -> Mixture:
    """Expectation maximisation of two Gaussians, starting with an M step; the likelihood never falls.

    Args:
        place_N: numbers on the line, float64.
        responsibility_N: probability of component 1, in [0, 1].
        n_steps: M steps. A variance is at least MIN_VARIANCE of the variance of all numbers.
    """
    floor = MIN_VARIANCE * place_N.var(correction=0) + torch.finfo(torch.float64).tiny
    mixture = m_step(place_N, responsibility_N, floor)
    for _ in range(n_steps - 1):
        mixture = m_step(place_N, mixture_log_odds(mixture, place_N).sigmoid(), floor)
    return mixture


def m_step(place_N: Tensor, responsibility_N: Tensor, floor: Tensor) -> Mixture:
    """The mixture of largest expected log-likelihood whose variances are at least `floor`."""
    share_2N = torch.stack([1 - responsibility_N, responsibility_N])
    count_2 = share_2N.sum(1).clamp(min=1e-9)
    mean_2 = share_2N @ place_N / count_2
    variance_2 = (share_2N * (place_N - mean_2[:, None]).square()).sum(1) / count_2
    return Mixture(mean_2, torch.maximum(variance_2, floor).sqrt(), count_2 / count_2.sum())


def mixture_log_odds(mixture: Mixture, place_B: Tensor) -> Tensor:
    """log p(component 1 | place) - log p(component 0 | place), nats, shape (B,)."""
    log_2B = component_log_density(mixture, place_B)
    return log_2B[1] - log_2B[0]


def component_log_density(mixture: Mixture, place_B: Tensor) -> Tensor:
    """log of weight times density for both components, shape (2, B)."""
    standard_2B = (place_B - mixture.mean_2[:, None]) / mixture.sd_2[:, None]
    constant_2 = mixture.weight_2.log() - mixture.sd_2.log() - 0.5 * math.log(2 * math.pi)
    return constant_2[:, None] - standard_2B.square() / 2


def held_out_mixture(chose_ND: Tensor, held_ND: Tensor, v_D: Tensor, config: ToxicDirectionConfig) -> Mixture:
    """EM on the held-out rows' projection; the rows that chose `v_D` lend it their mixture as a start only."""
    start = fit_mixture(chose_ND @ v_D, config)
    place_N = held_ND @ v_D
    return em(place_N, mixture_log_odds(start, place_N).sigmoid())


def separation_of(mixture: Mixture, n_rows: int, config: ToxicDirectionConfig) -> float:
    """|m1 - m0| / sqrt(s0 s1); 0 where a component has fewer samples than make a cluster.

    A component's variance is first drawn towards the pooled one by PRIOR_SAMPLES: a handful of samples that happen to
    lie close together is not a tight cluster.
    """
    count_2 = mixture.weight_2 * n_rows
    if count_2.min() < smallest_component(n_rows, config):
        return 0.0
    pooled = (mixture.weight_2 * mixture.sd_2.square()).sum()
    variance_2 = (count_2 * mixture.sd_2.square() + PRIOR_SAMPLES * pooled) / (count_2 + PRIOR_SAMPLES)
    return float((mixture.mean_2[1] - mixture.mean_2[0]).abs() / variance_2.prod().pow(0.25))


def suspicious_last(z_ND: Tensor, v_D: Tensor, mixture: Mixture) -> Mixture:
    """Order the components so that component 1 is the one with the larger dominant variance per share of the class.

    The smaller part is the suspect, but at 10 % all-to-one poisoning the halves are equal. Then the shape of the
    scatter decides: poison is tight along the direction only; off it, it still varies between the classes it was
    taken from, in few and large principal axes.
    """
    upper_N = mixture_log_odds(mixture, z_ND @ v_D) > 0
    if not 2 <= int(upper_N.sum()) <= len(z_ND) - 2:
        return mixture
    share = float(upper_N.double().mean())
    upper, lower = dominant_variance(z_ND[upper_N]), dominant_variance(z_ND[~upper_N])
    return mixture if upper * (1 - share) >= lower * share else Mixture(*(value_2.flip(0) for value_2 in mixture))


def dominant_variance(z_ND: Tensor) -> float:
    """tr(C^2) / tr(C) of the covariance C: the mean of its eigenvalues, weighted by themselves."""
    z_ND = z_ND[:SEARCH_ROWS] - z_ND[:SEARCH_ROWS].mean(0)
    gram_NN = z_ND @ z_ND.T if len(z_ND) < z_ND.shape[1] else z_ND.T @ z_ND
    return float(gram_NN.square().sum() / gram_NN.trace().clamp(min=1e-12)) / len(z_ND)


def smaller_part(mixture: Mixture, place_N: Tensor) -> Tensor:
    """Boolean (N,): the samples that the lighter component explains better."""
    upper_N = mixture_log_odds(mixture, place_N) > 0
    return upper_N if mixture.weight_2[1] <= mixture.weight_2[0] else ~upper_N


def agreement_of(one_N: Tensor, other_N: Tensor) -> float:
    """Jaccard index of two subsets of the same rows; of near-equal halves, whichever side of `other_N` fits better."""
    sides = [other_N, ~other_N] if float(other_N.double().mean()) > 0.4 else [other_N]
    return max(float((one_N & side).sum()) / max(1.0, float((one_N | side).sum())) for side in sides)


def smallest_component(n_rows: int, config: ToxicDirectionConfig) -> int:
    """Fewest of `n_rows` samples that count as a cluster; at most a quarter of them."""
    return min(max(config.min_component, int(config.min_component_fraction * n_rows)), n_rows // 4)


def unit(v_PS: Tensor) -> Tensor:
    """Columns scaled to length 1."""
    return v_PS / v_PS.norm(dim=0).clamp(min=1e-12)
