"""Fine-tuning: a few more epochs on clean images. The baseline of all repairs, and a part of several."""

import copy
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.loop import Objective, OptimConfig, train
from sanitize.models.config import ModelConfig
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs, held_out_accuracy

FINE_TUNING = OptimConfig(
    optimizer="sgd", learning_rate=0.01, schedule="constant", weight_decay=5e-4, epochs=10, batch_size=64
)


class FineTuningConfig(BaseRepairConfig):
    """Train on clean images.

    Attributes:
        optim: optimiser and schedule.
    """

    kind: Literal["fine_tuning"] = "fine_tuning"
    needs: ClassVar[Needs] = "clean"
    optim: OptimConfig = FINE_TUNING

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: FineTuningConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Fine-tune a copy of `model` on the clean images; `done` has the held-out accuracy."""
    compute.activate()
    clean = inputs.clean_images()
    model = copy.deepcopy(model)
    fine_tune(model, clean.images_NCHW, clean.labels_N, config.optim, inputs.config, compute)
    return Repaired(model, {"held_out_accuracy": held_out_accuracy(model, inputs, compute)})


def fine_tune(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    optim: OptimConfig,
    config: ModelConfig,
    compute: Compute,
    objective: Objective | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train `model` in place, and leave it in eval mode.

    Args:
        model: the network.
        images_NCHW: uint8.
        labels_N: int64.
        optim: optimiser and schedule.
        config: normalisation.
        compute: device, precision, and seed of the order.
        objective: function to minimise; None is cross-entropy.
        after_step: called after each step, for instance to keep pruned weights at 0.
    """
    compute.seed_global("repair", "torch")  # dropout
    data = Resident(
        images_NCHW, labels_N, optim.batch_size, lambda epoch: compute.generator("repair", "shuffle", epoch)
    )
    train(
        model,
        data.epoch,
        data.steps_per_epoch,
        optim,
        compute,
        config.normalise,
        on_step=lambda _n: after_step(),
        objective=objective,
        unit=config.pixel_unit,
    )
    model.eval()
