"""Train the suspect model by plain cross-entropy on the untrusted data itself, or take the user's."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from sanitize.artifacts import Part
from sanitize.augment import AugmentConfig
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import shuffled
from sanitize.loop import OptimConfig, train
from sanitize.models.architectures import Architecture
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.weights import load_into, load_state
from sanitize.progress import track
from sanitize.stage import Work, stage
from sanitize.storage import fingerprint, sha256_file


class EmbedderConfig(BaseModel):
    """Which network embeds, and how it is trained.

    Attributes:
        architecture: the network; a small ConvNet learns a backdoor as readily as a large one, and sooner.
        weights: a .safetensors or torch state dict of the user's; given, nothing is trained.
        mean, std: normalisation of each channel on the scale [0, 1].
        optim: optimiser and schedule.
        augment: none by default. Even 10 % of brightness and contrast keep a suspect model from learning a faint
            trigger fully (blended 1 %: attack success rate 75 % instead of 92 %), and what it has not learned cannot be
            seen in it. `flip` and `shift` move a corner trigger as well.
        cache_bytes: decoded images held in memory; a larger data set is streamed through a buffer of this size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["classifier"] = "classifier"
    architecture: Architecture = ConvNetConfig()
    weights: str | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)
    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()
    cache_bytes: int = Field(default=2**30, gt=0)


@stage(Checkpoint, version=2)
def train_embedder(config: EmbedderConfig, dataset: Dataset, out: str, compute: Compute) -> Work:
    """Train (or load) the suspect model.

    Args:
        config: which network, and how.
        dataset: the untrusted data; only usable samples are read.
        out: folder of the artifact.
        compute: device, precision, seed.

    Returns:
        The Checkpoint; `history.json` has loss and training accuracy of each epoch.

    Raises:
        NumericsError: training diverged.
        ConfigError, DataError: the user's weights or architecture cannot be used.
    """
    model_config = ModelConfig(
        architecture=config.architecture,
        n_classes=dataset.n_classes,
        image_shape=dataset.image_shape,
        mean=config.mean,
        std=config.std,
    )
    inputs = {"dataset": dataset.digest}
    sources = {}
    if config.weights is not None:
        sources["weights"] = fingerprint(config.weights)
        inputs["weights"] = sha256_file(Path(config.weights))

    def write(part: Part) -> None:
        compute.seed_global("embedder", "init")
        model = model_config.build()
        history: list[dict[str, float]] = []
        if config.weights is not None:
            load_into(model, load_state(config.weights), config.weights)
        else:
            history = _train(model, model_config, config, dataset, compute)
        write_checkpoint(part, model, model_config, history)

    own = partial(Checkpoint.of_own, architecture=config.architecture)
    settings = config.model_dump(mode="json", exclude={"weights"})
    return Work(write=write, sources=sources, handle=own, config=settings, inputs=inputs)


def _train(
    model: torch.nn.Module, model_config: ModelConfig, config: EmbedderConfig, dataset: Dataset, compute: Compute
) -> list[dict[str, float]]:
    generator = compute.generator("embedder", "augment")
    order = partial(compute.generator, "embedder", "shuffle")
    data = shuffled(dataset, config.optim.batch_size, config.cache_bytes, order)
    total = config.optim.epochs * data.steps_per_epoch * data.batch_size
    with track("train the suspect model", total) as advance:
        return train(
            model,
            data.epoch,
            data.steps_per_epoch,
            config.optim,
            compute,
            lambda images_BCHW: config.augment(model_config.normalise(images_BCHW), generator),
            advance,
            unit=model_config.pixel_unit,
        )
