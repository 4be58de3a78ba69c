"""Requirements on a pipeline, such as `badnets@1%:recall>=0.9`."""

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
        measure: a measure of that case.
        relation: `>=` for a lower bound on the mean, `<=` for an upper one.
        bound: the bound, in [0, 1].
    """

    case: str
    measure: str
    relation: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.case}:{self.measure}{self.relation}{self.bound!r}"

    def met_by(self, mean: float | None) -> bool:
        """True where the mean keeps the bound; False without a mean."""
        if mean is None:
            return False
        return mean >= self.bound if self.relation == ">=" else mean <= self.bound


def parse_requirement(text: str, cases: Mapping[str, Sequence[str]]) -> Requirement:
    """Parse a requirement.

    Args:
        text: `CASE:MEASURE>=SHARE` or `<=`; spaces around the parts are allowed.
        cases: case -> its measures.

    Raises:
        ConfigError: the text has another form, there is no such case or measure, or the share is above 1.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"requirement {text!r}: {_HELP}")
    case, measure, relation, bound = match[1], match[2], match[3], float(match[4])
    if case not in cases:
        raise ConfigError(f"requirement {text!r}: there is no case {case!r}; the cases are {', '.join(cases)}")
    if measure not in cases[case]:
        raise ConfigError(f"requirement {text!r}: the measures of case {case} are {', '.join(cases[case])}")
    if bound > 1:
        raise ConfigError(f"requirement {text!r}: {match[4]} is above 1; write 90 % as 0.9")
    return Requirement(case, measure, ">=" if relation == ">=" else "<=", bound)
