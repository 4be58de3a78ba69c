"""What an attack is. B batch, C H W image.

To add an attack: one file with its config, a subclass of `Attack`, and its maths; and the config's name in the union
`OneAttack` (`several.py`). `build` returns the change of training images, by default the trigger.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError

# uint8 images (B, C, H, W), their true labels (B,), a seed for the random stream of each (B) -> uint8 images
Poison = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Classes = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1, max_length=10_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Attack(BaseModel):
    """One attack on a data set.

    Attributes:
        keeps_label: True for clean-label attacks: samples that have the attacker's label already are poisoned.
        has_trigger: True where the attack success rate can be measured with `apply`.
        needs_surrogate: True where `build` needs a network trained on such images.
        added: settings added after digests of the attack were published; at their defaults they are not part of it.
        rate: poisoned samples as a share of the whole data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    keeps_label: ClassVar[bool] = False
    has_trigger: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = False
    added: ClassVar[tuple[str, ...]] = ()

    kind: str
    rate: float = Field(gt=0, le=1)

    @property
    def attacks(self) -> "tuple[Attack, ...]":
        """The attack itself; see `SeveralConfig`."""
        return (self,)

    @property
    def cover_share(self) -> float:
        """Cover samples as a share of the whole data set."""
        return 0.0

    def check_classes(self, n_classes: int) -> None:
        """Raise ConfigError where the attack names a label that is no class."""

    @abstractmethod
    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """Labels the attacker wants, (B,)."""

    def attacked(self, labels_B: Tensor, wanted_B: Tensor) -> Tensor:
        """True for samples on which the trigger is to change the prediction at test time, (B,); as for `eligible`."""
        return wanted_B != labels_B

    def eligible(self, labels_B: Tensor, wanted_B: Tensor) -> Tensor:
        """True for samples that can be poisoned, (B,): given labels and `relabel` of them."""
        return wanted_B == labels_B if self.keeps_label else self.attacked(labels_B, wanted_B)

    def coverable(self, labels_B: Tensor, wanted_B: Tensor) -> Tensor:
        """True for samples that can be cover samples, (B,); as for `eligible`."""
        return torch.zeros_like(labels_B, dtype=torch.bool)

    @abstractmethod
    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the trigger as at test time; the same for an image in any batch."""

    def build(self, surrogate: nn.Module | None, compute: Compute) -> Poison:
        """Change of training images; by default the trigger.

        Args:
            surrogate: logits of float images on [0, 1]; None unless `needs_surrogate`.
            compute: device, precision, seed.
        """
        return lambda images_BCHW, _labels_B, _seeds: self.apply(images_BCHW)

    @model_serializer(mode="wrap")
    def _without_added_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings: dict[str, Any] = dump(self)
        fields = type(self).model_fields
        at_default = {name for name in self.added if getattr(self, name) == fields[name].default}
        return {name: value for name, value in settings.items() if name not in at_default}


class Trigger(Attack):
    """A fixed change of an image, known before the attack and the same at test time.

    Attributes:
        target: label of poisoned samples (all-to-one), or "next" for y + 1 (all-to-all).
        sources: classes whose samples are poisoned, and on whose test samples the trigger is to work; None for all.
        cover_rate: cover samples as a share of the whole data set: samples with the trigger and their true label, of
            classes other than the sources and the target, or of all but the target where all are sources. None for the
            value of `rate`.
    """

    added: ClassVar[tuple[str, ...]] = ("sources", "cover_rate")

    target: int | Literal["next"] = 0
    sources: Classes | None = None
    cover_rate: Fraction | None = 0.0

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if self.sources is not None and self.keeps_label:
            raise ConfigError(f"sources: {self.kind} poisons samples of the target class alone; leave sources out")
        if self.sources is not None and self.target in self.sources:
            raise ConfigError(f"sources: class {self.target} is the target; its samples have the label already")
        return self

    def check_classes(self, n_classes: int) -> None:
        """Raise ConfigError where the target or a source is no class."""
        named = {"target": [self.target], "source": self.sources or ()}
        for name, label in ((name, label) for name, labels in named.items() for label in labels):
            if isinstance(label, int) and not 0 <= label < n_classes:
                raise ConfigError(f"{name} {label} is no class: there are {n_classes}, from 0 to {n_classes - 1}")

    @property
    def cover_share(self) -> float:
        """Cover samples as a share of the whole data set."""
        return self.rate if self.cover_rate is None else self.cover_rate

    def attacked(self, labels_B: Tensor, wanted_B: Tensor) -> Tensor:
        """True for samples of the sources that do not have the wanted label, (B,)."""
        return (wanted_B != labels_B) & self._is_source(labels_B)

    def coverable(self, labels_B: Tensor, wanted_B: Tensor) -> Tensor:
        """True for samples that can be cover samples, (B,): with the wanted label they would teach the trigger."""
        differs_B = wanted_B != labels_B
        return differs_B if self.sources is None else differs_B & ~self._is_source(labels_B)

    def _is_source(self, labels_B: Tensor) -> Tensor:
        if self.sources is None:
            return torch.ones_like(labels_B, dtype=torch.bool)
        return torch.isin(labels_B, torch.tensor(self.sources, device=labels_B.device))

    def relabel(self, labels_B: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        """The target, or the next class, (B,)."""
        if self.target == "next":
            return (labels_B + 1) % n_classes
        return torch.full_like(labels_B, self.target)


def to_pixels(x_BCHW: Tensor) -> Tensor:
    """Floats on the scale 0 to 255 as uint8: to the nearest, and clipped."""
    return x_BCHW.round().clamp(0, 255).to(torch.uint8)
