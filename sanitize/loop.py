"""The training loop: forward, loss, step, and a stop where numbers cease to be finite. All that trains uses it.

Shapes: B batch, C H W image, K classes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import NumericsError

Batches = Iterator[tuple[Tensor, Tensor]]


class OptimConfig(BaseModel):
    """Optimiser and schedule.

    Attributes:
        optimizer: AdamW, or SGD with Nesterov momentum 0.9.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: on all parameters.
        epochs: passes over the data.
        batch_size: samples a step.
        max_grad_norm: clip the global gradient norm; None leaves it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    epochs: int = Field(default=6, ge=1)
    batch_size: int = Field(default=128, ge=2)
    max_grad_norm: float | None = Field(default=None, gt=0)


def train(
    model: nn.Module,
    epoch: Callable[[], Batches],
    steps_per_epoch: int,
    config: OptimConfig,
    compute: Compute,
    transform: Callable[[Tensor], Tensor],
    on_step: Callable[[int], None] = lambda _n: None,
) -> list[dict[str, float]]:
    """Train `model` in place by cross-entropy.

    Args:
        model: float module, images (B, C, H, W) to logits (B, K); moved to the device, channels_last.
        epoch: gives the batches of the next epoch, (uint8 images, int64 labels) on the CPU.
        steps_per_epoch: number of batches `epoch` gives.
        config: optimiser and schedule.
        compute: device and precision.
        transform: uint8 images on the device to the float images the model takes (normalisation, augmentation).
        on_step: told the batch size after each step, for progress bars.

    Returns:
        One row an epoch: mean loss and accuracy on the training batches, in [0, 1].

    Raises:
        NumericsError: the loss is not finite; checked once an epoch, so that the device is never waited for.
    """
    device = compute.torch_device
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = _optimizer(model, config, device)
    total_steps = config.epochs * steps_per_epoch
    # OneCycleLR divides by pct_start * total_steps - 1: by nothing where there are just four steps.
    pct_start = 0.25 if total_steps != 4 else 0.3
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total_steps, pct_start=pct_start
    )
    history = []
    for number in range(config.epochs):
        total_2 = torch.zeros(2, device=device)  # sum of losses, number correct
        n_seen = 0
        for images_BCHW, labels_B in epoch():
            x_BCHW = images_BCHW.to(device, non_blocking=True)
            y_B = labels_B.to(device, non_blocking=True)
            with compute.autocast():
                logits_BK = model(transform(x_BCHW).contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(logits_BK.float(), y_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            total_2 += torch.stack([loss.detach() * len(y_B), (logits_BK.argmax(1) == y_B).sum()])
            n_seen += len(y_B)
            on_step(len(y_B))
        loss_mean, accuracy = (total_2 / n_seen).tolist()
        if not math.isfinite(loss_mean):
            raise NumericsError(
                f"training loss is {loss_mean} in epoch {number + 1}; lower learning_rate={config.learning_rate} "
                "or set max_grad_norm"
            )
        history.append({"epoch": number + 1, "loss": loss_mean, "accuracy": accuracy})
    return history


def _optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            config.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True)


@torch.inference_mode()
def predict(
    model: nn.Module,
    images_NCHW: Tensor,
    transform: Callable[[Tensor], Tensor],
    compute: Compute,
    batch_size: int = 512,
) -> Tensor:
    """Logits (N, K), float32 on the CPU, of uint8 images; the model is used in eval mode."""
    device = compute.torch_device
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    logits = []
    for x_BCHW in images_NCHW.split(batch_size):
        with compute.autocast():
            x_BCHW = transform(x_BCHW.to(device)).contiguous(memory_format=torch.channels_last)
            logits.append(model(x_BCHW).float().cpu())
    return torch.cat(logits)
