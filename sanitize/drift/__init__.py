"""How a batch of new data differs from an approved reference: statistics that merge, and a verdict from them."""

from sanitize.drift.config import StatisticsConfig
from sanitize.drift.projection import Projection, fit_projection
from sanitize.drift.stage import Drift, DriftConfig, check_drift
from sanitize.drift.statistics import Statistics, merge_statistics, summarise_shards

__all__ = [
    "Drift",
    "DriftConfig",
    "Projection",
    "Statistics",
    "StatisticsConfig",
    "check_drift",
    "fit_projection",
    "merge_statistics",
    "summarise_shards",
]
