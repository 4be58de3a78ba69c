"""Robust Collaborative Autoencoders (B. Liu, "Robust Learning of Deep Neural Networks under Data Corruption", 2022,
chapter 2, Algorithm 1): anomaly detection when the training data holds the anomalies.

k autoencoders learn together. From each mini-batch each picks, without dropout, the share beta that it reconstructs
best, and is updated, with dropout, on what another one picked. beta starts at 1; after each epoch
    beta <- max(beta - eps / (alpha max_epoch), 1 - eps),   eps = contamination.
The score of a row is its squared reconstruction error, averaged over v forward passes with dropout, the networks and
the columns.

The v dropout masks of scoring are drawn once, when the model is fitted, and are part of its state: a score depends on
the state and the row alone. The networks of one fit, and of several independent fits, are one stack of weights.

Shapes: G independent fits, k networks of each, M = G k in the stack; N rows, B of a batch, P of them picked; D columns,
H units of a hidden layer, v passes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor
from torch.nn.functional import leaky_relu

from sanitize import exact
from sanitize.errors import ConfigError, NumericsError
from sanitize.score.scaling import Scaling, scale_all

Layers = list[tuple[Tensor, Tensor]]  # weight (M, in, out) and bias (M, 1, out) of each
Affine = Callable[[Tensor, Tensor, Tensor], Tensor]  # bias, rows, weight -> rows @ weight + bias

_SLOPE = 0.1  # of the leaky ReLUs
_SCORED = 16  # rows that are scored at once: their hidden units of all passes stay in the cache


class RCAConfig(BaseModel):
    """Robust collaborative autoencoders. The chapter gives no sizes: these are one choice for all data.

    Attributes:
        contamination: eps, the expected share of anomalies. It may be wrong by 0.1 (Table 2.3); too much costs less
            than too little, so the default is rather high.
        n_networks: k. A single one picks for itself.
        select: False trains on all rows (RCA-SS); with one network and no ensemble this is the plain autoencoder.
        ensemble: False scores by one pass without dropout (RCA-E).
        variational: variational autoencoders (RCVA); they pick and score by the error at the mean code.
        widths: hidden layers of the encoder; the decoder mirrors them.
        n_codes: size of the bottleneck.
        dropout: r, after each hidden layer.
        n_passes: v.
        alpha: share of the epochs in which beta comes down to 1 - eps.
        epochs: passes over the data; fewer where `max_steps` ends training first.
        max_steps: bound on the number of mini-batches.
        batch_size: rows of a mini-batch, about: an epoch is divided into equal ones.
        learning_rate: of Adam.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contamination: float = Field(default=0.1, ge=0, le=0.5)
    n_networks: int = Field(default=2, ge=1)
    select: bool = True
    ensemble: bool = True
    variational: bool = False
    widths: tuple[int, ...] = Field(default=(64, 64), min_length=1)
    n_codes: int = Field(default=10, ge=1)
    dropout: float = Field(default=0.5, ge=0, le=0.95)
    n_passes: int = Field(default=50, ge=1)
    alpha: float = Field(default=0.5, gt=0, le=1)
    epochs: int = Field(default=100, ge=1)
    max_steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


@dataclass(frozen=True)
class Fitted:
    """What one fit leaves: the scaling, the layers of its k networks, and for each hidden layer the dropout masks of
    scoring, bool (k, v, H)."""

    scaling: Scaling
    layers: Layers
    masks: list[Tensor]


