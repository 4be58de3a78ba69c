"""Neural Cleanse (Wang et al., 2019): reverse-engineer a trigger for each class; a far smaller one is a backdoor.

For each class y, a mask m (H, W) and a pattern p (C, H, W), both in [0, 1], minimise on clean images x

    CE(f((1 - m) x + m p), y) + lambda |m|_1                                                             (Eq. 3)

where lambda grows while enough images are predicted as y, and falls otherwise (section V-A). The smallest mask with the
required success is kept. A class is suspicious if its |m|_1 lies more than `threshold` times 1.4826 median absolute
deviations below the median (section IV-C). Repair is unlearning (section VI-C): fine-tuning on clean images, a fifth of
which carry a found trigger, with their true label. If no class is suspicious, the model is not changed: all-to-all
attacks, and triggers as large as the image, are not detected.

Shapes: N images, B batch, C H W image, K classes.
"""

import copy
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.loop import OptimConfig
from sanitize.models.pixels import OnPixels
from sanitize.repairs.fine_tuning import FINE_TUNING, fine_tune
from sanitize.repairs.inputs import BaseRepairConfig, Needs, Repair, Repaired, RepairInputs, held_out_accuracy


class FoundTrigger(NamedTuple):
    """A trigger that turns the predictions of images into one class.

    Attributes:
        mask_HW: weight of the pattern, in [0, 1].
        pattern_CHW: colours, in [0, 1].
    """

    mask_HW: Tensor
    pattern_CHW: Tensor

    def stamp(self, x_BCHW: Tensor) -> Tensor:
        """Float images on [0, 1] with the trigger."""
        return (1 - self.mask_HW) * x_BCHW + self.mask_HW * self.pattern_CHW

    @property
    def size(self) -> float:
        """|m|_1, in pixels."""
        return float(self.mask_HW.detach().sum())


class NeuralCleanseConfig(BaseRepairConfig):
    """Invert triggers, unlearn the suspicious ones.

    Attributes:
        steps: steps of Adam for each class.
        learning_rate: learning rate of Adam.
        batch_size: clean images in a step.
        success: required share of a batch that is predicted as the class.
        size_weight: initial lambda.
        patience: successive steps with, or without, success until lambda changes.
        threshold: deviations below the median from which a class is suspicious.
        stamped_fraction: share of the clean images that carry a trigger in the unlearning.
        optim: optimiser of the unlearning.
    """

    kind: Literal["neural_cleanse"] = "neural_cleanse"
    needs: ClassVar[Needs] = "clean"
    steps: int = Field(default=400, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    batch_size: int = Field(default=64, ge=1)
    success: float = Field(default=0.99, gt=0, le=1)
    size_weight: float = Field(default=1e-3, gt=0)
    patience: int = Field(default=5, ge=1)
    threshold: float = Field(default=2.0, gt=0)
    stamped_fraction: float = Field(default=0.2, gt=0, le=1)
    optim: OptimConfig = FINE_TUNING

    def build(self) -> Repair:
        """The function `repair` with these settings."""
        return partial(repair, self)


def repair(config: NeuralCleanseConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
    """Unlearn in a copy of `model`; `done` has size and anomaly index of each class, and the suspicious classes."""
    compute.activate()
    clean, n_classes = inputs.clean_images(), inputs.config.n_classes
    model = copy.deepcopy(model).to(compute.torch_device).eval()
    triggers = [invert(config, model, label, inputs, compute) for label in range(n_classes)]
    sizes_K = torch.tensor([trigger.size for trigger in triggers], dtype=torch.float64)
    index_K = anomaly_index(sizes_K)
    suspicious = [label for label in range(n_classes) if index_K[label] > config.threshold]
    if suspicious:
        found = [triggers[label] for label in suspicious]
        images_NCHW = _stamped(config, clean.images_NCHW, found, compute)
        fine_tune(model, images_NCHW, clean.labels_N, config.optim, inputs.config, compute)
    done = {"sizes": sizes_K.tolist(), "anomaly_index": index_K.tolist(), "suspicious": suspicious}
    return Repaired(model, done | {"held_out_accuracy": held_out_accuracy(model, inputs, compute)})


def invert(
    config: NeuralCleanseConfig, model: nn.Module, label: int, inputs: RepairInputs, compute: Compute
) -> FoundTrigger:
    """The smallest trigger found that turns clean images into `label`; without success, the last one."""
    device = compute.torch_device
    on_pixels = OnPixels(model, inputs.config).to(device).eval()
    channels, height, width = inputs.config.image_shape
    generator = compute.generator("repair", "neural_cleanse", label, "start")
    start = 2 * torch.rand(channels + 1, height, width, generator=generator) - 1
    free = start.to(device).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=config.learning_rate, betas=(0.5, 0.9))
    size_weight, n_good, n_bad = config.size_weight, 0, 0
    best: FoundTrigger | None = None
    for images_BCHW, _ in inputs.clean_batches(config.steps, config.batch_size, compute, "neural_cleanse", label):
        trigger = _trigger(free)
        with compute.autocast():
            logits_BK = on_pixels(trigger.stamp(images_BCHW / 255)).float()
        wanted_B = torch.full((len(logits_BK),), label, device=device)
        loss = nn.functional.cross_entropy(logits_BK, wanted_B) + size_weight * trigger.mask_HW.sum()
        (free.grad,) = torch.autograd.grad(loss, free)
        succeeds = float((logits_BK.argmax(1) == label).float().mean()) >= config.success
        if succeeds and (best is None or trigger.size < best.size):
            best = FoundTrigger(*(tensor.detach() for tensor in trigger))
        n_good, n_bad = (n_good + 1, 0) if succeeds else (0, n_bad + 1)
        if max(n_good, n_bad) == config.patience:
            size_weight *= 1.5 if succeeds else 1.5**-1.5
            n_good = n_bad = 0
        optimizer.step()
    return best or FoundTrigger(*(tensor.detach() for tensor in _trigger(free)))


def _stamped(
    config: NeuralCleanseConfig, images_NCHW: Tensor, triggers: list[FoundTrigger], compute: Compute
) -> Tensor:
    """Copies of uint8 images, a share of which carry one of the triggers each."""
    n_stamped = max(1, round(config.stamped_fraction * len(images_NCHW)))
    rows = torch.randperm(len(images_NCHW), generator=compute.generator("repair", "neural_cleanse", "stamp"))
    images_NCHW = images_NCHW.clone()
    for number, trigger in enumerate(triggers):
        mine = rows[:n_stamped][number :: len(triggers)]
        stamped = trigger.stamp(images_NCHW[mine].to(trigger.mask_HW.device) / 255)
        images_NCHW[mine] = (255 * stamped).round().clamp(0, 255).to("cpu", torch.uint8)
    return images_NCHW


def anomaly_index(sizes_K: Tensor) -> Tensor:
    """Distance of each size below the median, in 1.4826 median absolute deviations; negative above the median."""
    below_K = sizes_K.quantile(0.5) - sizes_K
    return below_K / (1.4826 * below_K.abs().quantile(0.5)).clamp(min=1e-12)


def _trigger(free: Tensor) -> FoundTrigger:
    """Mask and pattern of unbounded numbers (1 + C, H, W)."""
    mask_and_pattern = (torch.tanh(free) + 1) / 2
    return FoundTrigger(mask_and_pattern[0], mask_and_pattern[1:])
