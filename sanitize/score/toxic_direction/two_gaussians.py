"""Two Gaussians on a line: the best threshold, expectation maximisation, and log-odds.

Shapes: N samples, S candidate lines, C cuts, B batch, 2 components.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EM_STEPS = 30
MIN_VARIANCE = 1e-3  # floor of a component's variance, relative to the variance of the whole projection


class Mixture(NamedTuple):
    """Two Gaussians on a line. `mean_2`, `sd_2`, `weight_2`: float64, shape (2,); weights sum to 1."""

    mean_2: Tensor
    sd_2: Tensor
    weight_2: Tensor


def best_threshold(place_SN: Tensor, min_count: int) -> tuple[Tensor, Tensor]:
    """Threshold of each row by which two Gaussians with hard membership are likeliest (Symons 1981), in O(N log N).

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
        # the mean is 0, so the sum of the upper side is minus the sum of the lower one
        variance_SC = (squares_SC / count_C - (sum_SC / count_C).square()).clamp_(min=0) + floor_S1
        gain_SC = gain_SC + count_C / n_total * ((count_C / n_total).log() - variance_SC.log_() / 2)
    gain_S, cut_S = gain_SC.max(1)
    upper_SN = place_SN > sorted_SN.gather(1, cut_S[:, None] + min_count - 1)
    return upper_SN.to(place_SN.dtype), gain_S


def fit_mixture(place_N: Tensor, min_count: int) -> Mixture:
    """Two Gaussians by EM from the best threshold with at least `min_count` samples on a side."""
    upper_1N, _ = best_threshold(place_N[None], min_count)
    return em(place_N, upper_1N[0])


def em(place_N: Tensor, responsibility_N: Tensor, n_steps: int = EM_STEPS) -> Mixture:
    """Expectation maximisation of two Gaussians, starting with an M step; the likelihood never falls.

    Args:
        place_N: numbers on the line, float64.
        responsibility_N: probability of component 1, in [0, 1].
        n_steps: M steps. A variance is at least MIN_VARIANCE of the variance of all numbers.
    """
    # NumPy, and log-odds as a quadratic of the place: a third of the time of torch's many small operations.
    center = place_N.double().mean()
    scale = place_N.double().var(correction=0).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    place = ((place_N.double() - center) / scale).numpy()
    square = place * place
    mean_2, variance_2, weight_2 = _m_step(place, square, responsibility_N.double().numpy())
    for _ in range(n_steps - 1):
        slope_2 = mean_2 / variance_2
        constant_2 = np.log(weight_2) - np.log(variance_2) / 2 - mean_2 * slope_2 / 2
        curve = (1 / variance_2[0] - 1 / variance_2[1]) / 2
        odds = curve * square + (slope_2[1] - slope_2[0]) * place + (constant_2[1] - constant_2[0])
        mean_2, variance_2, weight_2 = _m_step(place, square, 1 / (1 + np.exp(-odds.clip(-700, 700))))
    sd_2 = torch.from_numpy(np.sqrt(variance_2))
    return Mixture(center + scale * torch.from_numpy(mean_2), scale * sd_2, torch.from_numpy(weight_2))


def _m_step(place: np.ndarray, square: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, variances (at least MIN_VARIANCE) and weights, each (2,), of numbers with mean 0 and variance 1."""
    count, first, second = share.sum(), share @ place, share @ square
    count_2 = np.maximum([len(place) - count, count], 1e-9)
    mean_2 = np.array([place.sum() - first, first]) / count_2
    variance_2 = np.array([square.sum() - second, second]) / count_2 - mean_2**2
    return mean_2, np.maximum(variance_2, MIN_VARIANCE), count_2 / count_2.sum()


def mixture_log_odds(mixture: Mixture, place_B: Tensor) -> Tensor:
    """log p(component 1 | place) - log p(component 0 | place), nats, shape (B,)."""
    log_2B = component_log_density(mixture, place_B)
    return log_2B[1] - log_2B[0]


def component_log_density(mixture: Mixture, place_B: Tensor) -> Tensor:
    """log of weight times density for both components, shape (2, B)."""
    standard_2B = (place_B - mixture.mean_2[:, None]) / mixture.sd_2[:, None]
    constant_2 = mixture.weight_2.log() - mixture.sd_2.log() - 0.5 * math.log(2 * math.pi)
    return constant_2[:, None] - standard_2B.square() / 2


def rising_odds(mixture: Mixture, place_B: Tensor) -> Tensor:
    """`mixture_log_odds` between the two means and its tangents beyond them, so that it rises along the whole line.

    With unequal variances the ratio itself falls again far out, and the farthest samples would count as clean.
    """
    main, suspicious = mixture.mean_2
    inner_B = place_B.clamp(torch.minimum(main, suspicious), torch.maximum(main, suspicious))
    gap, var_2 = suspicious - main, mixture.sd_2.square()
    slope_B = torch.where((place_B - suspicious) * gap > 0, gap / var_2[0], gap / var_2[1])
    return mixture_log_odds(mixture, inner_B) + (place_B - inner_B) * slope_B


def swapped(mixture: Mixture) -> Mixture:
    """The same mixture with its components in the other order."""
    return Mixture(*(value_2.flip(0) for value_2 in mixture))