class RCA:
    """Estimator: `RCA(config).fit(x_ND).score(x_ND)`; a higher score is more suspicious."""

    def __init__(self, config: RCAConfig | None = None) -> None:
        self.config = config or RCAConfig()
        self._fitted: Fitted | None = None

    def fit(self, x_ND: Tensor | np.ndarray, seed: int = 0) -> Self:
        """Train on rows of real numbers; NaN is a missing value.

        Raises:
            DataError: no rows or no columns, a column without a value, an infinite value.
            NumericsError: training diverged.
        """
        (self._fitted,) = _fit(self.config, [x_ND], [seed])
        return self

    @classmethod
    def fit_many(cls, config: RCAConfig, data: Sequence[Tensor | np.ndarray], seeds: Sequence[int]) -> list[Self]:
        """Independent fits of equally many rows and columns, trained at once; each is what `fit` alone would give, to
        rounding. Raises what `fit` does."""
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
        """Scores (N,), float32, finite, >= 0. Missing values are the means of the rows it was fitted on.

        Raises:
            ConfigError: not fitted yet.
            DataError: other columns than in training, or an infinite value.
        """
        state = self._state()
        x_ND = state.scaling.rows(x_ND)
        masks = self._scoring_masks(state)
        scores_N = torch.empty(len(x_ND))
        for start in range(0, len(x_ND), _SCORED):
            block = x_ND[start : start + _SCORED]
            scores_N[start : start + len(block)] = _errors(state.layers, state.scaling.apply(block), masks)
        return scores_N

    def _scoring_masks(self, state: Fitted) -> list[Tensor]:
        """For each hidden layer (k, v, H): the mask of a pass is the same for every row."""
        if not self.config.ensemble or not self.config.dropout:
            return []
        return [mask_kvH.float() / (1 - self.config.dropout) for mask_kvH in state.masks]

    def _state(self) -> Fitted:
        if self._fitted is None:
            raise ConfigError("the model is not fitted yet: call fit() or load_state() first")
        return self._fitted

    def state_dict(self) -> dict[str, Tensor]:
        """All that scoring needs, lossless."""
        state = self._state()
        tensors = state.scaling.state_dict()
        for i, (weight, bias) in enumerate(state.layers):
            tensors |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
        return tensors | {f"masks.{i}": mask for i, mask in enumerate(state.masks)}

    def load_state(self, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        n_layers = sum(name.endswith(".weight") for name in state)
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in range(n_layers)]
        masks = [state[f"masks.{i}"] for i in range(n_layers - 2)]
        self._fitted = Fitted(Scaling.from_state(state), layers, masks)
        return self


