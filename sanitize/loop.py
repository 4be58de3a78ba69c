"""The training loop of all stages: forward, loss, step; an error at the first loss that is not finite.

The loop minimises an `Objective`, a function of the network and a batch: `cross_entropy`, or a robust objective of
`sanitize.training`. Shapes: B batch, C H W image, K outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sanitize.compute import Compute
from sanitize.distributed import add_gradients, barrier, by_process, share, total, weighted, world
from sanitize.errors import ConfigError, NumericsError
from sanitize.snapshots import Snapshots, restore_optimizer


class OptimConfig(BaseModel):
    """Optimizer and schedule.

    Attributes:
        optimizer: Adam, AdamW, or SGD with Nesterov momentum 0.9.
        learning_rate: largest learning rate of the schedule.
        schedule: one_cycle (rises for a quarter of the steps, then falls), cosine (falls to zero), or constant.
        weight_decay: weight decay of all parameters; decoupled for adamw, added to the gradient otherwise.
        epochs: passes over the data.
        batch_size: samples in a step.
        max_grad_norm: bound on the global gradient norm; None clips nothing.
        noise_sd: standard deviation of Gaussian noise added to the inputs: for images in pixels on [0, 1] before
            normalisation, as in randomized smoothing; for tables in the units of the network's inputs.
        ema_decay: decay of an exponential moving average of weights and buffers, which becomes the trained network;
            None keeps the weights of the last step.
        compile: use torch.compile; same mathematics, other rounding.
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


class TrainBatch(NamedTuple):
    """The data of one step, on the device.

    Attributes:
        x_B: inputs of the network, (B, C, H, W) or (B, D), float.
        y_B: int64 labels (B,), or float targets (B, K).
        rows_B: rows of the samples in the data set, int64 (B,); None if unknown.
    """

    x_B: Tensor
    y_B: Tensor
    rows_B: Tensor | None = None


class Step(NamedTuple):
    """The result of an objective on a batch.

    Attributes:
        loss: scalar to differentiate; several processes minimise the sum of their losses (`weighted`).
        sums: sums over the samples of the batch, detached, always with the same names; their means over an epoch are
            its row of the history.
    """

    loss: Tensor
    sums: dict[str, Tensor]


Objective = Callable[[nn.Module, TrainBatch, int], Step]  # the network, the batch, the number of finished epochs


def cross_entropy(compute: Compute) -> Objective:
    """The mean cross-entropy of all samples with their given labels."""

    def objective(model: nn.Module, batch: TrainBatch, _epoch: int) -> Step:
        with compute.autocast():
            logits_BK = model(batch.x_B)
            loss = nn.functional.cross_entropy(logits_BK.float(), batch.y_B)
        correct = (logits_BK.argmax(1) == batch.y_B).sum()
        n = torch.tensor(len(batch.y_B), device=loss.device)
        return Step(weighted(loss, n), {"loss": loss.detach() * n, "accuracy": correct})

    return objective


