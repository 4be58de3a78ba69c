"""Robust Collaborative Autoencoders (B. Liu, "Robust Learning of Deep Neural Networks under Data Corruption", 2022,
chapter 2, Algorithm 1): anomaly detection when the training data holds the anomalies.

k autoencoders learn together. From each mini-batch each picks, without dropout, the share beta that it reconstructs
best, and is updated, with dropout, on the picks of another network. beta starts at 1; after each epoch
    beta <- max(beta - eps / (alpha max_epoch), 1 - eps),   eps = contamination.
The score of a row is its squared reconstruction error, averaged over v forward passes with dropout, the networks and
the columns.

The v dropout masks of scoring are drawn once, when the model is fitted, and are part of its state: a score depends on
the state and the row alone. The k networks are one stack of weights.

Shapes: k networks; N rows, B of a batch, P of them picked; D columns, C codes, H units of a hidden layer, v passes.
"""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor
from torch.nn.functional import leaky_relu

from sanitize import exact
from sanitize.score.estimator import (
    Affine,
    Estimator,
    Fitted,
    Layers,
    epoch,
    n_batches,
    refuse_diverged,
    uniform_layers,
)
from sanitize.score.scaling import scaled

_SLOPE = 0.1  # of the leaky ReLUs
_SCORED = 16  # rows scored at once: their hidden units of all passes stay in the cache


class RCAConfig(BaseModel):
    """Robust collaborative autoencoders. The chapter gives no sizes: these are one choice for all data.

    Attributes:
        contamination: eps, expected share of anomalies. It may be wrong by 0.1 (Table 2.3); too much costs less than
            too little, so the default is rather high.
        n_networks: k. A single network trains on its own picks.
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
        learning_rate: step size of Adam.
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

    def build(self) -> "RCA":
        """The estimator, not fitted yet."""
        return RCA(self)


class RCA(Estimator):
    """Estimator: `RCA(config).fit(x_ND).score(x_ND)`; a higher score is more suspicious."""

    def __init__(self, config: RCAConfig | None = None) -> None:
        super().__init__()
        self.config = config or RCAConfig()

    def fit(self, x_ND: Tensor | np.ndarray, seed: int = 0) -> Self:
        """Train on rows of real numbers; NaN is a missing value.

        Raises:
            DataError: no rows or no columns, a column without a value, an infinite value.
            NumericsError: training diverged.
        """
        config, generator = self.config, Generator().manual_seed(seed)
        scaling, x_ND = scaled(x_ND, equal="range")
        layers = _initial(config, x_ND.shape[1], generator)
        _train(config, layers, x_ND, generator)
        layers = [(weight.detach(), bias.detach()) for weight, bias in layers]
        refuse_diverged(layers, "RCA")
        shapes = [(config.n_networks, config.n_passes, width) for width in _hidden_widths(config)]
        # masks[i] (k, v, H), bool: the dropout masks of scoring for hidden layer i
        masks = [torch.empty(shape).bernoulli_(1 - config.dropout, generator=generator).bool() for shape in shapes]
        self._fitted = Fitted(scaling, layers, dict(zip(self.drawn_names, masks, strict=True)))
        return self

    @property
    def drawn_names(self) -> list[str]:
        """Names of the dropout masks of scoring."""
        return [f"masks.{i}" for i in range(len(_hidden_widths(self.config)))]

    @torch.no_grad()
    def score(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Scores (N,), float32, finite, >= 0. Missing values are the means of the training rows.

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
        return [state.drawn[name].float() / (1 - self.config.dropout) for name in self.drawn_names]


def n_steps(config: RCAConfig, n_rows: int) -> tuple[int, int]:
    """Mini-batches of an epoch, and epochs."""
    n = n_batches(n_rows, config.batch_size)
    return n, max(1, min(config.epochs, config.max_steps // n))


def selected_fractions(contamination: float, alpha: float, epochs: int) -> list[float]:
    """beta of each epoch."""
    step = contamination / (alpha * epochs)
    betas = [1.0]
    while len(betas) < epochs:
        betas.append(max(betas[-1] - step, 1 - contamination))
    return betas


def pick(errors_kB: Tensor, n_picked: int, shift: int) -> Tensor:
    """Rows (k, P) for each network to train on: the best reconstructed ones of the network `shift` places before."""
    return errors_kB.topk(n_picked, dim=-1, largest=False).indices.roll(shift, 0)


def forward(
    layers: Layers, x_kBD: Tensor, masks: Sequence[Tensor] = (), noise_kBC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reconstruction (k, B, D), and the divergence of the code from its prior (0 without noise).

    Args:
        layers: weights (k, in, out) and biases. The middle layer gives the code; with noise, or where the layer has
            twice as many outputs as the next one inputs, mean and log-variance of the code.
        x_kBD: one batch for each network.
        masks: factors of each hidden layer (k, B, H); (k, v B, H) repeats the batch v times.
        noise_kBC: standard normal, for codes that are drawn.
    """
    hidden_kBH, divergence = _last_hidden(layers, x_kBD, masks, noise_kBC, torch.baddbmm)
    weight, bias = layers[-1]
    return torch.baddbmm(bias, hidden_kBH, weight), divergence


