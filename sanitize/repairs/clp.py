"""Channel Lipschitz pruning (Zheng, Tang, Li & Liu, 2022, "Data-free Backdoor Removal based on Channel Lipschitzness").

A channel that reacts to a small trigger must be sensitive. The upper bound of the Lipschitz constant of channel k
(section 4.2) is the largest singular value of its kernel, reshaped to (input channels, rest), times the scale
|gamma_k| / sigma_k of the BatchNorm behind it. Channels above mean + u standard deviations of their layer are pruned
(Algorithm 1). No data is needed.

In a layer of C channels no value lies above (C - 1) / sqrt(C) deviations: u = 3 prunes only where C is 11 or more.
"""

import copy
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.repairs.channels import find_channels, outliers, prune
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs
from sanitize.repairs.sites import Site


class CLPConfig(BaseRepairConfig):
    """Prune channels that are too sensitive.

    Attributes:
        u: standard deviations above the mean of the layer from which a channel is pruned.
    """

    kind: Literal["clp"] = "clp"
    needs: ClassVar[Needs] = "nothing"
    u: float = Field(default=3.0, gt=0)

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: CLPConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Prune a copy of `model`; `done` has the number of pruned channels of each layer."""
    compute.activate()
    model = copy.deepcopy(model).eval()
    pruned = {}
    for site in find_channels(model, inputs.config.example()):
        channels_C = outliers(lipschitz_bounds(model, site), config.u)
        prune(model, site, channels_C, keep_bias=False)
        pruned[site.name] = int(channels_C.sum())
    return Repaired(model, {"pruned": pruned})


@torch.no_grad()
def lipschitz_bounds(model: nn.Module, site: Site) -> Tensor:
    """Upper bound of the Lipschitz constant of each channel, (C,) float64."""
    weight: Tensor = model.get_submodule(site.linear).weight  # type: ignore[assignment]
    bound_C = torch.linalg.matrix_norm(weight.double().reshape(*weight.shape[:2], -1), ord=2)
    if site.norm is None:
        return bound_C
    norm: Any = model.get_submodule(site.norm)
    return bound_C * (norm.weight / (norm.running_var + norm.eps).sqrt()).double().abs()
