"""Condense a data set into a few images a class, robust to poisoned samples (RDM-DC)."""

from sanitize.condense.aggregate import AggregateConfig
from sanitize.condense.distribution_matching import MatchingConfig
from sanitize.condense.evaluate import EvaluateConfig
from sanitize.condense.stage import CondenseConfig, CondensedSet, condense_dataset, load_condensed
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
