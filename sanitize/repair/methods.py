"""All repairs, in one list, distinguished by `kind`."""

from typing import Annotated

from pydantic import Field

from sanitize.repair.anp import ANPConfig
from sanitize.repair.clp import CLPConfig
from sanitize.repair.drr import DRRConfig
from sanitize.repair.ep import EPConfig
from sanitize.repair.fine_pruning import FinePruningConfig
from sanitize.repair.fine_tuning import FineTuningConfig
from sanitize.repair.ibau import IBAUConfig
from sanitize.repair.nad import NADConfig
from sanitize.repair.neural_cleanse import NeuralCleanseConfig

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
