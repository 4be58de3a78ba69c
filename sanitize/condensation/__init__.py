"""Condense a data set into a few images a class, robust to poisoned samples (RDM-DC)."""

from sanitize.condensation.aggregate import AggregateConfig
from sanitize.condensation.distribution_matching import MatchingConfig
from sanitize.condensation.evaluate import EvaluateConfig
from sanitize.condensation.stage import CondenseConfig, CondensedSet, condense_dataset, load_condensed
from sanitize.siamese import SiameseConfig

__all__ = [
    "AggregateConfig",
    "CondenseConfig",
    "CondensedSet",
    "EvaluateConfig",
    "MatchingConfig",
    "SiameseConfig",
    "condense_dataset",
    "load_condensed",
]
