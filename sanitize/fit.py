"""Training on a data set, shared by several stages: settings, a classifier's training, place of snapshots."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor, nn

from sanitize.artifacts import partial_of
from sanitize.augment import AugmentConfig
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import Joined, shuffled
from sanitize.loop import Objective, OptimConfig, train
from sanitize.models.architectures import Architecture
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.progress import track
from sanitize.snapshots import Snapshots, training
from sanitize.storage import is_local, local_path


class FitConfig(BaseModel):
    """A network and how it is trained on a data set.

    Attributes:
        architecture: the network.
        mean, std: normalisation of each channel on the scale [0, 1].
        optim: optimizer, schedule, epochs.
        cache_bytes: decoded images held on the device; a larger data set is streamed through a buffer of this size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture = ConvNetConfig()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)
    optim: OptimConfig = OptimConfig()
    cache_bytes: int = Field(default=2**30, gt=0)

    def describe(self, dataset: Dataset, **more: Any) -> ModelConfig:
        """The network for the classes and images of a data set; `more` goes to `ModelConfig`."""
        return ModelConfig(
            architecture=self.architecture,
            n_classes=dataset.n_classes,
            image_shape=dataset.image_shape,
            mean=self.mean,
            std=self.std,
            **more,
        )


class ClassifierConfig(FitConfig):
    """A classifier and how it is trained on a data set.

    Attributes:
        architecture, mean, std, optim, cache_bytes: as in `FitConfig`.
        augment: random changes of the normalised images, made on the device.
    """

    augment: AugmentConfig = AugmentConfig()


def fit_classifier(
    model: nn.Module,
    model_config: ModelConfig,
    config: ClassifierConfig,
    dataset: Dataset,
    compute: Compute,
    *,
    description: str,
    stream: str,
    generator: torch.Generator,
    pixels: Callable[[Tensor], Tensor] = lambda images_BCHW: images_BCHW.float() / 255,
    objective: Objective | None = None,
    measure: Callable[[nn.Module], dict[str, float]] = lambda _model: {},
    snapshots: Snapshots | None = None,
    carried: Mapping[str, Tensor | torch.Generator] | None = None,
    name_of: Callable[[int], str] = str,
    only: Mapping[str, set[int]] | None = None,
    further: tuple[Tensor, Tensor] | None = None,
) -> list[dict[str, float]]:
    """Train a classifier in place on the usable samples of a data set.

    Args:
        model: the network to train, or a module around it.
        model_config: description of the network; its normalisation is used.
        config: optimizer, augmentation, memory.
        dataset: samples to learn from.
        compute: device, precision, seed.
        description: text of the progress bar.
        stream: name of the random stream for the order of samples.
        generator: CPU generator of the augmentation.
        pixels: maps uint8 images to float32 images on [0, 1], before they are normalised.
        objective, measure, snapshots, carried, name_of: as for `sanitize.loop.train`.
        only: positions of the samples to learn from, by shard; None takes all usable samples.
        further: images (M, C, H, W), uint8, and labels (M,) to learn from in addition, all in every epoch.

    Returns:
        The history, one row an epoch; its means count the further samples too.

    Raises:
        NumericsError: training diverged.
    """
    order = partial(compute.generator, stream, "shuffle")
    data = shuffled(dataset, config.optim.batch_size, config.cache_bytes, order, compute.torch_device, only)
    per_epoch, epoch = data.steps_per_epoch * data.batch_size, data.epoch
    if further is not None and len(further[1]):
        joined = Joined(data, *further, dataset.n_samples, partial(compute.generator, stream, "further"))
        per_epoch, epoch = joined.samples_per_epoch, joined.epoch
    with track(description, config.optim.epochs * per_epoch) as advance, training(snapshots):
        return train(
            model,
            epoch,
            data.steps_per_epoch,
            config.optim,
            compute,
            lambda images_BCHW: config.augment(model_config.standardise(pixels(images_BCHW)), generator),
            advance,
            objective,
            measure,
            snapshots,
            carried,
            name_of,
            lambda row: advance.note(noted(row)),
            unit=model_config.pixel_unit,
        )


def noted(row: Mapping[str, float]) -> str:
    """A row of a history on one line, for progress bars."""
    return ", ".join(f"{name} {value:.3g}" for name, value in row.items())


def snapshots_of(out: str, every: int) -> Snapshots | None:
    """Snapshots of a training whose artifact will be at `out`; None in an object store, where none are kept."""
    return Snapshots(local_path(partial_of(out)) / "snapshot", every) if is_local(out) else None
