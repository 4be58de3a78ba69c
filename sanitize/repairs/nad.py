"""Neural attention distillation (Li, Lyu, Koren, Lyu, Li & Ma, 2021): the attention maps of the suspect network are
drawn to those of a fine-tuned copy.

The attention map of an activation is the sum of its squares over channels (Eq. 1, p = 2), normalised to length one. The
student minimises cross-entropy plus beta times the distance between its maps and the teacher's (Eq. 2 and 3), on clean
images. Maps are taken after the ReLU of the last convolution of each resolution; the distance is the mean square, as in
the authors' code, to which beta is scaled. Shapes: B batch, C channels, H W map.
"""

import copy
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.loop import Objective, OptimConfig, Step, TrainBatch
from sanitize.models.config import ModelConfig
from sanitize.models.trace import trace
from sanitize.repairs.channels import find_channels
from sanitize.repairs.fine_tuning import FINE_TUNING, fine_tune
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs, held_out_accuracy
from sanitize.repairs.sites import Site, watching


class NADConfig(BaseRepairConfig):
    """Distil attention maps.

    Attributes:
        beta: weight of the distance between the maps.
        teacher: optimiser of the teacher's fine-tuning.
        optim: optimiser of the student.
    """

    kind: Literal["nad"] = "nad"
    needs: ClassVar[Needs] = "clean"
    beta: float = Field(default=1000.0, ge=0)
    teacher: OptimConfig = FINE_TUNING
    optim: OptimConfig = FINE_TUNING.model_copy(update={"epochs": 20})

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: NADConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Distil into a copy of `model`; `done` has the names of the compared activations."""
    compute.activate()
    clean = inputs.clean_images()
    sites = last_of_each_resolution(model, inputs.config)
    if not sites:
        raise ConfigError("attention distillation needs a network with feature maps")
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    fine_tune(teacher, clean.images_NCHW, clean.labels_N, config.teacher, inputs.config, compute)
    objective = _distillation(teacher, sites, config.beta, compute)
    fine_tune(student, clean.images_NCHW, clean.labels_N, config.optim, inputs.config, compute, objective)
    accuracy = held_out_accuracy(student, inputs, compute)
    return Repaired(student, {"maps": [site.name for site in sites], "held_out_accuracy": accuracy})


def last_of_each_resolution(model: nn.Module, config: ModelConfig) -> list[Site]:
    """The layer that runs last at each size of feature maps with more than one position."""
    shapes = {call.name: call.y.shape for call in trace(model, config.example())}
    last = {shapes[site.name][2:]: site for site in find_channels(model, config.example())}
    return [site for size, site in last.items() if len(size) == 2 and size.numel() > 1]


def attention(y_BCHW: Tensor) -> Tensor:
    """Attention maps of length one, (B, H W)."""
    return nn.functional.normalize(y_BCHW.relu().float().square().sum(1).flatten(1), dim=1)


def _distillation(teacher: nn.Module, sites: list[Site], beta: float, compute: Compute) -> Objective:
    def maps(model: nn.Module, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []
        with watching(model, sites, lambda _site, y_BCHW: seen.append(attention(y_BCHW))), compute.autocast():
            logits_BK = model(x_BCHW)
        return logits_BK.float(), seen

    def objective(model: nn.Module, batch: TrainBatch, _epoch: int) -> Step:
        with torch.no_grad():
            _, wanted = maps(teacher, batch.x_B)
        logits_BK, seen = maps(model, batch.x_B)
        distance = sum(
            (nn.functional.mse_loss(map_BN, wanted_BN) for map_BN, wanted_BN in zip(seen, wanted, strict=True)),
            start=torch.zeros((), device=logits_BK.device),
        )
        loss = nn.functional.cross_entropy(logits_BK, batch.y_B) + beta * distance
        return Step(loss, {"loss": loss.detach() * len(batch.y_B)})

    return objective
