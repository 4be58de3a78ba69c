"""Toxic direction: poison as a group of its class whose labels are in conflict with what its images look like.

`candidates` finds groups, `evidence` measures one and `weigh` all of them, `rule` says what a group is, `decide` takes
planted groups out in rounds, `grow` tells who belongs to them, `verdict` states the outcome.
`split` is the search of one split, `sides` its side by shape, `single_split` the scorer without evidence.
"""

from sanitize.score.toxic_direction.rule import EvidenceConfig
from sanitize.score.toxic_direction.scorer import ToxicDirection, ToxicDirectionConfig
from sanitize.score.toxic_direction.single_split import SingleSplit
from sanitize.score.toxic_direction.split import ClassSplit, SplitConfig, fit_class, log_odds

__all__ = [
    "ClassSplit",
    "EvidenceConfig",
    "SingleSplit",
    "SplitConfig",
    "ToxicDirection",
    "ToxicDirectionConfig",
    "fit_class",
    "log_odds",
]
