"""Red team: recall, precision and false removals of a pipeline under known attacks on a sample of the data."""

from sanitize.redteaming.cases import NONE, PlannedAttack, attack_called, case_name, measures_of
from sanitize.redteaming.findings import Case, Findings, FindingsConfig, sum_up
from sanitize.redteaming.intervals import Estimate, clopper_pearson, estimate
from sanitize.redteaming.measure import MEASURES, Measured, measure_case
from sanitize.redteaming.requirements import Requirement, parse_requirement
from sanitize.redteaming.sample import SampleConfig, Samples, sample_shards

__all__ = [
    "MEASURES",
    "NONE",
    "Case",
    "Estimate",
    "Findings",
    "FindingsConfig",
    "Measured",
    "PlannedAttack",
    "Requirement",
    "SampleConfig",
    "Samples",
    "attack_called",
    "case_name",
    "clopper_pearson",
    "estimate",
    "measure_case",
    "measures_of",
    "parse_requirement",
    "sample_shards",
    "sum_up",
]
