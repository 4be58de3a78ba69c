"""Findings of a red team: measures of each case over its repeats, and the requirements they meet."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.redteaming.intervals import estimate
from sanitize.redteaming.measure import Measured
from sanitize.redteaming.requirements import parse_requirement
from sanitize.stage import Work, stage

_LEARNED = 0.5  # ASR from which a trigger counts as learned


class FindingsConfig(BaseModel):
    """Confidence level and requirements.

    Attributes:
        level: confidence level of the intervals, in (0, 1).
        require: requirements; each is judged by the mean over the repeats, not by its interval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: float = Field(default=0.95, gt=0, lt=1)
    require: tuple[str, ...] = ()


class Findings(Artifact):
    """`findings.json`; `pictures/NUMBER.png`: test images of a case with a trigger, by its number."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """cases: [{name, measures: {measure: {mean, low, high, repeats: [[part, whole], ...]}}}, ...]; mean, low and
        high are None for a measure without samples. requirements: [{text, mean, low, high, met}]; met: True where all
        are met; not_learned: cases whose attack success rate before cleaning is small; level."""
        return self.read_object("findings.json", "cases", "requirements")

    def pictures(self) -> dict[str, bytes]:
        """PNG of test images without and with the trigger, by case."""
        names = {case["name"]: f"pictures/{number}.png" for number, case in enumerate(self.info["cases"])}
        return {case: self.read(name) for case, name in names.items() if name in self.manifest().files}


class Case(NamedTuple):
    """A case, and the measures of its repeats."""

    name: str
    repeats: Sequence[Measured]


@stage(Findings, gpu=False, draws="nothing", version=2)
def sum_up(config: FindingsConfig, cases: Sequence[Case], out: str, compute: Compute) -> Work:
    """Sum up the repeats of every case, and judge the requirements.

    Args:
        config: level and requirements.
        cases: cases in the order of the table.
        out: folder of the artifact.
        compute: not used; every stage takes one.

    Raises:
        ConfigError: a requirement names a measure that the cases do not have.
    """

    def write(part: Part) -> None:
        measures = {case.name: _measures(case.repeats, config.level) for case in cases}
        judged = [_judged(text, measures) for text in config.require]
        part.write_json(
            "findings.json",
            {
                "cases": [{"name": name, "measures": found} for name, found in measures.items()],
                "requirements": judged,
                "met": all(requirement["met"] for requirement in judged),
                "not_learned": [name for name, found in measures.items() if _is_not_learned(found)],
                "level": config.level,
            },
        )
        for number, case in enumerate(cases):
            if (png := case.repeats[0].pictures) is not None:
                part.write(f"pictures/{number}.png", png)

    settings = config.model_dump(mode="json") | {"cases": [case.name for case in cases]}
    inputs = {f"{case.name}/{i}": measured.digest for case in cases for i, measured in enumerate(case.repeats)}
    return Work(write=write, config=settings, inputs=inputs)


def _measures(repeats: Sequence[Measured], level: float) -> dict[str, dict[str, Any]]:
    found = {}
    for measure in repeats[0].counts:
        counts = [measured.counts[measure] for measured in repeats]
        summary = estimate(counts, level)
        numbers = {"mean": None, "low": None, "high": None} if summary is None else summary._asdict()
        found[measure] = numbers | {"repeats": counts}
    return found


def _is_not_learned(measures: Mapping[str, Any]) -> bool:
    """True if the trigger was not learned: the attack is harmless, and its recall is not informative."""
    asr = measures["asr_before"]["mean"] if "asr_before" in measures else None
    return asr is not None and asr < _LEARNED


def _judged(text: str, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    requirement = parse_requirement(text, {name: list(found) for name, found in measures.items()})
    found = measures[requirement.case][requirement.measure]
    numbers = {name: found[name] for name in ("mean", "low", "high")}
    return {"text": str(requirement), "met": requirement.met_by(found["mean"])} | numbers
