"""A method is four ingredients; the literature's are a table of them (`zoo`).

Which samples update the model (`select_batch`), what passes between two networks (`collaborate`), which labels are
learned (`labels`), and on which inputs (`adversary`): B. Liu (2022), chapters 4 and 5. `robust_objective` makes of
them what `sanitize.loop.train` minimises. B batch, K outputs, N samples of the data set.
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
from sanitize.train.adversary import AdversaryConfig, InputSpace, ascend, divergence, perturb
from sanitize.train.collaborate import CollaborateConfig, exchange, networks_of
from sanitize.train.labels import LabelsConfig
from sanitize.train.losses import Loss, loss_gradient_norms, sample_losses
from sanitize.train.per_sample import Recording, recorded
from sanitize.train.select_batch import SelectBatchConfig, keep_smallest


class MethodConfig(BaseModel):
    """The ingredients of a method, and its loss.

    Attributes:
        loss: cross_entropy or mmc, which pulls embeddings to fixed centres (classification); squared, half the squared
            distance, or huber (regression).
        huber_delta: where huber turns from square to linear.
        select_batch, collaborate, labels, adversary: the ingredients.
        max_sample_grad_norm: shorten the gradient of each sample to this length before they are averaged (the
            chapter's Ignormclip); None leaves them.
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
            raise ConfigError("labels=bootstrap mixes labels, and loss=mmc has one centre for each: set labels=given")
        if not self.classifies:
            if self.collaborate.kind == "decouple":
                raise ConfigError("collaborate=decouple asks where two predicted classes differ: regression has none")
            if self.adversary.kind == "trades":
                raise ConfigError("adversary=trades compares predicted classes: regression has none; set pgd")
            if self.labels.kind == "bootstrap":
                raise ConfigError("labels=bootstrap would only scale the gradient of a regression: set labels=given")
        if self.adversary.kind == "trades" and self.needs_sample_gradients:
            raise ConfigError(
                "adversary=trades looks at each sample twice: prl_g and max_sample_grad_norm count one look"
            )
        return self

    @property
    def classifies(self) -> bool:
        """True where targets are labels."""
        return self.loss in ("cross_entropy", "mmc")

    @property
    def n_networks(self) -> int:
        """Networks that are trained; two of them go into a `Pair`."""
        return 1 if self.collaborate.kind == "none" else 2

    @property
    def needs_sample_gradients(self) -> bool:
        """True where gradients of single samples are asked for: then no layer may mix the samples of a batch."""
        return self.select_batch.kind == "prl_g" or self.max_sample_grad_norm is not None


def zoo(
    tau: float, warmup_epochs: int = 10, loss: Loss = "cross_entropy", tau_x: float = 0.05
) -> dict[str, MethodConfig]:
    """The methods of B. Liu (2022), Tables 4.1, 4.2 and 5.1, that fit the loss; PGD-AT and TRADES.

    Args:
        tau: share of each batch that filters drop.
        warmup_epochs: T_k.
        loss: of the task; what only classifies is left out for regression and the other way round.
        tau_x: radius of adversaries.
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
    """How often each sample was dropped and seen after the warm-up, on the device: evidence against it.

    Attributes:
        dropped_N, seen_N: int32 counts; two networks count twice.
    """

    def __init__(self, n_samples: int, device: torch.device) -> None:
        self.dropped_N = torch.zeros(n_samples, dtype=torch.int32, device=device)
        self.seen_N = torch.zeros_like(self.dropped_N)

    def count(self, rows_B: Tensor, keep_B: Tensor) -> None:
        """Add one batch; no row may be in it twice."""
        self.seen_N[rows_B] += 1
        self.dropped_N[rows_B] += (~keep_B).int()

    def fraction(self) -> Tensor:
        """Share of its visits on which a sample was dropped, (N,) float32; NaN where it was never seen."""
        return self.dropped_N / self.seen_N


class _Look(NamedTuple):
    """What one network makes of a batch."""

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
    """What `sanitize.loop.train` minimises: the mean loss over the samples that the ingredients leave.

    Args:
        config: the method; with two networks the model must be a `Pair`.
        compute: device and precision.
        space: bounds and unit of the inputs, for an adversary; None has neither.
        drops: counts dropped samples, where batches carry rows.
        generator: of the random starts of an adversary; None has one of its own.

    Returns:
        The objective. Its sums: loss, dropped (share of the batch that did not update the first network) and, for
        classification, accuracy on the given labels.
    """
    space = (space or InputSpace.unbounded()).to(compute.torch_device)
    generator = generator or compute.generator("adversary")

    def look(network: nn.Module, x_B: Tensor, y_B: Tensor) -> _Look:
        with recorded(network) if config.needs_sample_gradients else nullcontext() as recording, compute.autocast():
            outputs_BK = network(x_B).float()
        targets_B = config.labels(outputs_BK.detach(), y_B)
        losses_B = sample_losses(outputs_BK, targets_B, config.loss, config.huber_delta)
        return _Look(outputs_BK, targets_B, losses_B, recording)

    def perturbed(network: nn.Module, x_B: Tensor, y_B: Tensor, of: _Look, keep_B: Tensor) -> _Look:
        """What a network makes of the batch where an adversary has been."""
        adversary = config.adversary
        if adversary.kind == "at":
            (gradient_B,) = torch.autograd.grad(of.losses_B.sum(), x_B)
            return look(network, perturb(adversary, x_B.detach(), gradient_B, keep_B, space), y_B)
        if adversary.kind == "pgd":
            losses = partial(sample_losses, targets_B=of.targets_B, loss=config.loss, huber_delta=config.huber_delta)
            return look(network, ascend(adversary, network, x_B, losses, keep_B, space, generator, compute), y_B)
        apart = partial(divergence, from_BK=of.outputs_BK.detach())
        worst = look(network, ascend(adversary, network, x_B, apart, keep_B, space, generator, compute), y_B)
        losses_B = of.losses_B + adversary.beta * divergence(worst.outputs_BK, of.outputs_BK)
        return of._replace(losses_B=losses_B)

    def objective(model: nn.Module, batch: TrainBatch, epoch: int) -> Step:
        networks = networks_of(model)
        x_B, y_B, rows_B = batch
        if config.adversary.kind == "at":
            x_B = x_B.detach().requires_grad_()
        looks = [look(network, x_B, y_B) for network in networks]
        outputs = [of.outputs_BK.detach() for of in looks]
        keeps = exchange(config.collaborate.kind, [_picked(config, of, epoch) for of in looks], outputs)
        if drops is not None and rows_B is not None and config.select_batch.is_warm(epoch):
            for keep_B in keeps:
                drops.count(rows_B, keep_B)
        if config.adversary.kind != "none":
            # The same samples are trusted on x + c: asked again, the rule would prefer those that were not perturbed.
            each = zip(networks, looks, keeps, strict=True)
            looks = [perturbed(network, x_B, y_B, of, keep_B) for network, of, keep_B in each]
        losses = [_kept_mean(config, of, keep_B) for of, keep_B in zip(looks, keeps, strict=True)]
        sums = {"loss": losses[0].detach() * len(y_B), "dropped": (~keeps[0]).sum()}
        if config.classifies:
            sums["accuracy"] = (outputs[0].argmax(1) == y_B).sum()
        shares = [weighted(loss, keep_B.sum()) for loss, keep_B in zip(losses, keeps, strict=True)]
        return Step(torch.stack(shares).sum(), sums)

    return objective


def _picked(config: MethodConfig, of: _Look, epoch: int) -> Tensor:
    """True for the samples a network would learn from, (B,)."""
    kind = config.select_batch.kind
    if kind == "all":
        return torch.ones_like(of.losses_B, dtype=torch.bool)
    if kind == "prl_g":
        assert of.recording is not None
        suspicion_B = of.recording.norms(of.losses_B)
    elif kind == "prl_l":
        suspicion_B = loss_gradient_norms(of.outputs_BK.detach(), of.targets_B, config.loss, config.huber_delta)
    else:
        suspicion_B = of.losses_B.detach()
    return keep_smallest(suspicion_B, config.select_batch.n_kept(len(suspicion_B), epoch))


def _kept_mean(config: MethodConfig, of: _Look, keep_B: Tensor) -> Tensor:
    """Mean loss over the samples that are kept, 0 where none is."""
    losses_B = torch.where(keep_B, of.losses_B, 0.0)
    if config.max_sample_grad_norm is not None:
        assert of.recording is not None
        # Weighing a loss weighs its gradient: this one backward pass adds up shortened gradients.
        losses_B = losses_B * (config.max_sample_grad_norm / of.recording.norms(of.losses_B)).clamp(max=1)
    return losses_B.sum() / keep_B.sum().clamp(min=1)
