"""From scores to verdicts, from verdicts to shards: rules decide, the writer copies bytes, verdicts can be undone."""

from sanitize.select.judge import JudgeConfig, judge_shards
from sanitize.select.restore import RestoreConfig, restore_samples
from sanitize.select.rules import ConformalRule, ContaminationRule, FDRRule, Rule, SeparationRule
from sanitize.select.stage import SelectConfig, select_samples
from sanitize.select.trusted import trusted_shards
from sanitize.select.write import Shards, WriteConfig, write_selected

__all__ = [
    "ConformalRule",
    "ContaminationRule",
    "FDRRule",
    "JudgeConfig",
    "RestoreConfig",
    "Rule",
    "SelectConfig",
    "SeparationRule",
    "Shards",
    "WriteConfig",
    "judge_shards",
    "restore_samples",
    "select_samples",
    "trusted_shards",
    "write_selected",
]