def train(
    model: nn.Module,
    epoch: Callable[[int], Iterator[tuple[Tensor, ...]]],
    steps_per_epoch: int,
    config: OptimConfig,
    compute: Compute,
    transform: Callable[[Tensor], Tensor],
    on_step: Callable[[int], None] = lambda _n: None,
    objective: Objective | None = None,
    measure: Callable[[nn.Module], dict[str, float]] = lambda _model: {},
    snapshots: Snapshots | None = None,
    carried: Mapping[str, Tensor | torch.Generator] | None = None,
    name_of: Callable[[int], str] = str,
    on_epoch: Callable[[dict[str, float]], None] = lambda _row: None,
    unit: Tensor | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place; with several processes (torchrun), each takes its share of every batch.

    Args:
        model: float module; moved to the device, channels_last.
        epoch: function from the number of an epoch, from 0, to its batches: inputs, targets and, optionally, rows of
            the samples. The same number gives the same batches.
        steps_per_epoch: number of batches of an epoch.
        config: optimizer and schedule.
        compute: device and precision.
        transform: function from inputs on the device to the float inputs of the model (normalisation, augmentation).
        on_step: called with the batch size after each step, for progress bars.
        objective: the objective to minimise; None is `cross_entropy`.
        measure: called with the network after each epoch; its values join the row of the epoch. It may set eval mode.
        snapshots: file for the state of the training; training resumes from it, on a CPU to the same bits.
        carried: further state that changes from step to step (generators of augmentation, counts of samples); saved
            with the snapshot and restored in place.
        name_of: function from the row of a sample to its name in messages.
        on_epoch: called with each row of the history.
        unit: length of one unit of `noise_sd` in the inputs of the network, broadcast against X
            (`ModelConfig.pixel_unit`); None is 1.

    Returns:
        The history, one row an epoch: means over the training samples (`cross_entropy`: loss and accuracy in [0, 1]).

    Raises:
        NumericsError: the loss is not finite; checked once an epoch, to avoid waiting for the device.
        ConfigError: the processes cannot share a batch evenly.
    """
    if config.batch_size % world()[1]:
        raise ConfigError(f"batch_size={config.batch_size} is not a multiple of the number of processes, {world()[1]}")
    device = compute.torch_device
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = objective or cross_entropy(compute)
    network = cast(nn.Module, torch.compile(model)) if config.compile else model
    noise = compute.generator("loop", "noise", world()[0], device=device)
    noise_sd = config.noise_sd * (torch.ones(()) if unit is None else unit).to(device)
    at = _Training(model, config, config.epochs * steps_per_epoch, {**(carried or {}), "noise": noise})
    barrier()  # until the first process has made the folder and removed a snapshot of another recipe
    if snapshots is not None and (state := snapshots.load()) is not None:
        at.restore(state)
        on_step((at.epoch * steps_per_epoch + at.sums.n_steps) * config.batch_size)
    for number in range(at.epoch, config.epochs):
        model.train()
        for arrived in islice(epoch(number), at.sums.n_steps, None):
            x_B, *others = (tensor.to(device, non_blocking=True) for tensor in share(arrived))
            x_B = _layout(transform(x_B))
            if config.noise_sd:
                x_B = x_B + noise_sd * torch.randn(x_B.shape, generator=noise, device=device)
            batch = TrainBatch(x_B, *others)
            step = objective(network, batch, number)
            at.step(step.loss)
            at.sums.add(step, batch)
            on_step(len(arrived[1]))
            # Of all steps: epochs may be shorter than `every`.
            if snapshots is not None and (number * steps_per_epoch + at.sums.n_steps) % snapshots.every == 0:
                state = at.snapshot()
                if world()[0] == 0:
                    snapshots.save(state)
        row = {"epoch": number + 1} | at.sums.means(number + 1, config, name_of)
        at.end_epoch(row | measure(model if at.average is None else at.average.module))
        on_epoch(at.history[-1])
    if at.average is not None:
        model.load_state_dict(at.average.module.state_dict())
    return at.history


class _Training:
    """The state of a training."""

    def __init__(
        self, model: nn.Module, config: OptimConfig, total_steps: int, carried: dict[str, Tensor | torch.Generator]
    ) -> None:
        self.model, self.config, self.carried = model, config, carried
        self.optimizer = _optimizer(model, config)
        self.schedule = _schedule(self.optimizer, config, total_steps)
        self.average = _average(model, config)
        self.epoch = 0
        self.sums = _Sums()
        self.history: list[dict[str, float]] = []

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        add_gradients(self.model)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def end_epoch(self, row: dict[str, float]) -> None:
        self.history.append(row)
        self.epoch += 1
        self.sums = _Sums()

    def snapshot(self) -> dict[str, Any]:
        """The state of the training; a collective call in several processes."""
        carried = {name: kept if isinstance(kept, Tensor) else kept.get_state() for name, kept in self.carried.items()}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "history": self.history,
            "epoch": self.epoch,
            "n_seen": self.sums.n_seen,
            "n_steps": self.sums.n_steps,
            "sums": {name: by_process(tensor) for name, tensor in self.sums.tensors.items()},
            "carried": {name: by_process(tensor) for name, tensor in carried.items()},
            "torch": by_process(torch.get_rng_state()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `snapshot` returned."""
        rank, device = world()[0], next(self.model.parameters()).device
        self.model.load_state_dict(state["model"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.sums = _Sums({name: by_rank[rank].to(device) for name, by_rank in state["sums"].items()})
        self.sums.n_seen, self.sums.n_steps = state["n_seen"], state["n_steps"]
        for name, by_rank in state["carried"].items():
            kept = self.carried[name]
            if isinstance(kept, Tensor):
                kept.copy_(by_rank[rank])
            else:
                kept.set_state(by_rank[rank])
        torch.set_rng_state(state["torch"][rank])
        self.history, self.epoch = state["history"], state["epoch"]


class _Sums:
    """Sums over an epoch, and its first step with a loss that is not finite; on the device until the epoch ends."""

    def __init__(self, tensors: dict[str, Tensor] | None = None) -> None:
        self.tensors = tensors or {}
        self.n_seen = self.n_steps = 0

    def add(self, step: Step, batch: TrainBatch) -> None:
        if not self.tensors:
            zero = torch.zeros((), device=step.loss.device)
            self.tensors = {f"sum.{name}": zero.clone() for name in step.sums} | {"bad_step": zero - 1}
            if batch.rows_B is not None:
                self.tensors["bad_rows"] = torch.full_like(batch.rows_B, -1)
        is_first = ~torch.isfinite(step.loss.detach()) & (self.tensors["bad_step"] < 0)
        self.tensors["bad_step"].masked_fill_(is_first, self.n_steps)
        if batch.rows_B is not None:
            rows_B = self.tensors["bad_rows"][: len(batch.rows_B)]
            rows_B.copy_(torch.where(is_first, batch.rows_B, rows_B))
        for name, value in step.sums.items():
            self.tensors[f"sum.{name}"] += value
        self.n_seen += len(batch.y_B)
        self.n_steps += 1

    def means(self, epoch: int, config: OptimConfig, name_of: Callable[[int], str]) -> dict[str, float]:
        sums = {name[4:]: value for name, value in self.tensors.items() if name.startswith("sum.")}
        values = torch.stack(list(sums.values()))
        values = (total(values) / total(torch.full_like(values[0], self.n_seen))).cpu()
        means = dict(zip(sums, values.tolist(), strict=True))
        if (bad_step := int(self.tensors["bad_step"])) >= 0 or not all(map(math.isfinite, means.values())):
            where = f"epoch {epoch}" if bad_step < 0 else f"epoch {epoch}, step {bad_step + 1}"
            rows = [row for row in self.tensors.get("bad_rows", torch.zeros(0)).tolist() if row >= 0]
            among = f" (samples {', '.join(map(name_of, rows[:8]))}{', ...' if rows[8:] else ''})" if rows else ""
            raise NumericsError(
                f"training loss is not finite in {where}{among}; lower learning_rate={config.learning_rate} "
                "or set max_grad_norm"
            )
        return means


def _layout(x_B: Tensor) -> Tensor:
    """Images channels_last, tables unchanged."""
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
    # OneCycleLR divides by pct_start * total_steps - 1, which is 0 for four steps and pct_start 0.25.
    pct_start = 0.25 if total_steps != 4 else 0.3
    return OneCycleLR(optimizer, config.learning_rate, total_steps=total_steps, pct_start=pct_start)


def _average(model: nn.Module, config: OptimConfig) -> AveragedModel | None:
    if config.ema_decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)


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
    # After `model.to`: weights moved in inference mode cannot be trained again.
    with torch.inference_mode(), compute.autocast():
        for x_B in inputs_N.split(batch_size):
            outputs.append(model(_layout(transform(x_B.to(device)))).float().cpu())
        return torch.cat(outputs)
