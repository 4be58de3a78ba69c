"""Robust training: one loop (`sanitize.loop`), four ingredients, and the methods of the literature as combinations."""

from sanitize.train.adversary import AdversaryConfig, InputSpace
from sanitize.train.collaborate import CollaborateConfig, Pair
from sanitize.train.labels import LabelsConfig
from sanitize.train.method import Drops, MethodConfig, robust_objective, zoo
from sanitize.train.per_sample import without_batch_norm
from sanitize.train.select_batch import SelectBatchConfig

__all__ = [
    "AdversaryConfig",
    "CollaborateConfig",
    "Drops",
    "InputSpace",
    "LabelsConfig",
    "MethodConfig",
    "Pair",
    "SelectBatchConfig",
    "robust_objective",
    "without_batch_norm",
    "zoo",
]
