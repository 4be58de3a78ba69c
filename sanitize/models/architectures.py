"""All architectures, in one list, distinguished by `kind`.

To add an architecture: one file with its network and a frozen config that has a `kind` and

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module: ...

and the config's name in the union below. `build` returns a new network from normalised float images (B, C, H, W) to
logits (B, K), with weights from torch's global generator. A description may come from a stranger, so every number in a
config has a bound (`models.sizes`), and `build` also runs on the meta device. In settings, text stands for a config:
"mlp", "torchvision:resnet18", "factory:package.module:function".
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from sanitize.errors import ConfigError
from sanitize.models.cnn9 import CNN9Config
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.factory import FactoryConfig
from sanitize.models.instance_convnet import InstanceConvNetConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.resnet import ResNetConfig
from sanitize.models.torchvision import TorchvisionConfig
from sanitize.models.vgg import VGGConfig

_FIELDS = {"torchvision": "name", "factory": "function"}  # field that the text behind the colon is


def _from_text(given: Any) -> Any:
    """ "torchvision:resnet18" as {"kind": "torchvision", "name": "resnet18"}; anything but text as it is."""
    if not isinstance(given, str):
        return given
    kind, _, value = given.partition(":")
    if not value:
        return {"kind": kind}
    if kind not in _FIELDS:
        raise ConfigError(
            f"architecture {given!r}: a name or function stands behind {', '.join(f'{name}:' for name in _FIELDS)} "
            "alone; other kinds have fields, such as {kind: convnet, widths: [32, 64]}"
        )
    return {"kind": kind, _FIELDS[kind]: value}


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
    BeforeValidator(_from_text),
]
