"""Repair of models that have learned a backdoor."""

from sanitize.repairs.anp import ANPConfig
from sanitize.repairs.clp import CLPConfig
from sanitize.repairs.drr import DRRConfig
from sanitize.repairs.ep import EPConfig
from sanitize.repairs.fine_pruning import FinePruningConfig
from sanitize.repairs.fine_tuning import FineTuningConfig
from sanitize.repairs.ibau import IBAUConfig
from sanitize.repairs.inputs import (
    BaseRepairConfig,
    CleanImages,
    Repair,
    Repaired,
    RepairInputs,
    UntrustedBatch,
    in_memory,
    split_clean,
)
from sanitize.repairs.methods import RepairConfig
from sanitize.repairs.nad import NADConfig
from sanitize.repairs.neural_cleanse import NeuralCleanseConfig
from sanitize.repairs.stage import RepairedModel, RepairModelConfig, repair_model

__all__ = [
    "ANPConfig",
    "BaseRepairConfig",
    "CLPConfig",
    "CleanImages",
    "DRRConfig",
    "EPConfig",
    "FinePruningConfig",
    "FineTuningConfig",
    "IBAUConfig",
    "NADConfig",
    "NeuralCleanseConfig",
    "Repair",
    "RepairConfig",
    "RepairInputs",
    "RepairModelConfig",
    "Repaired",
    "RepairedModel",
    "UntrustedBatch",
    "in_memory",
    "repair_model",
    "split_clean",
]
