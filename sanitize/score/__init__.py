"""Anomaly scores, one method a file. A score is higher for a more suspicious sample, always."""

from sanitize.score.anomaly_scorer import AnomalyScorer, RCAScorerConfig, RobustRealNVPScorerConfig
from sanitize.score.label_margin import LabelMargin, LabelMarginConfig
from sanitize.score.neighbours import Neighbours, NeighboursConfig
from sanitize.score.rca import RCA, RCAConfig
from sanitize.score.robust_realnvp import RobustRealNVP, RobustRealNVPConfig
from sanitize.score.spectral import Spectral, SpectralConfig
from sanitize.score.stage import FittedScorer, ScorerConfig, fit_scorer, score_shards
from sanitize.score.toxic_direction import EvidenceConfig, ToxicDirection, ToxicDirectionConfig

__all__ = [
    "RCA",
    "AnomalyScorer",
    "EvidenceConfig",
    "FittedScorer",
    "LabelMargin",
    "LabelMarginConfig",
    "Neighbours",
    "NeighboursConfig",
    "RCAConfig",
    "RCAScorerConfig",
    "RobustRealNVP",
    "RobustRealNVPConfig",
    "RobustRealNVPScorerConfig",
    "ScorerConfig",
    "Spectral",
    "SpectralConfig",
    "ToxicDirection",
    "ToxicDirectionConfig",
    "fit_scorer",
    "score_shards",
]