def n_steps(config: RCAConfig, n_rows: int) -> tuple[int, int]:
    """Mini-batches of an epoch, and epochs."""
    n_batches = max(1, round(n_rows / config.batch_size))
    return n_batches, max(1, min(config.epochs, config.max_steps // n_batches))


def selected_fractions(contamination: float, alpha: float, epochs: int) -> list[float]:
    """beta of each epoch."""
    step = contamination / (alpha * epochs)
    betas = [1.0]
    while len(betas) < epochs:
        betas.append(max(betas[-1] - step, 1 - contamination))
    return betas


def pick(errors_GkB: Tensor, n_picked: int, shift_G: Tensor) -> Tensor:
    """Rows (G, k, P) each network is given: those that the one `shift` places before it reconstructs best."""
    picked_GkP = errors_GkB.topk(n_picked, dim=-1, largest=False).indices
    k = errors_GkB.shape[1]
    giver_Gk = (torch.arange(k) - shift_G[:, None]) % k
    return picked_GkP.gather(1, giver_Gk[..., None].expand_as(picked_GkP))


def forward(
    layers: Layers, x_MBD: Tensor, masks: Sequence[Tensor] = (), noise_MBC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reconstruction, and the divergence of the code from its prior (0 without noise).

    Args:
        layers: the middle one of them gives the code; with noise, or where it gives twice as many numbers as the next
            one takes, mean and log-variance of the code.
        x_MBD: a batch for each network.
        masks: what each hidden layer (M, B, H) is multiplied by; (M, v B, H) repeats the batch v times.
        noise_MBC: standard normal, for codes that are drawn.
    """
    hidden_MBH, divergence = _last_hidden(layers, x_MBD, masks, noise_MBC, torch.baddbmm)
    weight, bias = layers[-1]
    return torch.baddbmm(bias, hidden_MBH, weight), divergence


def _last_hidden(
    layers: Layers, x_MBD: Tensor, masks: Sequence[Tensor], noise_MBC: Tensor | None, affine: Affine
) -> tuple[Tensor, Tensor]:
    middle = len(layers) // 2 - 1
    divergence = x_MBD.new_zeros(())
    for i, (weight, bias) in enumerate(layers[:-1]):
        x_MBD = affine(bias, x_MBD, weight)
        if i == middle:
            n_codes = layers[i + 1][0].shape[1]
            mean_MBC, log_variance_MBC = x_MBD[..., :n_codes], x_MBD[..., n_codes:].clamp(-10, 10)
            x_MBD = mean_MBC
            if noise_MBC is not None:
                x_MBD = mean_MBC + (log_variance_MBC / 2).exp() * noise_MBC
                divergence = (mean_MBC.square() + log_variance_MBC.exp() - 1 - log_variance_MBC).sum(-1) / 2
            continue
        x_MBD = leaky_relu(x_MBD, _SLOPE)
        if masks:
            mask = masks[i if i < middle else i - 1]
            if len(mask[0]) > len(x_MBD[0]):  # dropout comes behind the first layer, so all passes share that
                x_MBD = x_MBD.repeat(1, len(mask[0]) // len(x_MBD[0]), 1)
            x_MBD = x_MBD * mask
    return x_MBD, divergence


def _errors(layers: Layers, x_BD: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Scores (B,) of scaled rows.

    The passes differ in the last hidden layer h only, and the last layer is linear, so with h = mean + d
        mean_v ||h W + b - x||^2 = ||mean W + b - x||^2 + mean_v d (W W^T) d^T,
    which multiplies with H columns in each pass, not with D.
    """
    k, n_rows = len(layers[0][0]), len(x_BD)
    masks = [mask_kvH.repeat_interleave(n_rows, 1) for mask_kvH in masks]
    hidden_MvH, _ = _last_hidden(layers, x_BD.expand(k, -1, -1), masks, None, exact.baddbmm)
    weight, bias = layers[-1]
    hidden_MvBH = hidden_MvH.view(k, -1, n_rows, weight.shape[1])
    n_passes = hidden_MvBH.shape[1]
    mean_MBH = exact.total(hidden_MvBH, 1) / n_passes
    error_MB = exact.total((exact.baddbmm(bias, mean_MBH, weight) - x_BD).square())
    apart_MvH = (hidden_MvBH - mean_MBH[:, None]).flatten(1, 2)
    nothing = torch.zeros(())
    turned_MvH = exact.baddbmm(nothing, apart_MvH, exact.baddbmm(nothing, weight, weight.mT))
    spread_MvB = exact.total(turned_MvH * apart_MvH).view(k, n_passes, n_rows)
    return exact.total(error_MB + exact.total(spread_MvB, 1) / n_passes, 0) / (k * x_BD.shape[1])


def _fit(config: RCAConfig, data: Sequence[Tensor | np.ndarray], seeds: Sequence[int]) -> list[Fitted]:
    """Train one stack, and take it apart."""
    scalings, scaled = scale_all(data, equal="range")
    generators = [Generator().manual_seed(seed) for seed in seeds]
    layers = _initial(config, scaled[0].shape[1], generators)
    _train(config, layers, scaled, generators)
    k = config.n_networks
    fits = []
    for g, (scaling, generator) in enumerate(zip(scalings, generators, strict=True)):
        own = [(w[g * k : (g + 1) * k].detach().clone(), b[g * k : (g + 1) * k].detach().clone()) for w, b in layers]
        if not all(tensor.isfinite().all() for layer in own for tensor in layer):
            raise NumericsError("RCA: training diverged; lower learning_rate")
        masks = [
            torch.empty(k, config.n_passes, width).bernoulli_(1 - config.dropout, generator=generator).bool()
            for width in _hidden_widths(config)
        ]
        fits.append(Fitted(scaling, own, masks))
    return fits


def _hidden_widths(config: RCAConfig) -> tuple[int, ...]:
    return config.widths + config.widths[::-1]


def _initial(config: RCAConfig, n_columns: int, generators: Sequence[Generator]) -> Layers:
    """Uniform in +-1 / sqrt(inputs), as torch.nn.Linear is."""
    code = config.n_codes * (2 if config.variational else 1)
    inputs = (n_columns, *config.widths, config.n_codes, *config.widths[::-1])
    outputs = (*config.widths, code, *config.widths[::-1], n_columns)
    k = config.n_networks

    def drawn(bound: float, *shape: int) -> Tensor:
        return torch.cat([torch.empty(k, *shape).uniform_(-bound, bound, generator=g) for g in generators])

    return [
        (drawn(n**-0.5, n, m).requires_grad_(), drawn(n**-0.5, 1, m).requires_grad_())
        for n, m in zip(inputs, outputs, strict=True)
    ]


def _train(config: RCAConfig, layers: Layers, data: Sequence[Tensor], generators: Sequence[Generator]) -> None:
    """Algorithm 1, training phase; changes the layers in place."""
    n_rows = len(data[0])
    n_batches, epochs = n_steps(config, n_rows)
    size = n_rows // n_batches  # equal batches; the few rows that are left over change from epoch to epoch
    contamination = config.contamination if config.select else 0.0
    parameters = [tensor for layer in layers for tensor in layer]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    for beta in selected_fractions(contamination, config.alpha, epochs):
        n_picked = max(1, math.floor(beta * size + 1e-9))
        orders = [torch.randperm(n_rows, generator=generator) for generator in generators]
        for start in range(0, n_batches * size, size):
            x_GBD = torch.stack([x_ND[order[start : start + size]] for x_ND, order in zip(data, orders, strict=True)])
            loss = _loss(config, layers, x_GBD, n_picked, generators)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _loss(config: RCAConfig, layers: Layers, x_GBD: Tensor, n_picked: int, generators: Sequence[Generator]) -> Tensor:
    """Sum over all networks of the mean loss of the rows each is given."""
    k, (n_fits, size, n_columns) = config.n_networks, x_GBD.shape
    x_MBD = x_GBD[:, None].expand(-1, k, -1, -1).reshape(-1, size, n_columns)
    if not config.dropout and not config.variational:
        # Then the pass that picks is the pass that trains.
        errors_GkB = (forward(layers, x_MBD)[0] - x_MBD).square().sum(-1).view(n_fits, k, size)
        given_GkP = pick(errors_GkB.detach(), n_picked, _shifts(k, generators))
        return errors_GkB.gather(2, given_GkP).mean(-1).sum() / 2
    if n_picked < size:
        with torch.no_grad():
            errors_GkB = (forward(layers, x_MBD)[0] - x_MBD).square().sum(-1).view(n_fits, k, size)
        given_MP1 = pick(errors_GkB, n_picked, _shifts(k, generators)).view(-1, n_picked, 1)
        x_MBD = x_MBD.gather(1, given_MP1.expand(-1, -1, n_columns))
    masks = [_drawn_masks(config.dropout, generators, k, n_picked, width) for width in _hidden_widths(config)]
    noise = None
    if config.variational:
        noise = torch.cat([torch.randn(k, n_picked, config.n_codes, generator=g) for g in generators])
    output_MPD, divergence = forward(layers, x_MBD, masks, noise)
    return ((output_MPD - x_MBD).square().sum(-1) / 2 + divergence).mean(-1).sum()


def _drawn_masks(dropout: float, generators: Sequence[Generator], *shape: int) -> Tensor:
    """0 with probability `dropout` (to 1/256), else what keeps the mean at 1; (M, P, H)."""
    n, threshold = math.prod(shape), round(256 * dropout)
    # Eight masks of each random number: drawn one by one they would cost half of the training time.
    words = [torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), None, generator=g) for g in generators]
    kept = torch.stack(words).view(torch.uint8)[:, :n] >= threshold
    return kept.float().mul_(256 / (256 - threshold)).view(-1, *shape[1:])


def _shifts(k: int, generators: Sequence[Generator]) -> Tensor:
    """How many places picks are handed on, for each fit: any other network is as likely as the next."""
    if k == 1:
        return torch.zeros(len(generators), dtype=torch.int64)
    return torch.cat([torch.randint(1, k, (1,), generator=generator) for generator in generators])
