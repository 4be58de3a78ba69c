"""Training of one network in several processes (torchrun): each has a share of every batch, and gradients are summed.

All processes run the same program. In a single process the functions here return their input or do nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sanitize.compute import Compute

T = TypeVar("T")
LEAVE_SECONDS = 60  # for the other processes to come to their end


@contextmanager
def joined(compute: Compute) -> Iterator[None]:
    """Join the process group, if torchrun started this process; each process takes a GPU of its own.

    Raises:
        ConfigError: the device is a single GPU by its number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = compute.take_gpu(int(os.environ["LOCAL_RANK"]))
    # Rank 0 may index shards for hours while the others wait. If a process dies, torchrun ends the others.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=7))
    try:
        yield
        _wait_for_others()
    finally:
        dist.destroy_process_group()


def _wait_for_others() -> None:
    """Wait until all processes have come to their end, for a minute at most.

    A process that leaves while another is still in the last collective call closes the connection under it. There is no
    waiting after a failure: the others may never come.
    """
    with suppress(RuntimeError):  # too late, or another process has died: torchrun ends the others
        dist.all_reduce(torch.zeros(1), async_op=True).wait(timedelta(seconds=LEAVE_SECONDS))


def world() -> tuple[int, int]:
    """Rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(tensors_B: Iterable[Tensor]) -> list[Tensor]:
    """This process's share of a batch (B, ...) that is the same in all processes."""
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
    """Wait until all processes have called this function."""
    if world()[1] > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, unlike `dist.barrier`: gloo is always available


def by_process(value: Tensor) -> list[Tensor]:
    """Tensors of all processes, of one shape, in the order of their ranks."""
    values = [torch.empty_like(value) for _ in range(world()[1])]
    if len(values) == 1:
        return [value]
    dist.all_gather(values, value)
    return values


def rank0_first(work: Callable[[], T]) -> T:
    """Call `work` in rank 0 alone, then in the other processes, which find its results."""
    rank, _ = world()
    if rank > 0:
        barrier()
    result = work()
    if rank == 0:
        barrier()
    return result


def broadcast(value: bool) -> bool:
    """The value of rank 0, in all processes."""
    sent = torch.tensor(value, dtype=torch.int32)
    if world()[1] > 1:
        dist.broadcast(sent, 0)
    return bool(sent)


def weighted(mean: Tensor, count: Tensor) -> Tensor:
    """Weight a mean over `count` samples of this process; the sum over processes is then the mean over all samples."""
    return mean if world()[1] == 1 else mean * (count / total(count).clamp(min=1))


def add_gradients(model: nn.Module) -> None:
    """Replace every gradient by its sum over all processes, in one all-reduce."""
    if world()[1] == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
