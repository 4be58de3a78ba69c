"""Robust training: methods of the literature as combinations of four ingredients, in one loop (`sanitize.loop`)."""

from sanitize.training.adversary import AdversaryConfig, InputSpace
from sanitize.training.collaborate import CollaborateConfig, Pair
from sanitize.training.drop_scorer import DropScorerConfig, drop_scores
from sanitize.training.labels import LabelsConfig
from sanitize.training.method import Drops, MethodConfig, robust_objective, zoo
from sanitize.training.select_batch import SelectBatchConfig
from sanitize.training.stage import RobustModel, TrainConfig, train_robust

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
