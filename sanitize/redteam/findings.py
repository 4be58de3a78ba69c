"""What a red team found: measures of each case over its repeats, and which requirements they meet."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.redteam.intervals import estimate
from sanitize.redteam.measure import Measured
from sanitize.redteam.requirements import parse_requirement
from sanitize.stage import Work, stage

_LEARNED = 0.5  # ASR from which a trigger counts as learned


class FindingsConfig(BaseModel):
    """How repeats are summed up and judged.

    Attributes:
        level: of confidence intervals, in (0, 1).
        require: requirements; each is judged by the mean over the repeats, not by its interval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: float = Field(default=0.95, gt=0, lt=1)
    require: tuple[str, ...] = ()


class Findings(Artifact):
    """`findings.json`; `pictures/NUMBER.png`: test images of a case with a trigger, by its number."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """cases: [{name, measures: {measure: {mean, low, high, repeats: [[how many, of how many], ...]}}}, ...]; of a
        measure that had nothing to count, mean, low and high are None. requirements: [{text, mean, low, high, met}];
        met: whether all are; not_learned: cases whose trigger the models before hardly knew; level."""
        return self.read_object("findings.json", "cases", "requirements")

    def pictures(self) -> dict[str, bytes]:
        """PNG of two rows of images, by case."""
        names = {case["name"]: f"pictures/{number}.png" for number, case in enumerate(self.info["cases"])}
        return {case: self.read(name) for case, name in names.items() if name in self.manifest().files}


class Case(NamedTuple):
    """A case, and what was measured in each of its repeats."""

    name: str
    repeats: Sequence[Measured]


@stage(Findings, gpu=False, draws="nothing")
def sum_up(config: FindingsConfig, cases: Sequence[Case], out: str, compute: Compute) -> Work:
    """Sum up the repeats of every case, and judge the requirements.

    Args:
        config: level and requirements.
        cases: in the order in which they are to be shown.
        out: folder of the artifact.
        compute: unused but for the convention; nothing is random.

    Raises:
        ConfigError: a requirement is about something that was not measured.
    """

    def write(part: Part) -> None:
        measures = {case.name: _measures(case.repeats, config.level) for case in cases}
        judged = [_judged(text, measures) for text in config.require]
        part.write_json(
            "findings.json",
            {
                "cases": [{"name": name, "measures": of} for name, of in measures.items()],
                "requirements": judged,
                "met": all(requirement["met"] for requirement in judged),
                "not_learned": [name for name, of in measures.items() if _is_not_learned(of)],
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
        counts = [of.counts[measure] for of in repeats]
        summary = estimate(counts, level)
        numbers = {"mean": None, "low": None, "high": None} if summary is None else summary._asdict()
        found[measure] = numbers | {"repeats": counts}
    return found


def _is_not_learned(measures: Mapping[str, Any]) -> bool:
    """What no model has learned cannot be seen in one, nor does it do harm: a low recall there says little."""
    asr = measures["asr_before"]["mean"] if "asr_before" in measures else None
    return asr is not None and asr < _LEARNED


def _judged(text: str, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    requirement = parse_requirement(text, {name: list(of) for name, of in measures.items()})
    found = measures[requirement.case][requirement.measure]
    numbers = {name: found[name] for name in ("mean", "low", "high")}
    return {"text": str(requirement), "met": requirement.met_by(found["mean"])} | numbers