def _last_hidden(
    layers: Layers, x_kBD: Tensor, masks: Sequence[Tensor], noise_kBC: Tensor | None, affine: Affine
) -> tuple[Tensor, Tensor]:
    middle = len(layers) // 2 - 1
    divergence = x_kBD.new_zeros(())
    for i, (weight, bias) in enumerate(layers[:-1]):
        x_kBD = affine(bias, x_kBD, weight)
        if i == middle:
            n_codes = layers[i + 1][0].shape[1]
            mean_kBC, log_variance_kBC = x_kBD[..., :n_codes], x_kBD[..., n_codes:].clamp(-10, 10)
            x_kBD = mean_kBC
            if noise_kBC is not None:
                x_kBD = mean_kBC + (log_variance_kBC / 2).exp() * noise_kBC
                divergence = (mean_kBC.square() + log_variance_kBC.exp() - 1 - log_variance_kBC).sum(-1) / 2
            continue
        x_kBD = leaky_relu(x_kBD, _SLOPE)
        if masks:
            mask = masks[i if i < middle else i - 1]
            if len(mask[0]) > len(x_kBD[0]):  # dropout comes behind the first layer, so all passes share that layer
                x_kBD = x_kBD.repeat(1, len(mask[0]) // len(x_kBD[0]), 1)
            x_kBD = x_kBD * mask
    return x_kBD, divergence


def _errors(layers: Layers, x_BD: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Scores (B,) of scaled rows.

    The passes differ in the last hidden layer h only, and the last layer is linear, so with h = mean + d
        mean_v ||h W + b - x||^2 = ||mean W + b - x||^2 + mean_v d (W W^T) d^T,
    which multiplies with H columns in each pass, not with D.
    """
    k, n_rows = len(layers[0][0]), len(x_BD)
    masks = [mask_kvH.repeat_interleave(n_rows, 1) for mask_kvH in masks]
    hidden_kvH, _ = _last_hidden(layers, x_BD.expand(k, -1, -1), masks, None, exact.baddbmm)
    weight, bias = layers[-1]
    hidden_kvBH = hidden_kvH.view(k, -1, n_rows, weight.shape[1])
    n_passes = hidden_kvBH.shape[1]
    mean_kBH = exact.total(hidden_kvBH, 1) / n_passes
    error_kB = exact.total((exact.baddbmm(bias, mean_kBH, weight) - x_BD).square())
    apart_kvH = (hidden_kvBH - mean_kBH[:, None]).flatten(1, 2)
    nothing = torch.zeros(())
    turned_kvH = exact.baddbmm(nothing, apart_kvH, exact.baddbmm(nothing, weight, weight.mT))
    spread_kvB = exact.total(turned_kvH * apart_kvH).view(k, n_passes, n_rows)
    return exact.total(error_kB + exact.total(spread_kvB, 1) / n_passes, 0) / (k * x_BD.shape[1])


def _hidden_widths(config: RCAConfig) -> tuple[int, ...]:
    return config.widths + config.widths[::-1]


def _initial(config: RCAConfig, n_columns: int, generator: Generator) -> Layers:
    code = config.n_codes * (2 if config.variational else 1)
    inputs = (n_columns, *config.widths, config.n_codes, *config.widths[::-1])
    outputs = (*config.widths, code, *config.widths[::-1], n_columns)
    return uniform_layers((config.n_networks,), zip(inputs, outputs, strict=True), generator)


def _train(config: RCAConfig, layers: Layers, x_ND: Tensor, generator: Generator) -> None:
    """Algorithm 1, training phase; changes the layers in place."""
    _, epochs = n_steps(config, len(x_ND))
    contamination = config.contamination if config.select else 0.0
    parameters = [tensor.requires_grad_() for layer in layers for tensor in layer]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    for beta in selected_fractions(contamination, config.alpha, epochs):
        for x_BD in epoch(x_ND, config.batch_size, generator):
            n_picked = max(1, math.floor(beta * len(x_BD) + 1e-9))
            loss = _loss(config, layers, x_BD, n_picked, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _loss(config: RCAConfig, layers: Layers, x_BD: Tensor, n_picked: int, generator: Generator) -> Tensor:
    """Sum over the networks of the mean loss of the rows each is given."""
    k, (size, n_columns) = config.n_networks, x_BD.shape
    x_kBD = x_BD.repeat(k, 1, 1)
    if not config.dropout and not config.variational:
        # Then the pass that picks is the pass that trains.
        errors_kB = (forward(layers, x_kBD)[0] - x_kBD).square().sum(-1)
        given_kP = pick(errors_kB.detach(), n_picked, _shift(k, generator))
        return errors_kB.gather(1, given_kP).mean(-1).sum() / 2
    if n_picked < size:
        with torch.no_grad():
            errors_kB = (forward(layers, x_kBD)[0] - x_kBD).square().sum(-1)
        given_kP = pick(errors_kB, n_picked, _shift(k, generator))
        x_kBD = x_kBD.gather(1, given_kP[..., None].expand(-1, -1, n_columns))
    masks = [_drawn_masks(config.dropout, generator, k, n_picked, width) for width in _hidden_widths(config)]
    noise = torch.randn(k, n_picked, config.n_codes, generator=generator) if config.variational else None
    output_kPD, divergence = forward(layers, x_kBD, masks, noise)
    return ((output_kPD - x_kBD).square().sum(-1) / 2 + divergence).mean(-1).sum()


def _drawn_masks(dropout: float, generator: Generator, *shape: int) -> Tensor:
    """Factors of this shape: 0 with probability `dropout` (to 1/256), else the number that keeps the mean at 1."""
    n, threshold = math.prod(shape), round(256 * dropout)
    # Eight masks of each random number: drawn one by one they would cost half of the training time.
    words = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = words.view(torch.uint8)[:n] >= threshold
    return kept.float().mul_(256 / (256 - threshold)).view(shape)


def _shift(k: int, generator: Generator) -> int:
    """Places that picks are handed on: any other network is as likely as the next."""
    return 0 if k == 1 else int(torch.randint(1, k, (1,), generator=generator))
