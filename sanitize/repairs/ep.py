"""Entropy-based pruning (Zheng, Tang, Li & Liu, 2022, "Pre-activation Distributions Expose Backdoor Neurons").

On poisoned training data the pre-activation of a backdoor neuron has two modes, one of them small, so that its entropy
is low after standardisation (section 4.2). Neurons more than u standard deviations below the mean entropy of their
layer are pruned. The pre-activation of a convolution is its spatial maximum, and its entropy is taken from a histogram,
as in the authors' code. Two passes over the data: one for mean and variance, one for the histogram.

Shapes: B batch, C channels, b bins.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.repairs.channels import find_channels, outliers, prune, spatial_max
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs
from sanitize.repairs.sites import Site, watching

_REACH = 10.0  # standard deviations on either side; values beyond are counted in the last bin


class EPConfig(BaseRepairConfig):
    """Prune channels with two modes on the training data.

    Attributes:
        u: standard deviations below the mean entropy of the layer from which a channel is pruned.
        bin_width: width of a bin of the histogram, in standard deviations of the channel.
    """

    kind: Literal["ep"] = "ep"
    needs: ClassVar[Needs] = "untrusted"
    u: float = Field(default=3.0, gt=0)
    bin_width: float = Field(default=0.1, gt=0, le=1)

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: EPConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Prune a copy of `model`; `done` has the number of pruned channels of each layer."""
    compute.activate()
    model = copy.deepcopy(model).to(compute.torch_device).eval()
    sites = find_channels(model, inputs.config.example())
    shape = _shape(model, sites, inputs, compute)
    histograms = {site.name: Histogram(*shape[site.name], config.bin_width) for site in sites}
    _watch(model, sites, inputs, compute, lambda site, y_BC: histograms[site.name].add(y_BC))
    pruned = {}
    for site in sites:
        channels_C = outliers(-histograms[site.name].entropy(), config.u)
        prune(model, site, channels_C, keep_bias=True)
        pruned[site.name] = int(channels_C.sum())
    return Repaired(model, {"pruned": pruned})


class Histogram:
    """Counts of the standardised values of each channel.

    Args:
        mean_C, deviation_C: mean and standard deviation of each channel, float64.
        bin_width: width of a bin, in standard deviations.
    """

    def __init__(self, mean_C: Tensor, deviation_C: Tensor, bin_width: float) -> None:
        self.mean_C, self.bin_width = mean_C, bin_width
        self.deviation_C = deviation_C.clamp(min=1e-30)  # a constant channel falls into one bin
        self.counts_Cb = torch.zeros(len(mean_C), round(2 * _REACH / bin_width), dtype=torch.int64)

    def add(self, y_BC: Tensor) -> None:
        """Count the values of a batch."""
        n_channels, n_bins = self.counts_Cb.shape
        z_BC = (y_BC - self.mean_C) / self.deviation_C
        bins_BC = ((z_BC + _REACH) / self.bin_width).clamp(0, n_bins - 1).long()
        flat_BC = bins_BC + n_bins * torch.arange(n_channels)
        self.counts_Cb += torch.bincount(flat_BC.flatten(), minlength=n_channels * n_bins).view(n_channels, n_bins)

    def entropy(self) -> Tensor:
        """- sum p log p over the bins, (C,) float64, in nats."""
        p_Cb = self.counts_Cb / self.counts_Cb.sum(1, keepdim=True)
        return torch.special.entr(p_Cb.double()).sum(1)


def _shape(
    model: nn.Module, sites: list[Site], inputs: RepairInputs, compute: Compute
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each channel, float64."""
    sums = {site.name: torch.zeros(2, site.n_features, dtype=torch.float64) for site in sites}

    def add(site: Site, y_BC: Tensor) -> None:
        sums[site.name] += torch.stack([y_BC.sum(0), y_BC.square().sum(0)])

    n = _watch(model, sites, inputs, compute, add)
    means = {name: sums_2C / n for name, sums_2C in sums.items()}
    return {
        name: (mean_2C[0], (mean_2C[1] - mean_2C[0].square()).clamp(min=0).sqrt()) for name, mean_2C in means.items()
    }


@torch.inference_mode()
def _watch(
    model: nn.Module,
    sites: list[Site],
    inputs: RepairInputs,
    compute: Compute,
    see: Callable[[Site, Tensor], None],
) -> int:
    """One pass over the training data: `see` is called with spatial maxima (B, C), float64.

    Returns:
        Number of samples.
    """

    def on_activation(site: Site, y_BCX: Tensor) -> None:
        see(site, spatial_max(y_BCX).cpu().double())

    n = 0
    with watching(model, sites, on_activation):
        for batch in inputs.untrusted_batches():
            with compute.autocast():
                model(inputs.config.normalise(batch.images_BCHW.to(compute.torch_device)))
            n += len(batch.labels_B)
    return n
