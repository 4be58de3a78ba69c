"""Small data sets that live on the device: shuffled batches without a copy from the host."""

import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.loop import Batches


class Resident:
    """Batches of a data set held on the device as it is (images uint8), with the row of each sample.

    Args:
        inputs_N: (N, C, H, W) uint8 or (N, D) float.
        targets_N: labels (N,) int64 or targets (N, K) float.
        batch_size: the last incomplete batch of an epoch is dropped unless it is the only one.
        compute: device, and the seed of the order.
    """

    def __init__(self, inputs_N: Tensor, targets_N: Tensor, batch_size: int, compute: Compute) -> None:
        self.inputs_N = inputs_N.to(compute.torch_device)
        self.targets_N = targets_N.to(compute.torch_device)
        self.batch_size = min(batch_size, len(inputs_N))
        self.generator = compute.generator("resident", "shuffle")

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return len(self.inputs_N) // self.batch_size

    def epoch(self) -> Batches:
        """One pass in a new random order: (inputs, targets, rows)."""
        order_N = torch.randperm(len(self.inputs_N), generator=self.generator).to(self.inputs_N.device)
        for rows_B in order_N.split(self.batch_size)[: self.steps_per_epoch]:
            yield self.inputs_N[rows_B], self.targets_N[rows_B], rows_B
