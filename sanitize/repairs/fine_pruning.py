"""Fine-pruning (Liu, Dolan-Gavitt & Garg, 2018, section 3.3): prune channels that are dormant on clean images, then
fine-tune.

A backdoor uses neurons that clean images do not activate. Channels of the last convolution are pruned in the order of
their mean activation on clean images, until the accuracy on held-out images would fall by more than allowed. Then
fine-tuning removes the backdoor from neurons that clean images do activate.
"""

import copy
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.loop import OptimConfig, predict
from sanitize.repairs.channels import find_channels, prune, prune_in_order
from sanitize.repairs.fine_tuning import FINE_TUNING, fine_tune
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs, held_out_accuracy
from sanitize.repairs.sites import Site, watching


class FinePruningConfig(BaseRepairConfig):
    """Prune, then fine-tune.

    Attributes:
        max_drop: largest loss of accuracy on held-out clean images by pruning, in [0, 1]; 0.04 in the paper.
        optim: optimiser of the fine-tuning.
    """

    kind: Literal["fine_pruning"] = "fine_pruning"
    needs: ClassVar[Needs] = "clean"
    max_drop: float = Field(default=0.04, ge=0, le=1)
    optim: OptimConfig = FINE_TUNING

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: FinePruningConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Prune and fine-tune a copy of `model`; `done` has the number of pruned channels and the held-out accuracy.

    Raises:
        ConfigError: the network has no convolution.
    """
    compute.activate()
    clean = inputs.clean_images()
    model = copy.deepcopy(model).to(compute.torch_device).eval()
    sites = [
        site
        for site in find_channels(model, inputs.config.example())
        if isinstance(model.get_submodule(site.linear), nn.Conv2d)
    ]
    if not sites:
        raise ConfigError("fine-pruning prunes the last convolution, and the network has none")
    site = sites[-1]
    order = [(site, channel) for channel in _activity(model, site, inputs, compute).argsort().tolist()]
    pruned = prune_in_order(model, order, config.max_drop, False, inputs, compute)
    pruned_c = torch.tensor(pruned[site.name], dtype=torch.int64)

    def keep_pruned() -> None:
        prune(model, site, pruned_c, keep_bias=False)

    fine_tune(model, clean.images_NCHW, clean.labels_N, config.optim, inputs.config, compute, after_step=keep_pruned)
    accuracy = held_out_accuracy(model, inputs, compute)
    return Repaired(model, {"pruned": {site.name: len(pruned_c)}, "held_out_accuracy": accuracy})


def _activity(model: nn.Module, site: Site, inputs: RepairInputs, compute: Compute) -> Tensor:
    """Mean of each channel after a ReLU, over clean images and positions, (C,) float64."""
    total_C = torch.zeros(site.n_features, dtype=torch.float64)

    def add(_site: Site, y_BCX: Tensor) -> None:
        total_C.add_(y_BCX.relu().flatten(2).mean(2).double().sum(0).cpu())

    images_NCHW = inputs.clean_images().images_NCHW
    with watching(model, [site], add):
        predict(model, images_NCHW, inputs.config.normalise, compute)
    return total_C / len(images_NCHW)
