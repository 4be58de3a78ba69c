"""Several attacks on one data set, each on samples of its own: more triggers, more targets."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from sanitize.attack.adaptive_blend import AdaptiveBlendConfig
from sanitize.attack.attack import Attack
from sanitize.attack.badnets import BadNetsConfig
from sanitize.attack.blended import BlendedConfig
from sanitize.attack.clean_label import CleanLabelConfig
from sanitize.attack.invisible import L0Config, L2Config
from sanitize.attack.labels import LabelNoiseConfig
from sanitize.attack.sig import SIGConfig
from sanitize.attack.smooth import SmoothConfig
from sanitize.attack.tact import TaCTConfig
from sanitize.attack.trojan import TrojanSquareConfig, TrojanWatermarkConfig
from sanitize.attack.wanet import WaNetConfig

OneAttack = Annotated[
    AdaptiveBlendConfig
    | BadNetsConfig
    | BlendedConfig
    | CleanLabelConfig
    | L0Config
    | L2Config
    | LabelNoiseConfig
    | SIGConfig
    | SmoothConfig
    | TaCTConfig
    | TrojanSquareConfig
    | TrojanWatermarkConfig
    | WaNetConfig,
    Field(discriminator="kind"),
]


class SeveralConfig(BaseModel):
    """Attacks in the order in which they choose samples; a sample of one attack is not eligible for the next.

    Attributes:
        attacks: the attacks, each with its rate as a share of the whole data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["several"] = "several"
    attacks: tuple[OneAttack, ...] = Field(min_length=1, max_length=100)

    @property
    def has_trigger(self) -> bool:
        """True where one of the attacks has a trigger."""
        return any(attack.has_trigger for attack in self.attacks)

    @property
    def needs_surrogate(self) -> bool:
        """True where one of the attacks needs a surrogate."""
        return any(attack.needs_surrogate for attack in self.attacks)

    def check_classes(self, n_classes: int) -> None:
        """Raise ConfigError where an attack names a label that is no class."""
        for attack in self.attacks:
            attack.check_classes(n_classes)


AttackConfig = Annotated[OneAttack | SeveralConfig, Field(discriminator="kind")]
ATTACKS: dict[str, type[Attack]] = {
    config.model_fields["kind"].default: config for config in get_args(get_args(OneAttack)[0])
}
