"""Repair of models that have learned a backdoor."""

from sanitize.repair.anp import ANPConfig
from sanitize.repair.clp import CLPConfig
from sanitize.repair.drr import DRRConfig
from sanitize.repair.ep import EPConfig
from sanitize.repair.fine_pruning import FinePruningConfig
from sanitize.repair.fine_tuning import FineTuningConfig
from sanitize.repair.ibau import IBAUConfig
from sanitize.repair.inputs import (
    CleanImages,
    Repaired,
    RepairInputs,
    RepairMethod,
    UntrustedBatch,
    in_memory,
    split_clean,
)
from sanitize.repair.methods import RepairConfig
from sanitize.repair.nad import NADConfig
from sanitize.repair.neural_cleanse import NeuralCleanseConfig
from sanitize.repair.stage import RepairedModel, RepairModelConfig, repair_model

__all__ = [
    "ANPConfig",
    "CLPConfig",
    "CleanImages",
    "DRRConfig",
    "EPConfig",
    "FinePruningConfig",
    "FineTuningConfig",
    "IBAUConfig",
    "NADConfig",
    "NeuralCleanseConfig",
    "RepairConfig",
    "RepairInputs",
    "RepairMethod",
    "RepairModelConfig",
    "Repaired",
    "RepairedModel",
    "UntrustedBatch",
    "in_memory",
    "repair_model",
    "split_clean",
]
