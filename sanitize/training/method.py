"""A method is a combination of four ingredients; `zoo` has those of the literature.

The ingredients (B. Liu 2022, chapters 4 and 5): the samples that update the model (`select_batch`), a second network
(`collaborate`), the targets (`labels`), and perturbed inputs (`adversary`). `robust_objective` combines them into an
objective for `sanitize.loop.train`. B batch, K outputs, N samples of the data set.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.distributed import weighted
from sanitize.errors import ConfigError
from sanitize.loop import Objective, Step, TrainBatch
from sanitize.training.adversary import AdversaryConfig, InputSpace, ascend, divergence, perturb
from sanitize.training.collaborate import CollaborateConfig, exchange, networks_of
from sanitize.training.labels import LabelsConfig
from sanitize.training.losses import Loss, loss_gradient_norms, sample_losses
from sanitize.training.per_sample import Recording, recorded
from sanitize.training.select_batch import SelectBatchConfig, keep_smallest


class MethodConfig(BaseModel):
    """The ingredients of a method, and its loss.

    Attributes:
        loss: cross_entropy, or mmc, which pulls embeddings to fixed centres (classification); squared, half the squared
            distance, or huber (regression).
        huber_delta: residual at which huber turns from quadratic to linear.
        select_batch, collaborate, labels, adversary: the ingredients.
        max_sample_grad_norm: bound on the gradient norm of each sample, applied before averaging (Ignormclip in the
            chapter); None clips nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Loss = "cross_entropy"
    huber_delta: float = Field(default=1.0, gt=0)
    select_batch: SelectBatchConfig = SelectBatchConfig()
    collaborate: CollaborateConfig = CollaborateConfig()
    labels: LabelsConfig = LabelsConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    max_sample_grad_norm: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ingredients_fit_the_task(self) -> Self:
        if self.loss == "mmc" and self.labels.kind == "bootstrap":
            raise ConfigError("labels=bootstrap mixes labels, and loss=mmc has one centre a label: set labels=given")
        if not self.classifies:
            if self.collaborate.kind == "decouple":
                raise ConfigError("collaborate=decouple compares predicted classes, and regression has none")
            if self.adversary.kind == "trades":
                raise ConfigError("adversary=trades compares predicted classes, and regression has none: set pgd")
            if self.labels.kind == "bootstrap":
                raise ConfigError("labels=bootstrap would only scale the gradient of a regression: set labels=given")
        if self.adversary.kind == "trades" and self.needs_sample_gradients:
            raise ConfigError(
                "adversary=trades evaluates each sample twice: prl_g and max_sample_grad_norm do not support that"
            )
        return self

    @property
    def classifies(self) -> bool:
        """True if targets are labels."""
        return self.loss in ("cross_entropy", "mmc")

    @property
    def n_networks(self) -> int:
        """Number of trained networks; two form a `Pair`."""
        return 1 if self.collaborate.kind == "none" else 2

    @property
    def needs_sample_gradients(self) -> bool:
        """True if gradients of single samples are needed; then no layer may mix the samples of a batch."""
        return self.select_batch.kind == "prl_g" or self.max_sample_grad_norm is not None


def zoo(
    tau: float, warmup_epochs: int = 10, loss: Loss = "cross_entropy", tau_x: float = 0.05
) -> dict[str, MethodConfig]:
    """The methods of B. Liu (2022), Tables 4.1, 4.2 and 5.1, that support the loss; PGD-AT and TRADES.

    Args:
        tau: share of each batch that filters drop.
        warmup_epochs: T_k.
        loss: loss of the task; methods for other tasks are left out.
        tau_x: radius of the adversaries.
    """
    prl_l, prl_g, spl = (
        {"select_batch": SelectBatchConfig(kind=kind, tau=tau, warmup_epochs=warmup_epochs)}
        for kind in ("prl_l", "prl_g", "spl")
    )
    co = {"collaborate": CollaborateConfig(kind="co")}
    at, pgd, trades = ({"adversary": AdversaryConfig(kind=kind, tau_x=tau_x)} for kind in ("at", "pgd", "trades"))
    bootstrap = {"labels": LabelsConfig(kind="bootstrap")}
    rows: dict[str, dict[str, Any]] = {
        "standard": {},
        "min_sgd": {"select_batch": SelectBatchConfig(kind="min_sgd")},
        "spl": spl,
        "prl_l": prl_l,
        "prl_g": prl_g,
        "co_teaching": spl | co,
        "co_prl_l": prl_l | co,
        "at": at,
        "spl_at": spl | at,
        "prl_at": prl_l | at,
        "pgd_at": pgd,
    }
    if loss == "cross_entropy":
        rows |= {
            "decouple": {"collaborate": CollaborateConfig(kind="decouple")},
            "bootstrap": bootstrap,
            "bootstrap_at": bootstrap | at,
            "trades": trades,
        }
    else:
        rows |= {"huber": {"loss": "huber"}, "sample_clip": {"max_sample_grad_norm": 1.0}}
    return {name: MethodConfig(**{"loss": loss} | ingredients) for name, ingredients in rows.items()}


class Drops:
    """Counts of how often each sample was dropped and seen after the warm-up, on the device.

    Attributes:
        dropped_N, seen_N: int32 counts; with two networks, each visit counts twice.
    """

    def __init__(self, n_samples: int, device: torch.device) -> None:
        self.dropped_N = torch.zeros(n_samples, dtype=torch.int32, device=device)
        self.seen_N = torch.zeros_like(self.dropped_N)

    def count(self, rows_B: Tensor, keep_B: Tensor) -> None:
        """Add one batch; its rows are distinct."""
        self.seen_N[rows_B] += 1
        self.dropped_N[rows_B] += (~keep_B).int()

    def fraction(self) -> Tensor:
        """Share of its visits on which a sample was dropped, (N,) float32; NaN if it was never seen."""
        return self.dropped_N / self.seen_N


