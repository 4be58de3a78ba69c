"""Attacks to test a defence with: poisoned copies of shards with the ground truth beside them."""

from sanitize.attack.adaptive_blend import AdaptiveBlendConfig
from sanitize.attack.attack import Attack, Poison, Trigger
from sanitize.attack.badnets import BadNetsConfig
from sanitize.attack.blended import BlendedConfig
from sanitize.attack.clean_label import CleanLabelConfig
from sanitize.attack.dm_poisoning import DMPoisoningConfig, dm_poison
from sanitize.attack.gradient_matching import GradientMatchingConfig, match_gradients
from sanitize.attack.invisible import L0Config, L2Config
from sanitize.attack.labels import LabelNoiseConfig
from sanitize.attack.several import ATTACKS, AttackConfig, OneAttack, SeveralConfig
from sanitize.attack.sig import SIGConfig
from sanitize.attack.smooth import SmoothConfig
from sanitize.attack.stage import Poisoned, choose, poison_shards
from sanitize.attack.tact import TaCTConfig
from sanitize.attack.targeted import PerturbConfig, direct_attack, plant
from sanitize.attack.triggered import TriggeredBatch, triggered
from sanitize.attack.trojan import TrojanSquareConfig, TrojanWatermarkConfig
from sanitize.attack.wanet import WaNetConfig

__all__ = [
    "ATTACKS",
    "AdaptiveBlendConfig",
    "Attack",
    "AttackConfig",
    "BadNetsConfig",
    "BlendedConfig",
    "CleanLabelConfig",
    "DMPoisoningConfig",
    "GradientMatchingConfig",
    "L0Config",
    "L2Config",
    "LabelNoiseConfig",
    "OneAttack",
    "PerturbConfig",
    "Poison",
    "Poisoned",
    "SIGConfig",
    "SeveralConfig",
    "SmoothConfig",
    "TaCTConfig",
    "Trigger",
    "TriggeredBatch",
    "TrojanSquareConfig",
    "TrojanWatermarkConfig",
    "WaNetConfig",
    "choose",
    "direct_attack",
    "dm_poison",
    "match_gradients",
    "plant",
    "poison_shards",
    "triggered",
]
