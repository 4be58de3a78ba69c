"""Networks by description: build one, save it as safetensors beside its description, load it back. No pickle."""

import importlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, nn

from sanitize.artifacts import Artifact, Part
from sanitize.errors import ConfigError, DataError
from sanitize.models.cnn9 import CNN9, CNN9Config
from sanitize.models.convnet import ConvNet, ConvNetConfig
from sanitize.models.group_norm import without_batch_norm
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig
from sanitize.models.mlp import MLP, MLPConfig
from sanitize.models.mmc import CentreDistance
from sanitize.models.resnet import ResNet, ResNetConfig
from sanitize.models.stacked import Plurality
from sanitize.models.taps import find_taps
from sanitize.models.vgg import VGG, VGGConfig


class TorchvisionConfig(BaseModel):
    """A torchvision classification architecture, by its name there ("resnet18")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["torchvision"] = "torchvision"
    name: str


class FactoryConfig(BaseModel):
    """A network of the user's: `function` is "package.module:function", called as function(n_classes, in_channels).

    This imports and runs the user's code; take it from a configuration you wrote, never from data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["factory"] = "factory"
    function: str = Field(pattern=r"^[\w.]+:\w+$")


Architecture = Annotated[
    ConvNetConfig
    | InstanceConvNetConfig
    | ResNetConfig
    | CNN9Config
    | VGGConfig
    | MLPConfig
    | TorchvisionConfig
    | FactoryConfig,
    Field(discriminator="kind"),
]


class ModelConfig(BaseModel):
    """A network and what it expects.

    Attributes:
        architecture: which network.
        group_norm: BatchNorm layers are replaced by GroupNorm.
        n_classes: K.
        image_shape: (C, H, W) of the uint8 images it is fed.
        mean, std: of each channel, on the scale [0, 1]; images are normalised with them.
        mmc: the last Linear keeps the width of its input and is followed by distances to fixed centres of this length
            (max-Mahalanobis centres); None leaves it.
        n_networks: above 1 it is the plurality of so many networks of this architecture, and gives votes for logits.
        input_range: of the images it is fed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture = ConvNetConfig()
    group_norm: bool = False
    n_classes: int = Field(gt=0)
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)
    mmc: float | None = Field(default=None, gt=0)
    n_networks: int = Field(default=1, ge=1)
    input_range: tuple[Literal[0], Literal[255]] = (0, 255)

    @model_validator(mode="after")
    def _channels_fit(self) -> Self:
        channels = self.image_shape[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ConfigError(
                    f"{name} has {len(values)} values, but images have {channels} channels: give 1 or that"
                )
        return self

    def build(self) -> nn.Module:
        """A new network with torch's own initialisation, drawn from torch's global generator.

        Raises:
            ConfigError: the architecture is unknown or cannot be imported.
        """
        if self.n_networks > 1:
            return Plurality([self.build_one() for _ in range(self.n_networks)])
        return self.build_one()

    def build_one(self) -> nn.Module:
        """A single one of the networks."""
        network = self._build()
        network = without_batch_norm(network) if self.group_norm else network
        if self.mmc is not None:
            head = find_taps(network, self.example()).penultimate
            linear = cast(nn.Linear, network.get_submodule(head))
            # A Linear stays before the centres: features after a ReLU have no negative coordinates, most centres do.
            embedding = nn.Linear(linear.in_features, linear.in_features)
            centred = CentreDistance(linear.in_features, self.n_classes, self.mmc)
            network.set_submodule(head, nn.Sequential(embedding, centred))
        return network

    def _build(self) -> nn.Module:
        kind = self.architecture
        channels = self.image_shape[0]
        if isinstance(kind, ConvNetConfig):
            return ConvNet(kind, self.n_classes, channels)
        if isinstance(kind, InstanceConvNetConfig):
            return InstanceConvNet(kind, self.n_classes, self.image_shape)
        if isinstance(kind, ResNetConfig):
            return ResNet(kind, self.n_classes, channels)
        if isinstance(kind, CNN9Config):
            return CNN9(kind, self.n_classes, channels)
        if isinstance(kind, VGGConfig):
            return VGG(kind, self.n_classes, channels, self.image_shape[1:])
        if isinstance(kind, MLPConfig):
            return MLP(kind, self.n_classes, torch.Size(self.image_shape).numel())
        if isinstance(kind, TorchvisionConfig):
            if channels != 3:
                raise ConfigError(
                    f"torchvision's networks take 3 channels, images have {channels}: set image.channels=3"
                )
            return _torchvision(kind.name, self.n_classes)
        module, _, function = kind.function.partition(":")
        try:
            factory: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"cannot import {kind.function}: {error}") from error
        return factory(n_classes=self.n_classes, in_channels=channels)

    def example(self) -> Tensor:
        """Two black images as the network takes them, for `find_taps`."""
        return self.normalise(torch.zeros(2, *self.image_shape, dtype=torch.uint8))

    @property
    def pixel_unit(self) -> Tensor:
        """What one unit of pixels on [0, 1] is in the images the network takes, (C, 1, 1), or (1, 1, 1) for all."""
        return 1 / torch.tensor(self.std)[:, None, None]

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images to the float32 images the network takes."""
        return self.standardise(images_BCHW.float() / 255)

    def standardise(self, x_BCHW: Tensor) -> Tensor:
        """float32 images on [0, 1] to those the network takes."""
        like = {"dtype": torch.float32, "device": x_BCHW.device}
        mean_C11, std_C11 = (torch.tensor(v, **like)[:, None, None] for v in (self.mean, self.std))  # type: ignore[arg-type]
        return (x_BCHW - mean_C11) / std_C11


def _torchvision(name: str, n_classes: int) -> nn.Module:
    import torchvision.models  # three seconds, which only this network is worth

    # Only its classifiers: a detection model would fetch the weights of its backbone from the network.
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(
            f"torchvision has no model {name!r}; see torchvision.models.list_models(module=torchvision.models)"
        )
    return cast(nn.Module, torchvision.models.get_model(name, weights=None, num_classes=n_classes))


def load_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file by the restricted unpickler (tensors only).

    Raises:
        DataError: the file is missing, or holds anything but tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"cannot load weights from {path}: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict of tensors")
    return state


class Checkpoint(Artifact):
    """A trained network: `model.safetensors`, `config.json` (ModelConfig), `history.json`."""

    @cached_property
    def config(self) -> ModelConfig:
        """What the network is and expects."""
        return ModelConfig.model_validate(self.read_json("config.json"))

    def model(self) -> nn.Module:
        """The network in eval mode, on the CPU."""
        model = self.config.build()
        load_into(model, safetensors.torch.load(self.read("model.safetensors")), self.path)
        return model.eval()


def load_into(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict strictly. Raises ConfigError saying which tensors do not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"the weights in {where} do not fit the architecture: {error}") from error


def write_checkpoint(part: Part, model: nn.Module, config: ModelConfig, history: list[dict[str, Any]]) -> None:
    """Write the three files of a `Checkpoint`."""
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    part.write("model.safetensors", safetensors.torch.save(state))
    part.write("config.json", json.dumps(config.model_dump(mode="json"), indent=2).encode())
    part.write_json("history.json", history)