class _Evaluation(NamedTuple):
    """One network on one batch."""

    outputs_BK: Tensor
    targets_B: Tensor
    losses_B: Tensor
    recording: Recording | None


def robust_objective(
    config: MethodConfig,
    compute: Compute,
    space: InputSpace | None = None,
    drops: Drops | None = None,
    generator: torch.Generator | None = None,
) -> Objective:
    """The objective of a method: the mean loss of the samples that the ingredients keep.

    Args:
        config: the method; for two networks the model must be a `Pair`.
        compute: device and precision.
        space: bounds and unit of the inputs, for an adversary; None is `InputSpace.unbounded`.
        drops: counts of dropped samples, updated if batches have rows.
        generator: CPU generator of the random starts of an adversary; None creates one.

    Returns:
        The objective. Its sums: loss, dropped (samples that did not update the first network) and, for classification,
        accuracy (samples whose given label was predicted).
    """
    space = (space or InputSpace.unbounded()).to(compute.torch_device)
    generator = generator or compute.generator("adversary")

    def evaluate(network: nn.Module, x_B: Tensor, y_B: Tensor) -> _Evaluation:
        with recorded(network) if config.needs_sample_gradients else nullcontext() as recording, compute.autocast():
            outputs_BK = network(x_B).float()
        targets_B = config.labels(outputs_BK.detach(), y_B)
        losses_B = sample_losses(outputs_BK, targets_B, config.loss, config.huber_delta)
        return _Evaluation(outputs_BK, targets_B, losses_B, recording)

    def perturbed(network: nn.Module, x_B: Tensor, y_B: Tensor, clean: _Evaluation, keep_B: Tensor) -> _Evaluation:
        """One network on the batch with perturbed inputs."""
        adversary = config.adversary
        if adversary.kind == "at":
            (gradient_B,) = torch.autograd.grad(clean.losses_B.sum(), x_B)
            return evaluate(network, perturb(adversary, x_B.detach(), gradient_B, keep_B, space), y_B)
        if adversary.kind == "pgd":
            losses = partial(sample_losses, targets_B=clean.targets_B, loss=config.loss, huber_delta=config.huber_delta)
            return evaluate(network, ascend(adversary, network, x_B, losses, keep_B, space, generator, compute), y_B)
        apart = partial(divergence, from_BK=clean.outputs_BK.detach())
        worst = evaluate(network, ascend(adversary, network, x_B, apart, keep_B, space, generator, compute), y_B)
        losses_B = clean.losses_B + adversary.beta * divergence(worst.outputs_BK, clean.outputs_BK)
        return clean._replace(losses_B=losses_B)

    def objective(model: nn.Module, batch: TrainBatch, epoch: int) -> Step:
        networks = networks_of(model)
        x_B, y_B, rows_B = batch
        if config.adversary.kind == "at":
            x_B = x_B.detach().requires_grad_()
        found = [evaluate(network, x_B, y_B) for network in networks]
        outputs = [evaluation.outputs_BK.detach() for evaluation in found]
        picked = [_picked(config, evaluation, epoch) for evaluation in found]
        keeps = exchange(config.collaborate.kind, picked, outputs)
        if drops is not None and rows_B is not None and config.select_batch.is_warm(epoch):
            for keep_B in keeps:
                drops.count(rows_B, keep_B)
        if config.adversary.kind != "none":
            # The same samples are kept on x + c: chosen again, they would be those that were not perturbed.
            each = zip(networks, found, keeps, strict=True)
            found = [perturbed(network, x_B, y_B, clean, keep_B) for network, clean, keep_B in each]
        losses = [_kept_mean(config, evaluation, keep_B) for evaluation, keep_B in zip(found, keeps, strict=True)]
        sums = {"loss": losses[0].detach() * len(y_B), "dropped": (~keeps[0]).sum()}
        if config.classifies:
            sums["accuracy"] = (outputs[0].argmax(1) == y_B).sum()
        shares = [weighted(loss, keep_B.sum()) for loss, keep_B in zip(losses, keeps, strict=True)]
        return Step(torch.stack(shares).sum(), sums)

    return objective


def _picked(config: MethodConfig, evaluation: _Evaluation, epoch: int) -> Tensor:
    """True for the samples that a network keeps, (B,)."""
    kind = config.select_batch.kind
    if kind == "all":
        return torch.ones_like(evaluation.losses_B, dtype=torch.bool)
    if kind == "prl_g":
        assert evaluation.recording is not None
        suspicion_B = evaluation.recording.norms(evaluation.losses_B)
    elif kind == "prl_l":
        suspicion_B = loss_gradient_norms(
            evaluation.outputs_BK.detach(), evaluation.targets_B, config.loss, config.huber_delta
        )
    else:
        suspicion_B = evaluation.losses_B.detach()
    return keep_smallest(suspicion_B, config.select_batch.n_kept(len(suspicion_B), epoch))


def _kept_mean(config: MethodConfig, evaluation: _Evaluation, keep_B: Tensor) -> Tensor:
    """Mean loss of the kept samples; 0 if none is kept."""
    losses_B = torch.where(keep_B, evaluation.losses_B, 0.0)
    if config.max_sample_grad_norm is not None:
        assert evaluation.recording is not None
        # A weight on a loss scales its gradient, so one backward pass adds the clipped gradients.
        norms_B = evaluation.recording.norms(evaluation.losses_B)
        losses_B = losses_B * (config.max_sample_grad_norm / norms_B).clamp(max=1)
    return losses_B.sum() / keep_B.sum().clamp(min=1)
