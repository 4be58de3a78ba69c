"""Turn scores of new samples into verdicts by the thresholds of a reference, each sample on its own.

So ten shards at once and five batches of two get the same verdicts. The threshold of a scorer in a class is the lower
of two. The first comes from the rule of the approved run, applied to the reference's own sample. Rules that look for
groups (separation, fdr) find none in clean data and set no threshold there; so the second is conformal: a sample is
flagged where its p-value among rows of the reference that the scorer was not fitted on,

    p = (1 + #{rows with a score at least as high}) / (1 + rows),

is at most `level`: among the rows of its own class where they are enough, otherwise among all rows. Each scorer flags a
new clean sample with this probability at most, if the sample is exchangeable with these rows (Vovk, Gammerman & Shafer,
2005, section 4.5: Mondrian conformal prediction).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Scores, Selection
from sanitize.errors import ArtifactError, ConfigError
from sanitize.select.scored import Scored, ScorerOutput, kind_of, read_scores
from sanitize.select.stage import Decision, RuleResult, SelectConfig, flags_needed, rule_on, write_verdicts
from sanitize.stage import Bars, Work, stage

NOWHERE = np.zeros(0, np.int64)


class JudgeConfig(BaseModel):
    """How new samples are judged.

    Attributes:
        select: rules and verdict of the approved run. Verdict `combined`, which judges all samples of a run together,
            is refused. The cap `max_removed_fraction`, a share of a batch, applies to the reference's thresholds only.
        level: probability that a scorer flags a clean sample, in (0, 0.5); None uses the rules alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    select: SelectConfig = SelectConfig()
    level: float | None = Field(default=0.001, gt=0, lt=0.5)

    def false_flags(self, n_scorers: int) -> float:
        """Largest share of clean samples flagged because of `level` (Bonferroni)."""
        return min(0.5, n_scorers * (self.level or 0.0))


@stage(Selection, version=3, gpu=False, draws="nothing")
def judge_shards(
    config: JudgeConfig,
    dataset: Dataset,
    scores: Sequence[Scores],
    reference: Sequence[Scores],
    out: str,
    compute: Compute,
    trusted: Sequence[str] = (),
) -> Work:
    """Decide which new samples stay, one by one, by the thresholds of a reference.

    Args:
        config: rules of the approved run, and the level.
        dataset: all new samples, the unreadable ones too.
        scores: scores of the usable samples, by one or more scorers.
        reference: scores of the reference's sample by the same scorers.
        out: folder of the artifact: verdicts and `selection.json`, as `select_samples` writes them.
        compute: not used; nothing is random.
        trusted: shards of the reference's sample that scorers were not fitted on; thresholds are calibrated on them.

    Raises:
        ConfigError: verdict `combined`, or a rule that does not fit its scorer.
        ArtifactError: scores and reference come from different scorers.
    """
    if config.select.verdict == "combined":
        raise ConfigError(
            "verdict 'combined' bounds the share of clean samples among those removed from one batch, so what becomes "
            "of a sample depends on its batch; new shards are judged one by one: set select.verdict to any, majority "
            "or all in the run that the reference is made from"
        )
    named = {f"scores.{kind_of(s)}": s for s in scores}
    references = {f"reference.{kind_of(s)}": s for s in reference}
    _same_scorers(scores, reference)
    decided = cache(lambda: _decide(config, scores, reference, trusted))

    return Work(
        parts=dataset.shards,
        write_part=lambda shard, part, advance: write_verdicts(dataset, decided(), shard, part, advance),
        finish=lambda part, _: part.write_json(
            "selection.json", decided().summary(config.select) | {"level": config.level}
        ),
        bar=Bars("judge", dataset.manifest().counts.get("samples")),
        config=config.model_dump(mode="json") | {"trusted": sorted(trusted)},
        inputs={"dataset": dataset.digest} | {name: s.digest for name, s in (named | references).items()},
    )


def _same_scorers(scores: Sequence[Scores], reference: Sequence[Scores]) -> None:
    here, there = ({kind_of(s): s.manifest().recipe.inputs["fitted"] for s in group} for group in (scores, reference))
    if here != there:
        raise ArtifactError("the new samples were not scored by the scorers of the reference; give scores of one store")


def _decide(
    config: JudgeConfig, scores: Sequence[Scores], reference: Sequence[Scores], trusted: Sequence[str]
) -> Decision:
    known, new = read_scores(reference, trusted), read_scores(scores, ())
    rules = config.select.rules_of({output.kind: output.rule for output in known.outputs})
    results = []
    for theirs, ours in zip(known.outputs, new.outputs, strict=True):
        result = rule_on(theirs, rules[theirs.kind], known, config.select)
        results.append(_apply(result, theirs, ours, known, new, config.level))
    n_flags_N = np.sum([result.flagged_N for result in results], axis=0)
    return Decision(new, results, n_flags_N >= flags_needed(config.select, len(results)), set())


def _apply(
    result: RuleResult, theirs: ScorerOutput, ours: ScorerOutput, known: Scored, new: Scored, level: float | None
) -> RuleResult:
    """Apply the thresholds of the reference, and the level, to new samples; a class unknown to the reference stays."""
    flagged_N = np.zeros(len(ours.scores_N), bool)
    classes: dict[int, dict[str, Any]] = {}
    trusted_M = theirs.scores_N[known.trusted_N]
    for label, at in new.judged.items():
        by_rule, by_level, found = math.inf, math.inf, {}
        if label in result.classes:
            found = result.classes[label]
            by_rule = math.inf if found["threshold"] is None else found["threshold"]
            of_class = theirs.scores_N[known.trusted.get(label, NOWHERE)]
            by_level = conformal_threshold(of_class, trusted_M, level)
        threshold = min(by_rule, by_level)
        flagged_N[at] = ours.scores_N[at] > threshold
        # The rule's measures of the reference's class are a reason only where the rule sets the threshold.
        classes[label] = (found if by_rule < by_level else {}) | {
            "flagged": int(flagged_N[at].sum()),
            "threshold": threshold if threshold < math.inf else None,
            "capped": False,
        }
    return RuleResult(ours, result.rule, classes, flagged_N, None)


def conformal_threshold(of_class_M: np.ndarray, all_N: np.ndarray, level: float | None) -> float:
    """Score above which a conformal p-value is at most `level`: of the class if it has enough rows, else of all."""
    for scores_M in (of_class_M, all_N):
        n_above = 0 if level is None else math.floor(level * (len(scores_M) + 1))
        if n_above >= 1:
            return float(np.partition(scores_M, len(scores_M) - n_above)[len(scores_M) - n_above])
    return math.inf
