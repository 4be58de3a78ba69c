"""Attacks, to know what we catch: poisoned copies of shards with the ground truth beside them."""

from sanitize.attack.badnets import BadNetsConfig
from sanitize.attack.blended import BlendedConfig
from sanitize.attack.labels import LabelNoiseConfig
from sanitize.attack.stage import AttackConfig, Poisoned, choose, poison_shards

__all__ = ["AttackConfig", "BadNetsConfig", "BlendedConfig", "LabelNoiseConfig", "Poisoned", "choose", "poison_shards"]
