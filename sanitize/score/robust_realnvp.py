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

All networks are one stack of weights. Shapes: T couplings, of two networks (s, t) each; N rows, B of a batch; D
columns, d = D // 2 of them unchanged by a coupling.
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain, islice, pairwise
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor
from torch.nn.functional import normalize, relu

from sanitize import exact
from sanitize.errors import DataError
from sanitize.score.estimator import Affine, Estimator, Fitted, Layers, epoch, refuse_diverged, uniform_layers
from sanitize.score.scaling import scaled

Total = Callable[[Tensor, int], Tensor]  # numbers, dimension -> their sum over it

_SCORED = 256  # rows scored at once


class RobustRealNVPConfig(BaseModel):
    """RobustRealNVP. The chapter's text gives no sizes: these are one choice for all data.

    Attributes:
        contamination: eps, expected share of anomalies; 0 trains on all rows.
        lipschitz: k, spectral norm of every linear layer; None leaves the layers free (TrimRealNVP).
        n_couplings: T.
        widths: hidden layers of s and of t.
        epochs: passes over the data; fewer where `max_steps` ends training first.
        max_steps: bound on the number of mini-batches.
        batch_size: rows of a mini-batch, about: an epoch is divided into equal ones.
        learning_rate: step size of AdamW.
        weight_decay: weight decay of AdamW.
        clip_norm: length to which the gradient is shortened.
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

    def build(self) -> "RobustRealNVP":
        """The estimator, not fitted yet."""
        return RobustRealNVP(self)


class RobustRealNVP(Estimator):
    """Estimator: `RobustRealNVP(config).fit(x_ND).score(x_ND)`; a higher score is more suspicious."""

    def __init__(self, config: RobustRealNVPConfig | None = None) -> None:
        super().__init__()
        self.config = config or RobustRealNVPConfig()

    def fit(self, x_ND: Tensor | np.ndarray, seed: int = 0) -> Self:
        """Train on rows of real numbers; NaN is a missing value.

        Raises:
            DataError: no rows, fewer than two columns, a column without a value, an infinite value.
            NumericsError: training diverged.
        """
        config, generator = self.config, Generator().manual_seed(seed)
        scaling, x_ND = scaled(x_ND)
        n_columns = x_ND.shape[1]
        if n_columns == 1:
            raise DataError("a coupling needs at least two columns, not 1")
        orders_TD = _column_orders(config.n_couplings, n_columns, generator)
        n_given = n_columns // 2
        sizes = pairwise((n_given, *config.widths, n_columns - n_given))
        layers = uniform_layers((config.n_couplings, 2), sizes, generator)
        layers = _train(config, layers, orders_TD, x_ND, generator)
        refuse_diverged(layers, "RobustRealNVP")
        self._fitted = Fitted(scaling, layers, {"orders": orders_TD})
        return self

    @property
    def drawn_names(self) -> list[str]:
        """Name of the column orders (T, D)."""
        return ["orders"]

    @torch.no_grad()
    def score(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Negative log densities (N,), in nats, float32, finite. Missing values are the means of the training rows;
        values more than a million standard deviations out are moved to that distance.

        Raises:
            ConfigError: not fitted yet.
            DataError: other columns than in training, or an infinite value.
        """
        state = self._state()
        x_ND = state.scaling.rows(x_ND)
        scores_N = torch.empty(len(x_ND))
        # Blocks are always full: torch may compute functions like tanh by other code in the last numbers of a tensor.
        x_BD = torch.zeros(_SCORED, x_ND.shape[1])
        for start in range(0, len(x_ND), _SCORED):
            block = x_ND[start : start + _SCORED]
            x_BD[: len(block)] = state.scaling.apply(block)
            z_BD, log_det_B = forward(state.layers, state.drawn["orders"], x_BD, exact.baddbmm, exact.total)
            # float64: the square of a value that is far out is more than float32 holds.
            scores_B = -log_density(z_BD.double(), log_det_B, exact.total)[: len(block)]
            scores_N[start : start + len(block)] = scores_B.clamp(max=torch.finfo(torch.float32).max)
        return scores_N


