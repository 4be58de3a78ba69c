"""Toxic direction: poison as a second cluster of its class. `split` finds it, `sides` says which part is poison."""

from sanitize.score.toxic_direction.scorer import ToxicDirection, ToxicDirectionConfig
from sanitize.score.toxic_direction.split import ClassSplit, SplitConfig, fit_class, log_odds

__all__ = ["ClassSplit", "SplitConfig", "ToxicDirection", "ToxicDirectionConfig", "fit_class", "log_odds"]
