"""All architectures, in one list, distinguished by `kind`.

An architecture is one file: a frozen config with `kind` and

    def build(self, n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module: ...

which returns a new network from normalised float images (B, C, H, W) to logits (B, K), with weights from torch's global
generator. A description may come from a stranger, so every number in a config has a bound (`models.sizes`), and `build`
also runs on the meta device. A new architecture is added to the union below.
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
