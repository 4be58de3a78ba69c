"""RobustRealNVP (B. Liu, "Robust Learning of Deep Neural Networks under Data Corruption", 2022, chapter 3,
Algorithm 2): density estimation when the training data holds the anomalies.

A flow of affine couplings (Dinh et al., 2016) carries a row x to z; each coupling leaves d of the columns as they are
and changes the others by two small networks of those d:
    y_1:d = x_1:d,   y_d+1:D = x_d+1:D * exp(s(x_1:d)) + t(x_1:d),   log p(x) = log N(z; 0, I) + sum of all s.
s ends in a tanh, so that a coupling scales by at most e. The score of a row is -log p of its standardised columns.

Two things keep anomalies out of the density. In each mini-batch the share eps of the rows with the lowest density is
left out of the gradient. And every linear layer has the spectral norm k, W <- k W / ||W||_op, so that the density is
smooth and cannot rise on a small cluster alone. Without the second it is the chapter's TrimRealNVP, without both
RealNVP.

The networks of one fit, and of several independent fits, are one stack of weights.

Shapes: G independent fits; T couplings; N rows, B of a batch; D columns, d = D // 2 of them unchanged by a coupling;
H units of a hidden layer. In a stack of networks the first G are s, the last G are t.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor
from torch.nn.functional import normalize, relu

from sanitize import exact
from sanitize.errors import ConfigError, DataError, NumericsError
from sanitize.score.scaling import Scaling, scale_all

Layers = list[tuple[Tensor, Tensor]]  # weight (T, 2G, in, out) and bias (T, 2G, 1, out) of each
Affine = Callable[[Tensor, Tensor, Tensor], Tensor]  # bias, rows, weight -> rows @ weight + bias
Total = Callable[[Tensor, int], Tensor]  # numbers, dimension -> their sum over it

_SCORED = 256  # rows that are scored at once


class RobustRealNVPConfig(BaseModel):
    """RobustRealNVP. The chapter's text gives no sizes: these are one choice for all data.

    Attributes:
        contamination: eps, the expected share of anomalies; 0 trains on all rows.
        lipschitz: k, the spectral norm of every linear layer; None leaves the layers free (TrimRealNVP).
        n_couplings: T.
        widths: hidden layers of s and of t.
        epochs: passes over the data; fewer where `max_steps` ends training first.
        max_steps: bound on the number of mini-batches.
        batch_size: rows of a mini-batch, about: an epoch is divided into equal ones.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        clip_norm: length to which the gradient of a fit is shortened.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contamination: float = Field(default=0.1, ge=0, le=0.5)
    lipschitz: float | None = Field(default=1.0, gt=0)
    n_couplings: int = Field(default=4, ge=2)
    widths: tuple[int, ...] = (64, 64)
    epochs: int = Field(default=100, ge=1)
    max_steps: int = Field(default=1_000, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=10.0, gt=0)


@dataclass(frozen=True)
class Fitted:
    """What one fit leaves: the scaling, the order of the columns before each coupling, and the layers as they are
    applied (normalised)."""

    scaling: Scaling
    orders_TD: Tensor
    layers: Layers


