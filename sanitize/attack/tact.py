"""TaCT (Tang, Wang, Tang & Zhang, 2021, "Demon in the Variant"): a source-specific patch. Only samples of the source
classes get the attacker's label; cover samples of other classes have the patch and their true label.
"""

from typing import ClassVar, Literal

from sanitize.attack.attack import Classes, Fraction
from sanitize.attack.badnets import PatchTrigger


class TaCTConfig(PatchTrigger):
    """A patch that works on the source classes alone.

    Attributes:
        sources: source classes; only their samples are eligible, so `rate` cannot exceed their share of the data.
        cover_rate: as for `Trigger`; by default as many cover samples as poisoned ones.
    """

    added: ClassVar[tuple[str, ...]] = ()

    kind: Literal["tact"] = "tact"
    sources: Classes = (1,)
    cover_rate: Fraction | None = None