def forward(
    layers: Layers, orders_TD: Tensor, x_BD: Tensor, affine: Affine = torch.baddbmm, total: Total = torch.sum
) -> tuple[Tensor, Tensor]:
    """The flow: z (B, D), and the logarithm (B,) of the determinant of its Jacobian.

    Args:
        layers: weights (T, 2, in, out) and biases of s and t.
        orders_TD: order in which each coupling takes the columns that the coupling before returned.
        x_BD: standardised rows.
        affine: products; those of `sanitize.exact` give each row the same bits in every batch.
        total: sums, likewise.
    """
    n_columns = x_BD.shape[1]
    log_det_B = x_BD.new_zeros(len(x_BD))
    couplings = zip(*(zip(weight.unbind(), bias.unbind(), strict=True) for weight, bias in layers), strict=True)
    for order_D, coupling in zip(orders_TD.unbind(), couplings, strict=True):
        x_BD = x_BD.gather(1, order_D.expand_as(x_BD))
        given, changed = x_BD.split([n_columns // 2, n_columns - n_columns // 2], dim=1)
        h = given.repeat(2, 1, 1)
        for i, (weight, bias) in enumerate(coupling):
            h = affine(bias, relu(h) if i else h, weight)
        s, t = h
        s = s.tanh()
        x_BD = torch.cat([given, changed * s.exp() + t], 1)
        log_det_B = log_det_B + total(s, -1)
    return x_BD, log_det_B


def log_density(z_BD: Tensor, log_det_B: Tensor, total: Total = torch.sum) -> Tensor:
    """log p (B,) of the rows that the flow carried to z, under a standard normal base."""
    return log_det_B - (total(z_BD.square(), -1) + z_BD.shape[1] * math.log(2 * math.pi)) / 2


def spectrally_normalised(weight: Tensor, left: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Weights (..., in, out) scaled to a spectral norm of about `norm` by one step of the power iteration.

    Args:
        weight: weights (..., in, out).
        left: estimate so far of the top left singular vector (..., 1, in).
        norm: spectral norm.

    Returns:
        The weights, and the better estimate. The singular vectors are constants to the gradient (Miyato et al., 2018).
    """
    with torch.no_grad():
        right = normalize(left @ weight, dim=-1)
        left = normalize(right @ weight.mT, dim=-1)
    return weight * (norm / (left @ weight @ right.mT)), left


def _column_orders(n_couplings: int, n_columns: int, generator: Generator) -> Tensor:
    """(T, D): couplings come in pairs, one that takes the columns in random order and one that changes what it left."""
    n_given = n_columns // 2
    swapped = torch.arange(n_columns).roll(-n_given)
    return torch.stack(
        [swapped if i % 2 else torch.randperm(n_columns, generator=generator) for i in range(n_couplings)]
    )


def _train(
    config: RobustRealNVPConfig, layers: Layers, orders_TD: Tensor, x_ND: Tensor, generator: Generator
) -> Layers:
    """Algorithm 2 in every step of AdamW. Returns the layers with their final norm."""
    parameters = [tensor.requires_grad_() for layer in layers for tensor in layer]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    lefts = [torch.ones_like(weight[..., :1]).mT for weight, _ in layers]
    batches = chain.from_iterable(epoch(x_ND, config.batch_size, generator) for _ in range(config.epochs))
    for x_BD in islice(batches, config.max_steps):
        applied = layers
        if config.lipschitz is not None:
            applied, lefts = _normalise(layers, lefts, config.lipschitz)
        n_trimmed = round(config.contamination * len(x_BD))
        loss = trimmed_loss(log_density(*forward(applied, orders_TD, x_BD)), n_trimmed)
        gradients = _clipped(torch.autograd.grad(loss, parameters), config.clip_norm)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    layers = [(weight.detach(), bias.detach()) for weight, bias in layers]
    if config.lipschitz is None:
        return layers
    # Power iteration comes from below: at the end the norm is made exact.
    return [(w * (config.lipschitz / torch.linalg.matrix_norm(w, 2, keepdim=True)), b) for w, b in layers]


def _normalise(layers: Layers, lefts: Sequence[Tensor], norm: float) -> tuple[Layers, list[Tensor]]:
    pairs = [spectrally_normalised(weight, left, norm) for (weight, _), left in zip(layers, lefts, strict=True)]
    return [(weight, bias) for (weight, _), (_, bias) in zip(pairs, layers, strict=True)], [left for _, left in pairs]


def trimmed_loss(log_density_B: Tensor, n_trimmed: int) -> Tensor:
    """Mean negative log density of all but the `n_trimmed` rows of lowest density."""
    return -log_density_B.topk(max(1, len(log_density_B) - n_trimmed)).values.mean()


def _clipped(gradients: Sequence[Tensor], length: float) -> list[Tensor]:
    """The gradients, together shortened to at most `length`."""
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    factor = (length / norm.clamp(min=1e-12)).clamp(max=1)
    return [gradient * factor for gradient in gradients]
