"""The classification networks of torchvision, by name, with random weights."""

from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from sanitize.errors import ConfigError


class TorchvisionConfig(BaseModel):
    """A torchvision classification architecture, by its name there ("resnet18")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["torchvision"] = "torchvision"
    name: str = Field(max_length=100)

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A new network.

        Raises:
            ConfigError: torchvision has no classifier of this name, or images do not have 3 channels.
        """
        if image_shape[0] != 3:
            raise ConfigError(
                f"torchvision's networks take 3 channels, images have {image_shape[0]}: set image.channels=3"
            )
        import torchvision.models  # takes three seconds

        # Classifiers alone: a detection model would download the weights of its backbone.
        if self.name not in torchvision.models.list_models(module=torchvision.models):
            raise ConfigError(
                f"torchvision has no model {self.name!r}; see torchvision.models.list_models(module=torchvision.models)"
            )
        return cast(nn.Module, torchvision.models.get_model(self.name, weights=None, num_classes=n_classes))