class RobustRealNVP:
    """Estimator: `RobustRealNVP(config).fit(x_ND).score(x_ND)`; a higher score is more suspicious."""

    def __init__(self, config: RobustRealNVPConfig | None = None) -> None:
        self.config = config or RobustRealNVPConfig()
        self._fitted: Fitted | None = None

    def fit(self, x_ND: Tensor | np.ndarray, seed: int = 0) -> Self:
        """Train on rows of real numbers; NaN is a missing value.

        Raises:
            DataError: no rows, fewer than two columns, a column without a value, an infinite value.
            NumericsError: training diverged.
        """
        (self._fitted,) = _fit(self.config, [x_ND], [seed])
        return self

    @classmethod
    def fit_many(
        cls, config: RobustRealNVPConfig, data: Sequence[Tensor | np.ndarray], seeds: Sequence[int]
    ) -> list[Self]:
        """Independent fits of equally many rows and columns, trained at once; each is what `fit` alone would give, to
        rounding. Raises what `fit` does, and ConfigError where shapes differ."""
        models = [cls(config) for _ in data]
        for model, fitted in zip(models, _fit(config, data, seeds), strict=True):
            model._fitted = fitted
        return models

    @property
    def missing_fraction(self) -> float:
        """Share of missing values in what it was fitted on; they were replaced by column means."""
        return self._state().scaling.missing_fraction

    @torch.no_grad()
    def score(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Negative log densities (N,), in nats, float32, finite. Missing values are the means of the training rows;
        values that lie more than a million standard deviations out count as if they lay there.

        Raises:
            ConfigError: not fitted yet.
            DataError: other columns than in training, or an infinite value.
        """
        state = self._state()
        x_ND = state.scaling.rows(x_ND)
        scores_N = torch.empty(len(x_ND))
        # Blocks are always full: torch may compute functions like tanh by other code in the last numbers of a tensor.
        x_GBD = torch.zeros(1, _SCORED, x_ND.shape[1])
        for start in range(0, len(x_ND), _SCORED):
            block = x_ND[start : start + _SCORED]
            x_GBD[0, : len(block)] = state.scaling.apply(block)
            z_GBD, log_det_GB = forward(state.layers, state.orders_TD[None], x_GBD, exact.baddbmm, exact.total)
            # float64: the square of a value that is far out is more than float32 holds.
            scores_B = -log_density(z_GBD.double(), log_det_GB, exact.total)[0, : len(block)]
            scores_N[start : start + len(block)] = scores_B.clamp(max=torch.finfo(torch.float32).max)
        return scores_N

    def _state(self) -> Fitted:
        if self._fitted is None:
            raise ConfigError("the model is not fitted yet: call fit() or load_state() first")
        return self._fitted

    def state_dict(self) -> dict[str, Tensor]:
        """All that scoring needs, lossless."""
        state = self._state()
        tensors = state.scaling.state_dict()
        tensors["orders"] = state.orders_TD
        for i, (weight, bias) in enumerate(state.layers):
            tensors |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        n_layers = sum(name.endswith(".weight") for name in state)
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in range(n_layers)]
        self._fitted = Fitted(Scaling.from_state(state), state["orders"], layers)
        return self


def forward(
    layers: Layers, orders_GTD: Tensor, x_GBD: Tensor, affine: Affine = torch.baddbmm, total: Total = torch.sum
) -> tuple[Tensor, Tensor]:
    """The flow: z (G, B, D), and the logarithm (G, B) of the determinant of its Jacobian.

    Args:
        layers: of s and t.
        orders_GTD: columns of the coupling before, in the order in which each coupling takes them.
        x_GBD: standardised rows.
        affine, total: products and sums; those of `sanitize.exact` give each row bits of its own.
    """
    n_columns = x_GBD.shape[-1]
    log_det_GB = x_GBD.new_zeros(x_GBD.shape[:2])
    couplings = zip(*(zip(weight.unbind(), bias.unbind(), strict=True) for weight, bias in layers), strict=True)
    for order_GD, coupling in zip(orders_GTD.unbind(1), couplings, strict=True):
        x_GBD = x_GBD.gather(-1, order_GD[:, None].expand_as(x_GBD))
        given, changed = x_GBD.split([n_columns // 2, n_columns - n_columns // 2], dim=-1)
        h = given.repeat(2, 1, 1)
        for i, (weight, bias) in enumerate(coupling):
            h = affine(bias, relu(h) if i else h, weight)
        s, t = h.chunk(2)
        s = s.tanh()
        x_GBD = torch.cat([given, changed * s.exp() + t], -1)
        log_det_GB = log_det_GB + total(s, -1)
    return x_GBD, log_det_GB


def log_density(z_GBD: Tensor, log_det_GB: Tensor, total: Total = torch.sum) -> Tensor:
    """log p (G, B) of the rows that the flow carried to z, under a standard normal base."""
    return log_det_GB - (total(z_GBD.square(), -1) + z_GBD.shape[-1] * math.log(2 * math.pi)) / 2


def spectrally_normalised(weight: Tensor, left: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Weights (..., in, out) scaled to a spectral norm of about `norm` by one step of the power iteration.

    Args:
        left: (..., 1, in), the estimate of the top left singular vector so far.

    Returns:
        The weights, and the better estimate. The singular vectors are constants to the gradient (Miyato et al., 2018).
    """
    with torch.no_grad():
        right = normalize(left @ weight, dim=-1)
        left = normalize(right @ weight.mT, dim=-1)
    return weight * (norm / (left @ weight @ right.mT)), left


def _fit(config: RobustRealNVPConfig, data: Sequence[Tensor | np.ndarray], seeds: Sequence[int]) -> list[Fitted]:
    """Train one stack, and take it apart."""
    scalings, scaled = scale_all(data)
    if scaled[0].shape[1] == 1:
        raise DataError("a coupling needs at least two columns, not 1")
    generators = [Generator().manual_seed(seed) for seed in seeds]
    n_columns = scaled[0].shape[1]
    orders_GTD = torch.stack([_column_orders(config.n_couplings, n_columns, generator) for generator in generators])
    layers = _train(config, _initial(config, n_columns, generators), orders_GTD, scaled, generators)
    if not all(tensor.isfinite().all() for layer in layers for tensor in layer):
        raise NumericsError("RobustRealNVP: training diverged; lower learning_rate")
    n_fits = len(scalings)
    return [
        Fitted(scaling, orders_TD, [(w[:, g::n_fits].contiguous(), b[:, g::n_fits].contiguous()) for w, b in layers])
        for g, (scaling, orders_TD) in enumerate(zip(scalings, orders_GTD, strict=True))
    ]


def _column_orders(n_couplings: int, n_columns: int, generator: Generator) -> Tensor:
    """(T, D): couplings come in pairs, one that takes the columns in random order and one that changes what it left."""
    n_given = n_columns // 2
    swapped = torch.arange(n_columns).roll(-n_given)
    return torch.stack(
        [swapped if i % 2 else torch.randperm(n_columns, generator=generator) for i in range(n_couplings)]
    )


def _initial(config: RobustRealNVPConfig, n_columns: int, generators: Sequence[Generator]) -> Layers:
    """Uniform in +-1 / sqrt(inputs), as torch.nn.Linear is."""
    n_given = n_columns // 2
    sizes = (n_given, *config.widths, n_columns - n_given)

    def drawn(bound: float, *shape: int) -> Tensor:
        own = [torch.empty(config.n_couplings, 2, *shape).uniform_(-bound, bound, generator=g) for g in generators]
        return torch.stack(own, 2).flatten(1, 2)

    return [(drawn(n**-0.5, n, m), drawn(n**-0.5, 1, m)) for n, m in pairwise(sizes)]


def _train(
    config: RobustRealNVPConfig,
    layers: Layers,
    orders_GTD: Tensor,
    data: Sequence[Tensor],
    generators: Sequence[Generator],
) -> Layers:
    """Algorithm 2 in every step of AdamW. Returns the layers as they are to be applied."""
    parameters = [tensor.requires_grad_() for layer in layers for tensor in layer]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    lefts = [torch.ones_like(weight[..., :1]).mT for weight, _ in layers]
    for x_GBD in islice(_batches(config, data, generators), config.max_steps):
        applied = layers
        if config.lipschitz is not None:
            applied, lefts = _normalise(layers, lefts, config.lipschitz)
        n_trimmed = round(config.contamination * x_GBD.shape[1])
        loss = trimmed_loss(log_density(*forward(applied, orders_GTD, x_GBD)), n_trimmed)
        gradients = _clipped(torch.autograd.grad(loss, parameters), len(data), config.clip_norm)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    layers = [(weight.detach(), bias.detach()) for weight, bias in layers]
    if config.lipschitz is None:
        return layers
    # Power iteration comes from below: at the end the norm is made exact.
    return [(w * (config.lipschitz / torch.linalg.matrix_norm(w, 2, keepdim=True)), b) for w, b in layers]


def _batches(config: RobustRealNVPConfig, data: Sequence[Tensor], generators: Sequence[Generator]) -> Iterator[Tensor]:
    """Mini-batches (G, B, D) of all epochs."""
    n_rows = len(data[0])
    n_batches = max(1, round(n_rows / config.batch_size))
    size = n_rows // n_batches  # equal batches; the few rows that are left over change from epoch to epoch
    for _ in range(config.epochs):
        orders = [torch.randperm(n_rows, generator=generator) for generator in generators]
        for start in range(0, n_batches * size, size):
            yield torch.stack([x_ND[order[start : start + size]] for x_ND, order in zip(data, orders, strict=True)])


def _normalise(layers: Layers, lefts: Sequence[Tensor], norm: float) -> tuple[Layers, list[Tensor]]:
    pairs = [spectrally_normalised(weight, left, norm) for (weight, _), left in zip(layers, lefts, strict=True)]
    return [(weight, bias) for (weight, _), (_, bias) in zip(pairs, layers, strict=True)], [left for _, left in pairs]


def trimmed_loss(log_density_GB: Tensor, n_trimmed: int) -> Tensor:
    """Sum over the fits of the mean negative log density of all but the `n_trimmed` rows of lowest density."""
    n_kept = max(1, log_density_GB.shape[1] - n_trimmed)
    return -log_density_GB.topk(n_kept, dim=-1).values.mean(-1).sum()


def _clipped(gradients: Sequence[Tensor], n_fits: int, length: float) -> list[Tensor]:
    """The gradients, those of each fit shortened to at most `length`."""
    squares = [gradient.unflatten(1, (2, n_fits)).square().sum((0, 1, 3, 4)) for gradient in gradients]
    norm_G = torch.stack(squares).sum(0).sqrt()
    factor_G = (length / norm_G.clamp(min=1e-12)).clamp(max=1)
    return [gradient * factor_G.repeat(2)[:, None, None] for gradient in gradients]
