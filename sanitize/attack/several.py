"""Several attacks on one data set, each on samples of its own: more triggers, more targets."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sanitize.attack.badnets import BadNetsConfig
from sanitize.attack.blended import BlendedConfig
from sanitize.attack.clean_label import CleanLabelConfig
from sanitize.attack.invisible import L0Config, L2Config
from sanitize.attack.labels import LabelNoiseConfig
from sanitize.attack.smooth import SmoothConfig
from sanitize.attack.trojan import TrojanSquareConfig, TrojanWatermarkConfig
from sanitize.attack.wanet import WaNetConfig

OneAttack = Annotated[
    BadNetsConfig
    | BlendedConfig
    | CleanLabelConfig
    | L0Config
    | L2Config
    | LabelNoiseConfig
    | SmoothConfig
    | TrojanSquareConfig
    | TrojanWatermarkConfig
    | WaNetConfig,
    Field(discriminator="kind"),
]


class SeveralConfig(BaseModel):
    """Attacks in the order in which they choose; a sample that one has taken is not eligible for the next.

    Attributes:
        attacks: each with its rate, as a share of the whole data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["several"] = "several"
    attacks: tuple[OneAttack, ...] = Field(min_length=1)


AttackConfig = Annotated[OneAttack | SeveralConfig, Field(discriminator="kind")]


def attacks_of(config: AttackConfig) -> tuple[OneAttack, ...]:
    """The attacks of a list; an attack by itself is a list of one."""
    return config.attacks if isinstance(config, SeveralConfig) else (config,)
