"""Several processes that train one network (torchrun): each has a share of every batch, and gradients are added up.

All of them run the same program. In a single process every function here does nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sanitize.compute import Compute

T = TypeVar("T")


@contextmanager
def joined(compute: Compute) -> Iterator[None]:
    """Be one of the processes that torchrun started, if it started this one; each takes a GPU of its own.

    Raises:
        ConfigError: the device is one GPU, for all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = compute.take_gpu(int(os.environ["LOCAL_RANK"]))
    # The first process may index shards for hours while the others wait. Where one dies, torchrun ends the others.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


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


def barrier() -> None:
    """Wait until all processes are here."""
    if world()[1] > 1:
        dist.all_reduce(torch.zeros(1))  # unlike `dist.barrier` on the CPU, where all of them have gloo


def by_process(value: Tensor) -> list[Tensor]:
    """The tensors of all processes, alike in shape, in the order of their numbers."""
    values = [torch.empty_like(value) for _ in range(world()[1])]
    if len(values) == 1:
        return [value]
    dist.all_gather(values, value)
    return values


def rank0_first(work: Callable[[], T]) -> T:
    """Let the first process work alone; when it is done the others do the same, and find what it made."""
    rank, _ = world()
    if rank > 0:
        barrier()
    result = work()
    if rank == 0:
        barrier()
    return result


def broadcast(answer: bool) -> bool:
    """The first process's answer, in all of them."""
    said = torch.tensor(answer, dtype=torch.int32)
    if world()[1] > 1:
        dist.broadcast(said, 0)
    return bool(said)


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
