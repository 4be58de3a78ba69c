"""The description of a network, from which it is built.

A description may come from a stranger: every number in it has a bound, and its layout is known before memory is
allocated.
"""

import copy
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from sanitize.artifacts import first_line
from sanitize.data.class_names import ClassNames, short
from sanitize.errors import ConfigError
from sanitize.models.architectures import Architecture
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.factory import factory_of
from sanitize.models.group_norm import without_batch_norm
from sanitize.models.mmc import CentreDistance
from sanitize.models.sizes import MAX_CLASSES, MAX_NETWORKS, MAX_PIXELS, Deviations, Means, Side
from sanitize.models.stacked import Plurality, Stacked
from sanitize.models.taps import find_taps

MAX_NAMED = 1_000  # classes with names; the names of more would not fit into a description of limited size


class ModelConfig(BaseModel):
    """A network and its input.

    Attributes:
        architecture: one of the architectures.
        group_norm: BatchNorm layers are replaced by GroupNorm.
        n_classes: K.
        image_shape: (C, H, W) of the input, uint8 images.
        mean, std: normalisation of each channel, on the scale [0, 1].
        mmc: length of the max-Mahalanobis centres. The last Linear then keeps the width of its input and is followed by
            distances to these centres; None leaves the last Linear as it is.
        n_networks: number of networks of this architecture. Above 1 the model is their plurality vote, and its outputs
            are votes instead of logits.
        input_range: smallest and largest value of the input.
        class_names: names of the classes by number, to show to people; where there are none, `config.json` leaves the
            field out.
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
    class_names: Annotated[ClassNames, Field(max_length=MAX_NAMED)] = {}

    @model_validator(mode="after")
    def _channels_fit(self) -> Self:
        if math.prod(self.image_shape) > MAX_PIXELS:
            raise ConfigError(f"images of {self.image_shape} have more than {MAX_PIXELS:,} numbers")
        channels = self.image_shape[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ConfigError(
                    f"{name} has {len(values)} values, but images have {channels} channels: give 1 or {channels}"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_empty_names(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        described: dict[str, Any] = dump(self)
        if not self.class_names:
            described.pop("class_names", None)
        return described

    def with_names(self, names: Mapping[int, str]) -> Self:
        """The same description with names of its classes; all of them, or none where they are too many."""
        known = {number: short(name) for number, name in names.items() if number < self.n_classes}
        return self.model_copy(update={"class_names": known}) if len(known) <= MAX_NAMED else self

    @property
    def is_ensemble(self) -> bool:
        """True where the model is the vote of several networks, which has no gradient."""
        return self.n_networks > 1

    def build(self) -> nn.Module:
        """A new network with torch's own initialisation, drawn from torch's global generator.

        Raises:
            ConfigError: the architecture is unknown or cannot be imported.
        """
        if self.is_ensemble:
            return Plurality(Stacked.of([self.build_one() for _ in range(self.n_networks)]))
        return self.build_one()

    def build_to_load(self) -> nn.Module:
        """A network whose weights are loaded next; of an ensemble only one network is initialised."""
        if self.is_ensemble:
            return Plurality(Stacked.empty(self.build_one(), self.n_networks))
        return self.build_one()

    def build_one(self) -> nn.Module:
        """One of the `n_networks` networks."""
        network = self.architecture.build(self.n_classes, self.image_shape)
        network = without_batch_norm(network) if self.group_norm else network
        if self.mmc is not None:
            head = self._head_of(network)
            linear = cast(nn.Linear, network.get_submodule(head))
            # A Linear stays before the centres: features after a ReLU have no negative coordinates, most centres do.
            embedding = nn.Linear(linear.in_features, linear.in_features)
            centred = CentreDistance(linear.in_features, self.n_classes, self.mmc)
            network.set_submodule(head, nn.Sequential(embedding, centred))
        return network

    def _head_of(self, network: nn.Module) -> str:
        """Name of the last Linear that runs. Images may be large: only a factory's network runs off the meta device."""
        if factory_of(self.architecture) is not None:
            return find_taps(network, self.example()).penultimate
        with torch.device("meta"):
            return find_taps(copy.deepcopy(network).to("meta"), self.example()).penultimate

    def outline(self) -> nn.Module | None:
        """One of the networks on the meta device, in eval mode: nothing is allocated or initialised.

        None where the layout is only known once the network is built: for a factory, and for torchvision's RegNets,
        which compute their widths by tensors.

        Raises:
            ConfigError: there is no such network.
        """
        if factory_of(self.architecture) is not None:
            return None
        try:
            with torch.device("meta"):
                return self.build_one().eval()
        except NotImplementedError:  # the value of a meta tensor is needed
            return None
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"no such network takes images of {self.image_shape}: {first_line(error)}") from error

    def layout(self, outline: nn.Module) -> dict[str, Tensor]:
        """Names, shapes and dtypes of all weights, as tensors on the meta device."""
        if not self.is_ensemble:
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
        """Two black images, normalised, (2, C, H, W): an input for `models.trace`."""
        return self.normalise(torch.zeros(2, *self.image_shape, dtype=torch.uint8))

    @property
    def pixel_unit(self) -> Tensor:
        """Size of one unit of pixels on [0, 1] in normalised images, (C, 1, 1), or (1, 1, 1) for all channels."""
        return 1 / torch.tensor(self.std)[:, None, None]

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Normalised float32 images, the input of the network, of uint8 images."""
        return self.standardise(images_BCHW.float() / 255)

    def standardise(self, x_BCHW: Tensor) -> Tensor:
        """Normalised float32 images of float32 images on [0, 1]."""
        like = {"dtype": torch.float32, "device": x_BCHW.device}
        mean_C11, std_C11 = (torch.tensor(v, **like)[:, None, None] for v in (self.mean, self.std))  # type: ignore[arg-type]
        return (x_BCHW - mean_C11) / std_C11
