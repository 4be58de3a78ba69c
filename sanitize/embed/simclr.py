"""SimCLR (Chen, Kornblith, Norouzi & Hinton, 2020): an encoder trained on images alone, without their labels.

Each image gives two random views, and the network learns to find the other view of an image among all views of the
batch. With z the projection of a view, s_ij the cosine of z_i and z_j, and p(i) the other view of the image of view i,
    loss_i = -log( exp(s_ip(i) / t) / sum_{j != i} exp(s_ij / t) )                                        (NT-Xent).
The projection, two Linears behind the encoder, is discarded.

Wrong labels have no influence, and triggers that the views crop or fade are hardly learned. The encoder is used by
B. Liu (2022), Algorithm 7, which trains only the last layer on labels, and as an embedding for `neighbours`.

Shapes: B images of a batch, V = 2 B views, D features of the projection.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from sanitize.artifacts import Part
from sanitize.augment import AugmentConfig
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import Resident, Streamed, buffer_bytes, shuffled
from sanitize.distributed import weighted, world
from sanitize.errors import ConfigError
from sanitize.fit import FitConfig, noted, snapshots_of
from sanitize.loop import Objective, OptimConfig, Step, TrainBatch, train
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.taps import find_taps
from sanitize.plural import counted
from sanitize.progress import track
from sanitize.snapshots import Snapshots, training
from sanitize.stage import Work, stage


class SimCLRConfig(FitConfig):
    """The encoder, its views of an image, and how it is trained.

    Attributes:
        architecture: the network; the layers before its last Linear are the encoder.
        mean, std, cache_bytes: as in `FitConfig`.
        views: random changes that make a view of an image. The encoder may learn whatever they leave unchanged,
            triggers included.
        temperature: t; at lower values, the most similar other images count more.
        projection: widths of the hidden layer of the projection and of z.
        optim: optimizer, schedule, epochs. The other images of a batch are the negatives.
        snapshot_every: steps between two snapshots; a killed run resumes from the last one, and without one the
            training begins again. Snapshots are kept on a disk, not in an object store.
    """

    kind: Literal["simclr"] = "simclr"
    views: AugmentConfig = AugmentConfig(crop=0.3, flip=True, brightness=0.4, contrast=0.4, saturation=0.4, grey=0.2)
    temperature: float = Field(default=0.5, gt=0)
    projection: tuple[PositiveInt, PositiveInt] = (128, 64)
    optim: OptimConfig = OptimConfig(epochs=100, batch_size=256)
    snapshot_every: int = Field(default=500, ge=1)

    def build(self) -> Callable[..., Checkpoint]:
        """The stage that makes the embedder: `config, dataset, out, compute -> Checkpoint`."""
        return pretrain_simclr

    def n_passes(self, n_samples: int) -> int:
        """Passes over a data set, whatever its size."""
        return self.optim.epochs

    @property
    def once(self) -> "SimCLRConfig":
        """The same with one epoch of training, to measure its cost."""
        return self.model_copy(update={"optim": self.optim.model_copy(update={"epochs": 1})})


def similarities(z_VD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The logits and targets of NT-Xent; the loss is their cross-entropy.

    Args:
        z_VD: projections; rows i and i + B are views of one image.
        temperature: t.

    Returns:
        Cosines divided by t, (V, V) with -inf on the diagonal, and the index of the other view of the same image, (V,)
        int64.
    """
    z_VD = nn.functional.normalize(z_VD, dim=1)
    logits_VV = (z_VD @ z_VD.T / temperature).masked_fill(
        torch.eye(len(z_VD), dtype=torch.bool, device=z_VD.device), -torch.inf
    )
    return logits_VV, torch.arange(len(z_VD), device=z_VD.device).roll(len(z_VD) // 2)


def contrastive(temperature: float, compute: Compute) -> Objective:
    """The objective NT-Xent, for batches that hold one view of each image, then the other.

    With several processes, the negatives of a view are those of its own process. Sums: loss, and `matched`, the number
    of images whose views are most similar to each other.
    """

    def objective(model: nn.Module, batch: TrainBatch, _epoch: int) -> Step:
        with compute.autocast():
            z_VD = model(batch.x_B)
        logits_VV, other_V = similarities(z_VD.float(), temperature)
        loss = nn.functional.cross_entropy(logits_VV, other_V)
        n_images = torch.tensor(len(batch.y_B), device=loss.device)
        matched = (logits_VV.argmax(1) == other_V).sum() / 2
        return Step(weighted(loss, n_images), {"loss": loss.detach() * n_images, "matched": matched})

    return objective


@stage(Checkpoint)
def pretrain_simclr(
    config: SimCLRConfig, dataset: Dataset, out: str, compute: Compute, unlabelled: Dataset | None = None
) -> Work:
    """Train an encoder on images alone.

    Args:
        config: network, views and training.
        dataset: the untrusted data; only usable samples are read, and no labels.
        out: folder of the artifact.
        compute: device, precision, seed.
        unlabelled: more images of the same size (X_aug); each batch has images of both data sets in proportion.

    Returns:
        The Checkpoint; its last Linear is zero, because no class is learned. `history.json` has loss and `matched`.

    Raises:
        NumericsError: training diverged.
        ConfigError: the network has no Linear, or the images of the two data sets have different shapes.
    """
    datasets = [dataset] if unlabelled is None else [dataset, unlabelled]
    if unlabelled is not None and unlabelled.image_shape != dataset.image_shape:
        raise ConfigError(f"unlabelled images are {unlabelled.image_shape}, the others {dataset.image_shape}")
    model_config = config.describe(dataset)

    def fit() -> tuple[nn.Module, list[dict[str, float]]]:
        compute.seed_global("simclr", "init")
        model = model_config.build()
        head = find_taps(model, model_config.example()).penultimate
        linear = model.get_submodule(head)
        assert isinstance(linear, nn.Linear)
        n_hidden, n_projected = config.projection
        layers = nn.Linear(linear.in_features, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_projected)
        model.set_submodule(head, nn.Sequential(*layers))
        snapshots = snapshots_of(out, config.snapshot_every)
        history = _train(model, model_config, config, datasets, snapshots, compute)
        for tensor in linear.parameters():
            nn.init.zeros_(tensor)
        model.set_submodule(head, linear)
        return model, history

    def write(part: Part, fitted: tuple[nn.Module, list[dict[str, float]]]) -> None:
        write_checkpoint(part, fitted[0], model_config, fitted[1])
        part.counts.update(samples=sum(data.n_samples for data in datasets))

    own = partial(Checkpoint.of_own, architecture=config.architecture)
    settings = config.model_dump(mode="json", exclude={"snapshot_every", "cache_bytes"})
    settings["buffer_bytes"] = [buffer_bytes(data, config.cache_bytes) for data in datasets]
    return Work(fit=fit, write_fitted=write, handle=own, config=settings)


def _train(
    model: nn.Module,
    model_config: ModelConfig,
    config: SimCLRConfig,
    datasets: Sequence[Dataset],
    snapshots: Snapshots | None,
    compute: Compute,
) -> list[dict[str, float]]:
    generator = compute.generator("simclr", "views", world()[0])
    n_samples = sum(data.n_samples for data in datasets)
    n_steps = math.ceil(n_samples / config.optim.batch_size)
    sources = [_source(config, data, n_steps, i, compute) for i, data in enumerate(datasets)]

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        epochs = [source.epoch(number) for source in sources]
        for _, *batches in zip(range(n_steps), *epochs, strict=False):
            images, labels, _rows = zip(*batches, strict=True)
            yield tuple(torch.cat([t.to(compute.torch_device) for t in parts]) for parts in (images, labels))  # type: ignore[misc]

    def views(images_BCHW: Tensor) -> Tensor:
        x_BCHW = model_config.normalise(images_BCHW)
        return torch.cat([config.views(x_BCHW, generator), config.views(x_BCHW, generator)])

    with track("pre-train", config.optim.epochs * n_samples) as advance, training(snapshots):
        return train(
            model,
            epoch,
            n_steps,
            config.optim,
            compute,
            views,
            advance,
            contrastive(config.temperature, compute),
            snapshots=snapshots,
            carried={"views": generator},
            on_epoch=lambda row: advance.note(noted(row)),
            unit=model_config.pixel_unit,
        )


def _source(config: SimCLRConfig, dataset: Dataset, n_steps: int, i: int, compute: Compute) -> Resident | Streamed:
    """The share of a data set in every batch of an epoch, so that all data sets end together."""
    if dataset.n_samples < n_steps:
        raise ConfigError(
            f"{dataset.path} has {counted(dataset.n_samples, 'sample')} for {counted(n_steps, 'batch')}: "
            "leave it out, or raise batch_size"
        )
    order = partial(compute.generator, "simclr", "shuffle", i)
    return shuffled(dataset, dataset.n_samples // n_steps, config.cache_bytes, order, compute.torch_device)
