"""All repairs, in one list, distinguished by `kind`. `inputs.py` says how one is added."""

from typing import Annotated

from pydantic import Field

from sanitize.repairs.anp import ANPConfig
from sanitize.repairs.clp import CLPConfig
from sanitize.repairs.drr import DRRConfig
from sanitize.repairs.ep import EPConfig
from sanitize.repairs.fine_pruning import FinePruningConfig
from sanitize.repairs.fine_tuning import FineTuningConfig
from sanitize.repairs.ibau import IBAUConfig
from sanitize.repairs.nad import NADConfig
from sanitize.repairs.neural_cleanse import NeuralCleanseConfig

RepairConfig = Annotated[
    DRRConfig
    | IBAUConfig
    | FineTuningConfig
    | FinePruningConfig
    | CLPConfig
    | EPConfig
    | ANPConfig
    | NADConfig
    | NeuralCleanseConfig,
    Field(discriminator="kind"),
]
