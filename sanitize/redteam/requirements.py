"""What is required of a pipeline, in words that a gate can judge: `badnets@1%:recall>=0.9`."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from sanitize.errors import ConfigError

_FORM = re.compile(r"\s*([^:\s]+)\s*:\s*([a-z0-9_]+)\s*(>=|<=)\s*(\d*\.?\d+)\s*")
_HELP = "expected CASE:MEASURE>=SHARE or <=, such as badnets@1%:recall>=0.9 or none:false_removals<=0.02"


class Requirement(NamedTuple):
    """A bound on the mean of a measure.

    Attributes:
        case: name of a case, or `none`.
        measure: of that case.
        relation: of the mean to the bound.
        bound: in [0, 1].
    """

    case: str
    measure: str
    relation: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.case}:{self.measure}{self.relation}{self.bound!r}"

    def met_by(self, mean: float | None) -> bool:
        """True where the mean keeps the bound; a mean that does not exist keeps none."""
        if mean is None:
            return False
        return mean >= self.bound if self.relation == ">=" else mean <= self.bound


def parse_requirement(text: str, cases: Mapping[str, Sequence[str]]) -> Requirement:
    """The requirement that a text stands for.

    Args:
        text: `CASE:MEASURE>=SHARE` or `<=`; spaces around the parts are allowed.
        cases: the cases that are run -> what is measured of each.

    Raises:
        ConfigError: it is none, the case is not run, its measure is not measured, or the share is above 1.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"requirement {text!r}: {_HELP}")
    case, measure, relation, bound = match[1], match[2], match[3], float(match[4])
    if case not in cases:
        raise ConfigError(f"requirement {text!r}: case {case!r} is not run; the cases are {', '.join(cases)}")
    if measure not in cases[case]:
        raise ConfigError(f"requirement {text!r}: of case {case} there are {', '.join(cases[case])}")
    if bound > 1:
        raise ConfigError(f"requirement {text!r}: {match[4]} is no share; shares lie between 0 and 1: 90 % is 0.9")
    return Requirement(case, measure, ">=" if relation == ">=" else "<=", bound)
