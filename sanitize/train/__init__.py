"""Robust training: methods of the literature as combinations of four ingredients, in one loop (`sanitize.loop`)."""

from sanitize.train.adversary import AdversaryConfig, InputSpace
from sanitize.train.collaborate import CollaborateConfig, Pair
from sanitize.train.drop_scorer import DropScorerConfig, drop_scores
from sanitize.train.labels import LabelsConfig
from sanitize.train.method import Drops, MethodConfig, robust_objective, zoo
from sanitize.train.select_batch import SelectBatchConfig
from sanitize.train.stage import RobustModel, TrainConfig, train_robust

__all__ = [
    "AdversaryConfig",
    "CollaborateConfig",
    "DropScorerConfig",
    "Drops",
    "InputSpace",
    "LabelsConfig",
    "MethodConfig",
    "Pair",
    "RobustModel",
    "SelectBatchConfig",
    "TrainConfig",
    "drop_scores",
    "robust_objective",
    "train_robust",
    "zoo",
]
