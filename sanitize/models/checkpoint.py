"""Networks by description: build one, save it as safetensors beside its description, load it back. No pickle.

A checkpoint may come from a stranger. Its description is bounded, no code is run for it unless the caller allows that,
and nothing larger than its files is built: names, shapes and dtypes of the weights are compared before.
"""

import copy
import json
import math
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from sanitize.artifacts import Artifact, Part, first_line, first_problem
from sanitize.errors import ArtifactError, ConfigError, DataError
from sanitize.models.cnn9 import CNN9, CNN9Config
from sanitize.models.convnet import ConvNet, ConvNetConfig
from sanitize.models.factory import build_by, only_installed, refuse_unless_installed
from sanitize.models.group_norm import without_batch_norm
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig
from sanitize.models.mlp import MLP, MLPConfig
from sanitize.models.mmc import CentreDistance
from sanitize.models.resnet import ResNet, ResNetConfig
from sanitize.models.sizes import MAX_CLASSES, MAX_NETWORKS, MAX_PIXELS, Deviations, Means, Side
from sanitize.models.stacked import Plurality, Stacked
from sanitize.models.taps import find_taps
from sanitize.models.vgg import VGG, VGGConfig


class TorchvisionConfig(BaseModel):
    """A torchvision classification architecture, by its name there ("resnet18")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["torchvision"] = "torchvision"
    name: str = Field(max_length=100)


class FactoryConfig(BaseModel):
    """A network of the user's: `function` is "package.module:function", called as function(n_classes, in_channels).

    To build it is to import and run that code. In a configuration the user wrote this is wanted. A model package that
    names such a function is loaded only where the caller allows it (`Checkpoint.trust_code`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["factory"] = "factory"
    function: str = Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$", max_length=200)


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

    It is read from files that strangers wrote: every number has a bound (`sanitize.models.sizes`).

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
    n_classes: int = Field(gt=0, le=MAX_CLASSES)
    image_shape: tuple[Side, Side, Side]
    mean: Means = (0.5,)
    std: Deviations = (0.25,)
    mmc: float | None = Field(default=None, gt=0, le=1e6)
    n_networks: int = Field(default=1, ge=1, le=MAX_NETWORKS)
    input_range: tuple[Literal[0], Literal[255]] = (0, 255)

    @model_validator(mode="after")
    def _channels_fit(self) -> Self:
        if math.prod(self.image_shape) > MAX_PIXELS:
            raise ConfigError(f"images of {self.image_shape} have more than {MAX_PIXELS:,} numbers")
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
            return Plurality(Stacked.of([self.build_one() for _ in range(self.n_networks)]))
        return self.build_one()

    def build_to_load(self) -> nn.Module:
        """The same for weights that are loaded next: of an ensemble one network alone is initialised."""
        if self.n_networks > 1:
            return Plurality(Stacked.empty(self.build_one(), self.n_networks))
        return self.build_one()

    def build_one(self) -> nn.Module:
        """A single one of the networks."""
        network = self._build()
        network = without_batch_norm(network) if self.group_norm else network
        if self.mmc is not None:
            head = self._head_of(network)
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
        return build_by(kind.function, self.n_classes, channels)

    def _head_of(self, network: nn.Module) -> str:
        """Name of the last Linear that runs. Networks of ours run on the meta device: images may be large."""
        if isinstance(self.architecture, FactoryConfig):
            return find_taps(network, self.example()).penultimate
        with torch.device("meta"):
            return find_taps(copy.deepcopy(network).to("meta"), self.example()).penultimate

    def outline(self) -> nn.Module | None:
        """One of the networks on the meta device, in eval mode: nothing is allocated or initialised.

        None where only the network itself tells: one that other code builds, or a RegNet of torchvision, which computes
        its widths by tensors.

        Raises:
            ConfigError: there is no such network.
        """
        if isinstance(self.architecture, FactoryConfig):
            return None
        try:
            with torch.device("meta"):
                return self.build_one().eval()
        except NotImplementedError:  # a value of a meta tensor was asked for
            return None
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"no such network takes images of {self.image_shape}: {first_line(error)}") from error

    def layout(self, outline: nn.Module) -> dict[str, Tensor]:
        """Names, shapes and dtypes of all weights, as tensors on the meta device."""
        if self.n_networks == 1:
            return outline.state_dict()
        return Plurality(Stacked.empty(outline, self.n_networks)).state_dict()

    def refuse_if_no_classifier(self, outline: nn.Module) -> None:
        """Raise ConfigError unless the network takes images of `image_shape` and gives K logits."""
        try:
            with torch.device("meta"), torch.inference_mode():
                shape = tuple(outline(self.example()[:1]).shape)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"the network takes no images of {self.image_shape}: {first_line(error)}") from error
        if shape != (1, self.n_classes):
            raise ConfigError(f"the network gives {shape[1:]} numbers an image, not {self.n_classes} logits")

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
        _refuse_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"cannot load weights from {path}: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict of tensors")
    return state


def _refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip whose members are larger than it says: torch.save compresses none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                raise ValueError("its members are compressed, which torch.save never does")


