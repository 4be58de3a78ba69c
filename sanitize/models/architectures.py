"""All architectures, in one list, distinguished by `kind`.

To add an architecture: one file with its network and a frozen config that has a `kind` and

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module: ...

and the config's name in the union below. `build` returns a new network from normalised float images (B, C, H, W) to
logits (B, K), with weights from torch's global generator. A description may come from a stranger, so every number in a
config has a bound (`models.sizes`), and `build` also runs on the meta device.
"""

from typing import Annotated

from pydantic import Field

from sanitize.models.cnn9 import CNN9Config
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.factory import FactoryConfig
from sanitize.models.instance_convnet import InstanceConvNetConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.resnet import ResNetConfig
from sanitize.models.torchvision import TorchvisionConfig
from sanitize.models.vgg import VGGConfig

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
