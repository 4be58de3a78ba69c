"""The training loop: forward, loss, step, and a stop where numbers cease to be finite. All that trains uses it.

What is minimised is an `Objective`: a function of the network and a batch. `cross_entropy` is the plain one; the
robust ones are in `sanitize.train`. Shapes: B batch, C H W image, K outputs.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sanitize.compute import Compute
from sanitize.errors import NumericsError

Batches = Iterator[tuple[Tensor, ...]]


class OptimConfig(BaseModel):
    """Optimiser, schedule, and what is done to every step.

    Attributes:
        optimizer: Adam, AdamW, or SGD with Nesterov momentum 0.9.
        learning_rate: the largest of the schedule.
        schedule: one_cycle (rises for a quarter of the steps, then falls), cosine (falls to zero), or constant.
        weight_decay: on all parameters; decoupled for adamw, added to the gradient otherwise.
        epochs: passes over the data.
        batch_size: samples a step.
        max_grad_norm: clip the global gradient norm; None leaves it.
        noise_sd: standard deviation of Gaussian noise added to the inputs, in the units the network sees.
        ema_decay: the trained network is the exponential moving average of the weights and buffers of all steps; None
            is the last step's.
        compile: run the network through torch.compile; same mathematics, other rounding.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=3e-3, gt=0)
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    weight_decay: float = Field(default=1e-4, ge=0)
    epochs: int = Field(default=6, ge=1)
    batch_size: int = Field(default=128, ge=2)
    max_grad_norm: float | None = Field(default=None, gt=0)
    noise_sd: float = Field(default=0.0, ge=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    compile: bool = False


class Batch(NamedTuple):
    """What one step learns from, on the device.

    Attributes:
        x_B: inputs the network takes, (B, C, H, W) or (B, D), float.
        y_B: int64 labels (B,), or float targets (B, K).
        rows_B: which samples of the data set these are, int64; None where nobody asks.
    """

    x_B: Tensor
    y_B: Tensor
    rows_B: Tensor | None = None


class Step(NamedTuple):
    """What a batch asks of the optimiser.

    Attributes:
        loss: scalar to differentiate.
        sums: sums over the samples of the batch, detached, always the same names; their means over an epoch are its
            history.
    """

    loss: Tensor
    sums: dict[str, Tensor]


Objective = Callable[[nn.Module, Batch, int], Step]  # the network, the batch, how many epochs are finished


def cross_entropy(compute: Compute) -> Objective:
    """The plain objective: every sample counts, and its label is true."""

    def objective(model: nn.Module, batch: Batch, _epoch: int) -> Step:
        with compute.autocast():
            logits_BK = model(batch.x_B)
            loss = nn.functional.cross_entropy(logits_BK.float(), batch.y_B)
        correct = (logits_BK.argmax(1) == batch.y_B).sum()
        return Step(loss, {"loss": loss.detach() * len(batch.y_B), "accuracy": correct})

    return objective


def train(
    model: nn.Module,
    epoch: Callable[[], Batches],
    steps_per_epoch: int,
    config: OptimConfig,
    compute: Compute,
    transform: Callable[[Tensor], Tensor],
    on_step: Callable[[int], None] = lambda _n: None,
    objective: Objective | None = None,
    measure: Callable[[nn.Module], dict[str, float]] = lambda _model: {},
) -> list[dict[str, float]]:
    """Train `model` in place.

    Args:
        model: float module; moved to the device, channels_last.
        epoch: gives the batches of the next epoch: inputs, targets and, where samples are to be named, their rows.
        steps_per_epoch: number of batches `epoch` gives.
        config: optimiser and schedule.
        compute: device and precision.
        transform: inputs on the device to the float inputs the model takes (normalisation, augmentation).
        on_step: told the batch size after each step, for progress bars.
        objective: what is minimised; None is `cross_entropy`.
        measure: called with the network after each epoch; what it returns joins the epoch's row. It may set eval mode.

    Returns:
        One row an epoch: means over the training samples (`cross_entropy`: loss and accuracy in [0, 1]).

    Raises:
        NumericsError: the loss is not finite; looked at once an epoch, so that the device is never waited for.
    """
    device = compute.torch_device
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = objective or cross_entropy(compute)
    network = cast(nn.Module, torch.compile(model)) if config.compile else model
    optimizer = _optimizer(model, config)
    schedule = _schedule(optimizer, config, config.epochs * steps_per_epoch)
    average = _average(model, config)
    noise = compute.generator("loop", "noise", device=device)
    history = []
    for number in range(config.epochs):
        model.train()
        sums = _Sums(config.batch_size, device)
        for arrived in epoch():
            x_B, *others = (tensor.to(device, non_blocking=True) for tensor in arrived)
            x_B = _layout(transform(x_B))
            if config.noise_sd:
                x_B = x_B + config.noise_sd * torch.randn(x_B.shape, generator=noise, device=device)
            batch = Batch(x_B, *others)
            step = objective(network, batch, number)
            optimizer.zero_grad(set_to_none=True)
            step.loss.backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            if average is not None:
                average.update_parameters(model)
            sums.add(step, batch)
            on_step(len(batch.y_B))
        row = {"epoch": number + 1} | sums.means(number + 1, config)
        history.append(row | measure(model if average is None else average.module))
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return history


class _Sums:
    """Sums over an epoch and its first loss that is not finite, on the device until the epoch is over."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.total = torch.zeros((), device=device)
        self.names: list[str] = []
        self.n_seen = self.n_steps = 0
        self.bad_step = torch.full((), -1, device=device)
        self.bad_rows_B = torch.full((batch_size,), -1, device=device)

    def add(self, step: Step, batch: Batch) -> None:
        is_first = ~torch.isfinite(step.loss.detach()) & (self.bad_step < 0)
        self.bad_step = torch.where(is_first, self.n_steps, self.bad_step)
        if batch.rows_B is not None:
            rows_B = self.bad_rows_B[: len(batch.rows_B)]
            rows_B.copy_(torch.where(is_first, batch.rows_B, rows_B))
        self.names = list(step.sums)
        self.total = self.total + torch.stack([value.float() for value in step.sums.values()])
        self.n_seen += len(batch.y_B)
        self.n_steps += 1

    def means(self, epoch: int, config: OptimConfig) -> dict[str, float]:
        means = dict(zip(self.names, (self.total / self.n_seen).tolist(), strict=True))
        if (bad_step := int(self.bad_step)) >= 0 or not all(map(math.isfinite, means.values())):
            where = f"epoch {epoch}" if bad_step < 0 else f"epoch {epoch}, step {bad_step + 1}"
            rows = [row for row in self.bad_rows_B.tolist() if row >= 0]
            among = f" (samples {', '.join(map(str, rows[:8]))}{', ...' if rows[8:] else ''})" if rows else ""
            raise NumericsError(
                f"training loss is not finite in {where}{among}; lower learning_rate={config.learning_rate} "
                "or set max_grad_norm"
            )
        return means


def _layout(x_B: Tensor) -> Tensor:
    """Images channels_last, tables as they are."""
    return x_B.contiguous(memory_format=torch.channels_last) if x_B.dim() == 4 else x_B


def _optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **settings)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), **settings)


def _schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    if config.schedule == "constant":
        return LambdaLR(optimizer, lambda _step: 1.0)
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, total_steps)
    # OneCycleLR divides by pct_start * total_steps - 1: by nothing where there are just four steps.
    pct_start = 0.25 if total_steps != 4 else 0.3
    return OneCycleLR(optimizer, config.learning_rate, total_steps=total_steps, pct_start=pct_start)


def _average(model: nn.Module, config: OptimConfig) -> AveragedModel | None:
    if config.ema_decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)


@torch.inference_mode()
def predict(
    model: nn.Module,
    inputs_N: Tensor,
    transform: Callable[[Tensor], Tensor],
    compute: Compute,
    batch_size: int = 512,
) -> Tensor:
    """Outputs (N, K), float32 on the CPU, of uint8 images (N, C, H, W) or a table (N, D); in eval mode."""
    device = compute.torch_device
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    outputs = []
    for x_B in inputs_N.split(batch_size):
        with compute.autocast():
            outputs.append(model(_layout(transform(x_B.to(device)))).float().cpu())
    return torch.cat(outputs)