_MAX_DESCRIPTION = 1 << 20  # bytes of config.json
_MAX_HEADER = 100 << 20  # bytes of the header of a safetensors file; the format allows no more


class Checkpoint(Artifact):
    """A trained network: `model.safetensors`, `config.json` (ModelConfig), `history.json`.

    Attributes:
        own_factory: the function that the user's own configuration names, where the network was trained by it.
        trust_code: a function that the description names may be run, if an installed package holds it.
    """

    own_factory: str | None = None
    trust_code: bool = False

    @cached_property
    def config(self) -> ModelConfig:
        """What the network is and expects. Raises ArtifactError where `config.json` describes no network."""
        where = self.url("config.json")
        described = self.read_json("config.json", _MAX_DESCRIPTION)
        try:
            return ModelConfig.model_validate(described)
        except (ValidationError, ConfigError) as error:
            why = first_problem(error) if isinstance(error, ValidationError) else error
            raise ArtifactError(f"{where} describes no network: {why}") from error

    def model(self) -> nn.Module:
        """The network in eval mode, on the CPU.

        Raises:
            ArtifactError: the description names code that may not be run, or the weights are not those of the network
                it describes, or are not finite.
        """
        try:
            is_own = self._refuse_code()
            with nullcontext() if is_own else only_installed(self.path):
                return self._loaded().eval()
        except ConfigError as error:
            raise ArtifactError(f"{self.path} cannot be loaded: {error}") from error

    def _loaded(self) -> nn.Module:
        outline = self.config.outline()
        expected = None if outline is None else self.config.layout(outline)
        if expected is not None:
            self._refuse_size(sum(tensor.nbytes for tensor in expected.values()))
        state = self._state(expected)
        if outline is not None and expected is not None:
            refuse_misfits(expected, state, self.path)
            self.config.refuse_if_no_classifier(outline)
        model = self.config.build_to_load()
        load_into(model, state, self.path)
        for name, tensor in state.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ArtifactError(f"{self.path}: the weights {name!r} are not finite")
        return model

    def weight_files(self) -> list[str]:
        """Names of the files that hold the weights."""
        return ["model.safetensors"]

    def _state(self, _expected: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """All weights, by name."""
        return self.read_tensors("model.safetensors")

    def _refuse_code(self) -> bool:
        """Raise ArtifactError where the description names code that the caller did not allow; True if it is his own."""
        architecture = self.config.architecture
        if not isinstance(architecture, FactoryConfig):
            return False
        if architecture.function == self.own_factory:
            return True
        if not self.trust_code:
            raise ArtifactError(
                f"{self.path} is built by code that it names, {architecture.function}; none of it was run. If you "
                "trust whoever made it and have installed that code: --allow-factory (`allow_factory: true` in the "
                "YAML file of the run), or trust_code=True in Python"
            )
        with only_installed(self.path):
            refuse_unless_installed(architecture.function, self.path)
        return False

    def _refuse_size(self, n_bytes: int) -> None:
        """Raise ArtifactError where the files of weights are not about as large as the weights."""
        files = self.manifest().files
        sizes = [files[name].size for name in self.weight_files() if name in files]
        if not n_bytes <= sum(sizes) <= n_bytes + len(sizes) * _MAX_HEADER:
            raise ArtifactError(
                f"{self.path} describes a network of {n_bytes:,} bytes, but its weights have {sum(sizes):,} bytes"
            )

    def of_own(self, architecture: Architecture) -> Self:
        """The same handle where the user's own configuration names the architecture: its code may be run again."""
        function = architecture.function if isinstance(architecture, FactoryConfig) else None
        return self.model_copy(update={"own_factory": function})

    def trusted_like(self, model: "Checkpoint") -> Self:
        """The same handle, trusted as `model` is, which it was made from."""
        return self.model_copy(update={"own_factory": model.own_factory, "trust_code": model.trust_code})


def refuse_misfits(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str, dtypes: bool = True
) -> None:
    """Raise ConfigError where names, shapes or dtypes of weights are not the expected ones; it names the first few."""
    problems = [f"no {name}" for name in expected if name not in state]
    problems += [f"{name[:80]!r} is not part of it" for name in state if name not in expected]
    for name, tensor in expected.items():
        found = state.get(name, tensor)
        if found.shape != tensor.shape or (dtypes and found.dtype != tensor.dtype):
            shapes = [f"{of.dtype} {tuple(of.shape)}".removeprefix("torch.") for of in (found, tensor)]
            problems.append(f"{name} is {shapes[0]}, not {shapes[1]}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(f"the weights in {where} do not fit the architecture: {'; '.join(problems[:3])}{more}")


def load_into(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict strictly. Raises ConfigError saying which tensors do not fit."""
    refuse_misfits(model.state_dict(), state, where, dtypes=False)
    model.load_state_dict(state)


def write_checkpoint(part: Part, model: nn.Module, config: ModelConfig, history: list[dict[str, Any]]) -> None:
    """Write the three files of a `Checkpoint`."""
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    part.write("model.safetensors", safetensors.torch.save(state))
    part.write("config.json", json.dumps(config.model_dump(mode="json"), indent=2).encode())
    part.write_json("history.json", history)
