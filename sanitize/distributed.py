"""Several processes that train one network (torchrun): each has a share of every batch, and gradients are added up.

In a single process every function here does nothing.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(tensors_B: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of a batch that all of them drew alike."""
    rank, size = world()
    return [tensor_B.tensor_split(size)[rank] for tensor_B in tensors_B]


def total(value: Tensor) -> Tensor:
    """Sum over all processes; no gradient flows through it."""
    value = value.detach()
    if world()[1] > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def weighted(mean: Tensor, count: Tensor) -> Tensor:
    """A mean over `count` samples of this process, weighted so that the sum over processes is the mean over all."""
    return mean if world()[1] == 1 else mean * (count / total(count).clamp(min=1))


def add_gradients(model: nn.Module) -> None:
    """Replace every gradient by its sum over all processes, in one message."""
    if world()[1] == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
