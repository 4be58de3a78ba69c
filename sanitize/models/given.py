"""A network of the user's, trained elsewhere: its weights from a file, checked, as a `Checkpoint`.

Nothing in the file of weights is run (`load_state`). The user names the architecture, so a factory may run.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from sanitize.artifacts import Part, first_line
from sanitize.compute import Compute
from sanitize.data.class_names import ClassName
from sanitize.errors import ConfigError
from sanitize.models.architectures import Architecture
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.sizes import MAX_CLASSES, Deviations, Means, Side
from sanitize.models.weights import load_into, load_state
from sanitize.stage import Work, stage
from sanitize.storage import fingerprint, sha256_file


class GivenModelConfig(BaseModel):
    """A trained network, as its author describes it.

    Attributes:
        weights: file with the state dict: .safetensors, or a torch file of `torch.save(model.state_dict(), ...)`. The
            state dict may also be an entry of a checkpoint ("state_dict", "model", "ema", ...), and its names may have
            a prefix of a wrapper ("module.", "_orig_mod.").
        entry: name of the entry of the torch file that holds the weights; None takes the first usual one, and moving
            averages ("ema") last.
        architecture: the network, such as "torchvision:resnet18".
        n_classes: number of classes; None takes the number of `classes`, or else of rows of the last matrix of weights.
        classes: names of the classes in the order of the outputs; None shows numbers.
        size: height and width of the images in pixels; one number for both.
        channels: number of channels of the images.
        mean, std: normalisation of each channel, on the scale [0, 1], as in the training.
        group_norm: as in `ModelConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    entry: str | None = None
    architecture: Architecture
    n_classes: int | None = Field(default=None, gt=0, le=MAX_CLASSES)
    classes: tuple[ClassName, ...] | None = Field(default=None, min_length=1, max_length=MAX_CLASSES)
    size: tuple[Side, Side]
    channels: Literal[1, 3] = 3
    mean: Means
    std: Deviations
    group_norm: bool = False

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, size: Any) -> Any:
        return (size, size) if isinstance(size, int) else size

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        if None not in (self.n_classes, self.classes) and self.n_classes != len(self.classes or ()):
            raise ConfigError(f"n_classes is {self.n_classes}, but classes has {len(self.classes or ())} names")
        return self

    def describe(self, state: dict[str, Tensor]) -> ModelConfig:
        """The description of the network with these weights. Raises ConfigError where the classes are not known."""
        n_classes = self.n_classes or len(self.classes or ()) or _rows_of_last_matrix(state)
        config = ModelConfig(
            architecture=self.architecture,
            group_norm=self.group_norm,
            n_classes=n_classes,
            image_shape=(self.channels, *self.size),
            mean=self.mean,
            std=self.std,
        )
        return config.with_names(dict(enumerate(self.classes or ())))


@stage(Checkpoint, version=1, gpu=False, draws="nothing")
def import_model(config: GivenModelConfig, out: str, compute: Compute) -> Work:
    """Read a network that was trained elsewhere, check it, and write it as a `Checkpoint`.

    Args:
        config: the file of weights, and the description of the network.
        out: folder of the artifact.
        compute: not used; every stage takes it.

    Raises:
        ConfigError: the weights do not fit the network, are not finite, or the network does not map such images to
            one number a class.
        DataError: the file holds no weights.
    """
    digest = sha256_file(Path(config.weights)) if Path(config.weights).is_file() else ""

    def write(part: Part) -> None:
        state = load_state(config.weights, config.entry)
        described = config.describe(state)
        model = described.build_to_load().eval()
        load_into(model, state, config.weights)
        _refuse_unusable(model, described, config.weights)
        write_checkpoint(part, model, described, [])

    return Work(
        write=write,
        sources={"weights": fingerprint(config.weights)},
        handle=partial(Checkpoint.of_own, architecture=config.architecture),
        config=config.model_dump(mode="json", exclude={"weights"}),
        inputs={"weights": digest},
    )


def _rows_of_last_matrix(state: dict[str, Tensor]) -> int:
    """Number of outputs of the layer that was registered last and has a matrix of weights: the head of a classifier."""
    rows = [len(tensor) for tensor in state.values() if tensor.dim() == 2]
    if not rows:
        raise ConfigError("the weights have no matrix whose rows could be the classes: give n_classes")
    return rows[-1]


def _refuse_unusable(model: nn.Module, described: ModelConfig, where: str) -> None:
    """Raise ConfigError unless all weights are finite, and two black images give finite outputs of the right shape."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(f"the weights {name!r} in {where} are not finite")
    shape = (2, described.n_classes)
    try:
        with torch.inference_mode():
            found = model(described.example())
    except Exception as error:  # a factory's network may raise anything
        raise ConfigError(
            f"the network takes no images of {described.image_shape} (channels, height, width): {first_line(error)}"
        ) from error
    if not isinstance(found, Tensor) or found.shape != shape:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"the network maps two images to {what}, not to {shape}: one number for each class")
