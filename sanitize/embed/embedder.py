"""Train the suspect model by cross-entropy on the untrusted data, or load weights of the user.

A backdoor that the model has not learned leaves no trace in its embeddings. With a the accuracy of the last epoch of
training and c the share of the largest class,

    skill = (a - c) / (1 - c).

The first cycle of training has `optim.epochs` epochs, more where those have fewer than `min_steps` steps. A model with
skill below `LEARNED` is trained for a second cycle of the same length, within `max_steps` steps in all. Steps decide
whether a trigger is learned, not accuracy: the level of skill only tells a model that learns from one that does not.

Measured: 14 suspects with 558 to 690 steps and skill .60 to 1.00 on Fashion-MNIST, CIFAR-10, GTSRB and digits learned
their triggers (1 % to 10 % of the samples: attack success rate .56 to .98), one did not (.3 %: .10). On 2,934
photographs, 6 epochs were 132 steps with accuracy .66, and no trigger was learned.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.canaries import Canaries
from sanitize.data.chosen import choose_samples
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import shuffled
from sanitize.embed.canary import CanaryConfig
from sanitize.fit import ClassifierConfig, fit_classifier
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.weights import load_into, load_state
from sanitize.stage import Work, stage
from sanitize.storage import fingerprint, sha256_file

LEARNED = 0.5


class EmbedderConfig(ClassifierConfig):
    """The suspect model and how it is trained.

    Attributes:
        architecture: the network; a small ConvNet learns a backdoor as readily as a large one, and sooner.
        weights: a .safetensors or torch state dict to load instead of training.
        mean, std, optim, cache_bytes: as in `FitConfig`.
        min_steps: fewest steps of training; `optim.epochs` is raised where the data set is too small for it.
        max_steps: steps after which a model that has not learned is not trained further. `optim.epochs` has precedence.
        max_samples: number of samples to learn from, chosen by hash; None takes all. The others are embedded and scored
            like them.
        augment: none by default. Even 10 % of brightness and contrast keep a suspect model from learning a faint
            trigger fully (blended 1 %: attack success rate 75 % instead of 92 %), and a trigger that is not learned
            leaves no trace in the embeddings. `flip` and `shift` move a corner trigger as well.
        canary: triggers that `clean` plants in the training of this model to find out what it would have seen; None
            plants none, and then `clean` never says that nothing stands out. No other job plants any.
    """

    kind: Literal["classifier"] = "classifier"
    weights: str | None = None
    min_steps: int = Field(default=600, ge=1)
    max_steps: int = Field(default=6_000, ge=1)
    max_samples: int | None = Field(default=100_000, ge=1)
    canary: CanaryConfig | None = CanaryConfig()

    def build(self) -> Callable[..., Checkpoint]:
        """The stage that makes the embedder: `config, dataset, out, compute -> Checkpoint`."""
        return train_embedder

    def n_passes(self, n_samples: int) -> int:
        """Passes over a data set of `n_samples` usable samples in the first cycle."""
        if self.weights is not None:
            return 1
        n = min(n_samples, self.max_samples or n_samples)
        return max(self.optim.epochs, math.ceil(self.min_steps / max(1, n // self.optim.batch_size)))

    @property
    def once(self) -> "EmbedderConfig":
        """The same with one epoch of training, to measure its cost."""
        optim = self.optim.model_copy(update={"epochs": 1})
        return self.model_copy(update={"optim": optim, "min_steps": 1, "max_steps": 1})


@stage(Checkpoint, version=4)
def train_embedder(
    config: EmbedderConfig, dataset: Dataset, out: str, compute: Compute, canaries: Canaries | None = None
) -> Work:
    """Train (or load) the suspect model.

    Args:
        config: network and training.
        dataset: the untrusted data; only usable samples are read.
        out: folder of the artifact.
        compute: device, precision, seed.
        canaries: copies with triggers to learn from in addition; given weights have none.

    Returns:
        The Checkpoint; `history.json` has loss and training accuracy of each epoch, `suspect.json` the outcome
        (`Checkpoint.suspect`).

    Raises:
        NumericsError: training diverged.
        ConfigError, DataError: the weights or the architecture cannot be used.
    """
    model_config = config.describe(dataset)
    inputs = {"dataset": dataset.digest} | ({} if canaries is None else {"canaries": canaries.digest})
    sources = {}
    if config.weights is not None:
        sources["weights"] = fingerprint(config.weights)
        inputs["weights"] = sha256_file(Path(config.weights))

    def write(part: Part) -> None:
        compute.seed_global("embedder", "init")
        model = model_config.build()
        only = None
        if config.max_samples is not None and dataset.n_samples > config.max_samples:
            only = choose_samples(dataset, config.max_samples, compute)
        history: list[dict[str, float]] = []
        if config.weights is not None:
            load_into(model, load_state(config.weights), config.weights)
            accuracy = _accuracy(model, model_config, config, dataset, compute, only)
        else:
            history = _train(model, model_config, config, dataset, compute, only, canaries)
            accuracy = history[-1]["accuracy"]
        write_checkpoint(part, model, model_config, history)
        part.write_json("suspect.json", _outcome(config, dataset, history, accuracy, model_config))

    own = partial(Checkpoint.of_own, architecture=config.architecture)
    settings = config.model_dump(mode="json", exclude={"weights", "canary"})
    return Work(write=write, sources=sources, handle=own, config=settings, inputs=inputs)


def _train(
    model: nn.Module,
    model_config: ModelConfig,
    config: EmbedderConfig,
    dataset: Dataset,
    compute: Compute,
    only: Mapping[str, set[int]] | None,
    canaries: Canaries | None,
) -> list[dict[str, float]]:
    """Train in one or two cycles; returns loss and accuracy of each epoch."""
    history: list[dict[str, float]] = []
    per_epoch = _steps_per_epoch(config, dataset)
    epochs = config.n_passes(dataset.n_samples)
    generator = compute.generator("embedder", "augment")
    further = None if canaries is None else canaries.images()
    for stream in ("embedder", "embedder further"):
        cycle = config.model_copy(update={"optim": config.optim.model_copy(update={"epochs": epochs})})
        history += fit_classifier(
            model,
            model_config,
            cycle,
            dataset,
            compute,
            description="train the suspect model",
            stream=stream,
            generator=generator,
            only=only,
            further=further,
        )
        epochs = min(epochs, config.max_steps // per_epoch - len(history))
        if epochs < 1 or learned(history[-1]["accuracy"], chance(dataset)):
            break
    return [row | {"epoch": number} for number, row in enumerate(history, 1)]


def _steps_per_epoch(config: EmbedderConfig, dataset: Dataset) -> int:
    n = min(dataset.n_samples, config.max_samples or dataset.n_samples)
    return max(1, n // config.optim.batch_size)


def _accuracy(
    model: nn.Module,
    model_config: ModelConfig,
    config: EmbedderConfig,
    dataset: Dataset,
    compute: Compute,
    only: Mapping[str, set[int]] | None,
) -> float:
    """Accuracy of loaded weights on the samples that a model would be trained on."""
    device, order = compute.torch_device, partial(compute.generator, "embedder", "shuffle")
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    data = shuffled(dataset, config.optim.batch_size, config.cache_bytes, order, device, only)
    correct = n = 0
    with torch.no_grad(), compute.autocast():
        for images_BCHW, labels_B, _ in data.epoch(0):
            x_BCHW = model_config.normalise(images_BCHW.to(device)).contiguous(memory_format=torch.channels_last)
            correct += int((model(x_BCHW).argmax(1) == labels_B.to(device)).sum())
            n += len(labels_B)
    return correct / max(1, n)


def chance(dataset: Dataset) -> float:
    """Accuracy of the best constant answer: the share of the largest class."""
    return float(max(dataset.info["labels"].values()) / dataset.n_samples)


def learned(accuracy: float, chance: float) -> bool:
    """True if the model has learned its training data; see the top of this module.

    Args:
        accuracy: accuracy of the last epoch, in [0, 1].
        chance: share of the largest class, in (0, 1]. A data set of one class teaches nothing.
    """
    return chance < 1 and (accuracy - chance) / (1 - chance) >= LEARNED


def _outcome(
    config: EmbedderConfig,
    dataset: Dataset,
    history: Sequence[Mapping[str, float]],
    accuracy: float,
    model_config: ModelConfig,
) -> dict[str, Any]:
    """Content of `suspect.json`."""
    constant = chance(dataset)
    has_learned = learned(accuracy, constant)
    needed = constant + LEARNED * (1 - constant)
    if config.weights is not None:
        name, setting = "accuracy of the given weights on the data", "embedder.weights"
    else:
        name, setting = "training accuracy", "embedder.max_steps or embedder.optim.epochs"
    if has_learned:
        why = f"{name} {accuracy:.2f}, at least {needed:.2f}"
    elif constant >= 1:
        why = "the data set has one class only"
    else:
        why = f"{name} {accuracy:.2f}, below {needed:.2f}"
    return {
        "steps": len(history) * _steps_per_epoch(config, dataset),
        "epochs": len(history),
        "accuracy": accuracy,
        "chance": constant,
        "size": list(model_config.image_shape[1:]),
        "n_samples": min(dataset.n_samples, config.max_samples or dataset.n_samples),
        "n_all": dataset.n_samples,
        "learned": has_learned,
        "why": why,
        "setting": None if has_learned or constant >= 1 else setting,
        "given": config.weights is not None,
    }
