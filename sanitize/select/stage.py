"""Turn scores into verdicts, each with its reasons. Only scores and index rows are read, so a changed rule takes
seconds.

The rule of each scorer flags samples; `SelectConfig.verdict` says how many flags put a sample into quarantine. With
several pictures a sample, rules and verdict judge each picture, and a sample is removed if any of its pictures is;
counts and the cap are of samples. Shapes: N scored samples (or pictures), S scorers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Hygiene, HygieneKind, Scores, Selection, sample_starts, write_rows
from sanitize.errors import ArtifactError, ConfigError
from sanitize.select.hygiene import Unclean
from sanitize.select.rules import RULE, Rule, benjamini_hochberg, cauchy_combination, keep_all_but
from sanitize.select.scored import Scored, ScorerOutput, kind_of, read_scores
from sanitize.stage import Advance, Bars, Work, stage

SIBLING = "sample"  # stage of the reason of a picture that is removed because of another one of its sample
NEIGHBOURS = 20  # of which toxic_direction states the disagreement

REASON = pa.struct(
    {
        "stage": pa.string(),
        "reason": pa.string(),
        "score": pa.float32(),
        "threshold": pa.float32(),
        "p_value": pa.float64(),
    }
)
SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "key": pa.string(),
        "label": pa.int64(),
        "status": pa.string(),
        "keep": pa.bool_(),
        "reasons": pa.list_(REASON),
    }
)

SEVERAL = SCHEMA.append(pa.field("sample", pa.int64())).append(pa.field("member", pa.string()))


class SelectConfig(BaseModel):
    """How scores become verdicts.

    Attributes:
        rules: kind of a scorer -> its rule.
        rule: rule of the scorers not named in `rules`; None is the default rule of the scorer: separation for
            toxic_direction, fdr for the others.
        verdict: scorers that must flag a sample for quarantine: `any`, the `majority` (more than half) or `all`; or
            `combined`: Benjamini-Hochberg at level `q` on the combined p-values of all scorers (Cauchy combination),
            for which every rule must give p-values (fdr or conformal).
        q: level of verdict `combined`; the other verdicts use the levels of the rules.
        max_removed_fraction: most that a rule flags of a class, in [0, 1]; above this cap only the highest scores are
            flagged, and the report says so. It does not bind where evidence names a planted group (rule separation).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: dict[str, Rule] = {}
    rule: Rule | None = None
    verdict: Literal["any", "majority", "all", "combined"] = "any"
    q: float = Field(default=0.05, gt=0, lt=1)
    max_removed_fraction: float = Field(default=0.6, ge=0, le=1)

    def rules_of(self, scorers: Mapping[str, str | None]) -> dict[str, Rule]:
        """The rule of each scorer.

        Args:
            scorers: kind of a scorer -> kind of its default rule, None where it has none.

        Raises:
            ConfigError: `rules` names another scorer, there is no rule for a scorer, or the verdict needs p-values that
                a rule does not give.
        """
        if unknown := sorted(set(self.rules) - set(scorers)):
            raise ConfigError(f"select.rules names {', '.join(unknown)}, but the scorers are {', '.join(scorers)}")
        rules = {
            kind: self.rules.get(kind) or self.rule or _default_rule(kind, default) for kind, default in scorers.items()
        }
        for kind, rule in rules.items():
            if self.verdict == "combined" and not rule.gives_p_values:
                raise ConfigError(
                    f"verdict 'combined' needs p-values, and rule {rule.kind!r} of {kind} gives none; set "
                    f"select.rules: {{{kind}: {{kind: fdr}}}}, or conformal"
                )
        return rules


def _default_rule(scorer: str, kind: str | None) -> Rule:
    """The default rule of a scorer, by its kind."""
    try:
        return RULE.validate_python({"kind": kind})
    except ValidationError as error:
        raise ConfigError(
            f"the scores of {scorer} name no default rule, as those of older versions of sanitize: run again with "
            "another --out (a store: `sanitize refit`), or set the rule, for example select.rules: "
            f"{{{scorer}: {{kind: fdr}}}}"
        ) from error


@stage(Selection, version=4, gpu=False, draws="nothing")
def select_samples(
    config: SelectConfig,
    dataset: Dataset,
    scores: Sequence[Scores],
    out: str,
    compute: Compute,
    trusted: Sequence[str] = (),
    hygiene: Hygiene | None = None,
    quarantine: Sequence[HygieneKind] = (),
) -> Work:
    """Decide which samples stay.

    Args:
        config: rules, and the number of flags that make a verdict.
        dataset: all samples, the unreadable ones too.
        scores: scores of the usable samples, by one or more scorers.
        out: folder of the artifact: verdicts, and `selection.json` with one entry a class.
        compute: not used; nothing is random.
        trusted: names of trusted shards: no sample in them is removed, rule `conformal` compares with them.
        hygiene: duplicates, images of low quality and the like; needed for `quarantine` only.
        quarantine: kinds of its findings that put a sample into quarantine, whatever the scorers say.

    Returns:
        The Selection; `status` is kept, quarantined or unreadable. The reasons of a sample name every scorer that
        flags it, also where too few scorers do to remove it.

    Raises:
        ConfigError: a rule does not fit its scorer, or a scorer was fitted on trusted shards.
    """
    trust = {"trusted": sorted(trusted)} if trusted else {}
    inputs = {"dataset": dataset.digest, **{f"scores.{kind_of(s)}": s.digest for s in scores}}
    if hygiene is not None and quarantine:
        trust |= {"quarantine": sorted(set(quarantine))}
        inputs |= {"hygiene": hygiene.digest}
    unclean = Unclean(dataset, hygiene, frozenset(quarantine))
    decided = cache(lambda: _decide(config, dataset, scores, trusted, unclean))
    return Work(
        parts=dataset.shards,
        write_part=lambda shard, part, advance: write_verdicts(dataset, decided(), shard, part, advance),
        finish=lambda part, _: part.write_json("selection.json", decided().summary(config) | trust),
        bar=Bars("select", dataset.manifest().counts.get("samples")),
        config=config.model_dump(mode="json") | trust,
        inputs=inputs,
    )


STATUSES = ("kept", "quarantined", "unreadable")


@dataclass(frozen=True)
class RuleResult:
    """A rule applied to the scores of one scorer.

    Attributes:
        output: scores of the scorer.
        rule: the rule.
        classes: label -> its entry in selection.json.
        flagged_N: True for flagged samples.
        p_N: p-values, float64; None where the rule gives none.
    """

    output: ScorerOutput
    rule: Rule
    classes: dict[int, dict[str, Any]]
    flagged_N: np.ndarray
    p_N: np.ndarray | None


@dataclass(frozen=True)
class Decision:
    """The verdict on all samples.

    Attributes:
        scored: scores of all scorers.
        results: results of their rules.
        removed_N: True for samples that go to quarantine.
        capped: labels of the classes where the cap was reached.
        combined_N: combined p-values, for verdict `combined`.
        unclean: findings of `check_hygiene` that put samples into quarantine.
        suspected_N: True for samples that the scorers removed, where findings may have removed others.
        worst_N: True for pictures that the scorers removed, not their samples; None where each has one picture.
    """

    scored: Scored
    results: list[RuleResult]
    removed_N: np.ndarray
    capped: set[int]
    combined_N: np.ndarray | None = None
    unclean: Unclean | None = None
    suspected_N: np.ndarray | None = None
    worst_N: np.ndarray | None = None

    def summary(self, config: SelectConfig) -> dict[str, Any]:
        """Content of selection.json."""
        return {
            "verdict": config.verdict,
            "rules": {result.output.kind: result.rule.model_dump(mode="json") for result in self.results},
            "classes": {
                str(label): {
                    "n": len(self.scored.worst(label, removed_n)),
                    **({} if self.scored.sample_N is None else {"pictures": len(removed_n)}),
                    "removed": int(self.scored.worst(label, removed_n).sum()),
                    **({"by_hygiene": by_hygiene} if (by_hygiene := self._by_hygiene(label)) else {}),
                    "capped": label in self.capped,
                    "scorers": {result.output.kind: result.classes[label] for result in self.results},
                }
                for label, removed_n in self.scored.by_class(self.removed_N).items()
            },
        }

    def _by_hygiene(self, label: int) -> int:
        """Samples of a class that findings of hygiene removed, and no scorer."""
        if self.suspected_N is None:
            return 0
        is_clean_n = (self.removed_N & ~self.suspected_N)[self.scored.judged[label]]
        return int(self.scored.worst(label, is_clean_n).sum())

    def reasons(self, i: int, label: int) -> list[dict[str, Any]]:
        """Evidence of the scorers against sample i, of class `label`."""
        reasons = [_reason(result, label, i) for result in self.results if result.flagged_N[i]]
        if self.combined_N is None or not (self.removed_N if self.worst_N is None else self.worst_N)[i]:
            return reasons
        p_values = ", ".join(f"{r.output.kind} {r.p_N[i]:.2g}" for r in self.results if r.p_N is not None)
        text = f"combined p-value {self.combined_N[i]:.2g} ({p_values})"
        return [{"stage": "combined", "reason": text, "p_value": float(self.combined_N[i])}, *reasons]


def _decide(
    config: SelectConfig, dataset: Dataset, scores: Sequence[Scores], trusted: Sequence[str], unclean: Unclean
) -> Decision:
    scored = read_scores(scores, trusted)
    if dataset.has_several:
        scored = replace(scored, sample_N=_samples(dataset, scored.slices))
    decision = _by_scores(config, scored)
    suspected_N = scored.any_picture(decision.removed_N)
    removed_N = suspected_N | scored.any_picture(unclean.mask(scored.slices) & ~scored.trusted_N)
    worst_N = decision.removed_N if dataset.has_several else None
    return replace(decision, removed_N=removed_N, unclean=unclean, suspected_N=suspected_N, worst_N=worst_N)


def _samples(dataset: Dataset, slices: Mapping[str, slice]) -> np.ndarray:
    """Number of the sample of each usable picture among all samples, ascending, int64 (N,)."""
    numbers, n = [np.zeros(0, np.int64)], 0
    for shard in slices:
        rows = dataset.rows(shard, ["sample", "status"])
        numbers.append(n + rows.filter(pc.equal(rows["status"], "ok"))["sample"].to_numpy())
        n += len(rows)
    return np.concatenate(numbers)


def _by_scores(config: SelectConfig, scored: Scored) -> Decision:
    rules = config.rules_of({output.kind: output.rule for output in scored.outputs})
    results = [rule_on(output, rules[output.kind], scored, config) for output in scored.outputs]
    if config.verdict == "combined":
        return _combine(config, scored, results)
    n_flags_N = np.sum([result.flagged_N for result in results], axis=0)
    capped = {y for result in results for y, of_class in result.classes.items() if of_class["capped"]}
    return Decision(scored, results, n_flags_N >= flags_needed(config, len(results)), capped)


def flags_needed(config: SelectConfig, n_scorers: int) -> int:
    """Number of scorers that must flag a sample for quarantine."""
    return {"any": 1, "majority": n_scorers // 2 + 1, "all": n_scorers}[config.verdict]


def _combine(config: SelectConfig, scored: Scored, results: list[RuleResult]) -> Decision:
    """Benjamini-Hochberg on the combined p-values of all samples that are not trusted."""
    combined_N = cauchy_combination(np.stack([result.p_N for result in results if result.p_N is not None]))
    judged = -combined_N[~scored.trusted_N]  # negative: the higher, the more suspicious
    threshold = keep_all_but(judged, benjamini_hochberg(-judged, config.q))
    removed_N, capped = np.zeros(len(combined_N), bool), set()
    for label, s_n in scored.by_class(-combined_N).items():
        worst_k = scored.worst(label, s_n)
        cap = keep_all_but(worst_k, int(config.max_removed_fraction * len(worst_k)))
        removed_N[scored.judged[label]] = s_n > max(threshold, cap)
        if cap > threshold:
            capped.add(label)
    return Decision(scored, results, removed_N, capped, combined_N)


def rule_on(output: ScorerOutput, rule: Rule, scored: Scored, config: SelectConfig) -> RuleResult:
    """Apply the rule of a scorer to its scores.

    Args:
        output: scores of the scorer.
        rule: its rule.
        scored: scores of all scorers; says which samples are judged and which trusted.
        config: the cap.
    """
    by_class, trusted_M = scored.by_class(output.scores_N), output.scores_N[scored.trusted_N]
    decided = rule.build()(by_class, output.statistics, trusted_M)
    classes: dict[int, dict[str, Any]] = {}
    flagged_N = np.zeros(len(output.scores_N), bool)
    for label, s_n in by_class.items():
        most = 1.0 if label in decided.uncapped else config.max_removed_fraction
        worst_k = scored.worst(label, s_n)
        cap = keep_all_but(worst_k, int(most * len(worst_k)))
        # A rule that flags a whole class gives minus infinity, which JSON cannot hold: take the lowest float.
        threshold = max(decided.thresholds[label], cap, float(np.finfo(np.float32).min))
        flagged_N[scored.judged[label]] = s_n > threshold
        classes[label] = {
            "flagged": int((worst_k > threshold).sum()),
            "threshold": threshold if threshold < math.inf else None,
            "capped": bool(cap > decided.thresholds[label]),
            **output.statistics.get(label, {}),
            **({"level": decided.levels[label]} if label in decided.levels else {}),
        }
    p_N = None
    if decided.p_values is not None:
        p_N = np.ones(len(output.scores_N))
        for label, p_n in decided.p_values.items():
            p_N[scored.judged[label]] = p_n
    return RuleResult(output, rule, classes, flagged_N, p_N)


def write_verdicts(dataset: Dataset, decision: Decision, shard: str, part: Part, advance: Advance) -> None:
    """Write the verdicts of one shard, and count them."""
    rows = verdicts_of_shard(dataset, decision, shard)
    table = pa.Table.from_pylist(rows, SEVERAL if dataset.has_several else SCHEMA)
    write_rows(part, shard, table)
    found = table["status"].take(sample_starts(table)).to_pylist()
    part.counts.update(samples=len(found), **{status: found.count(status) for status in STATUSES})
    advance(len(found))


def verdicts_of_shard(dataset: Dataset, decision: Decision, shard: str) -> list[dict[str, Any]]:
    """The rows of the shard, as in SCHEMA or SEVERAL. Raises ArtifactError where other samples were scored."""
    scored = decision.scored.slices.get(shard, slice(0, 0))
    columns = ["position", "key", "label", "status", "reason"]
    table = dataset.rows(shard, [*columns, "sample", "image"] if dataset.has_several else columns)
    indexed = table.to_pylist()
    if sum(row["status"] == "ok" for row in indexed) != scored.stop - scored.start:
        raise ArtifactError(f"the scores of shard {shard} do not belong to the samples of {dataset.path}")
    rows, at = [], iter(range(scored.start, scored.stop))
    is_trusted = bool(decision.scored.trusted_N[scored].any())
    found = {} if decision.unclean is None or is_trusted else decision.unclean.reasons(shard)
    for row in indexed:
        verdict = {name: row[name] for name in ("position", "key", "label")}
        if dataset.has_several:
            verdict |= {"sample": row["sample"], "member": row["image"]}
        if row["status"] != "ok":
            reasons = [{"stage": "index", "reason": row["reason"]}]
            rows.append(verdict | {"status": "unreadable", "keep": False, "reasons": reasons})
            continue
        i = next(at)
        keep = not decision.removed_N[i]
        status = "kept" if keep else "quarantined"
        reasons = decision.reasons(i, row["label"]) + found.get(row["position"], [])
        rows.append(verdict | {"status": status, "keep": keep, "reasons": reasons})
    if dataset.has_several:
        _name_the_worst(rows)
    return rows


def _name_the_worst(rows: list[dict[str, Any]]) -> None:
    """Give pictures that are removed because of another one of their sample a reason that names it."""
    named: dict[int, str] = {}  # sample -> its first picture with a reason
    for row in rows:
        if row["status"] == "quarantined" and row["reasons"]:
            named.setdefault(row["sample"], row["member"])
    for row in rows:
        if row["status"] == "quarantined" and not row["reasons"]:
            row["reasons"] = [{"stage": SIBLING, "reason": f"picture {named[row['sample']]} of its sample is removed"}]


def _reason(result: RuleResult, label: int, i: int) -> dict[str, Any]:
    """The reason for a scorer's flag on sample i."""
    of_class, score, kind = result.classes[label], float(result.output.scores_N[i]), result.output.kind
    text = f"{kind} score {score:.4g} is above {of_class['threshold']:.4g}"
    if "planted" in of_class:
        text += _conflict(of_class)
    elif "separation" in of_class:
        text += _split(of_class)
    reason = {"stage": kind, "reason": text, "score": score, "threshold": of_class["threshold"]}
    return reason if result.p_N is None else reason | {"p_value": float(result.p_N[i])}


def _conflict(of_class: dict[str, Any]) -> str:
    """Evidence of the planted group of a class, in words."""
    if not of_class["planted"]:
        return "; no planted group was found in the class"
    if not of_class["side_by_labels"]:
        return (
            f"; the pattern that the planted group shares, put on images of other classes, turns "
            f"{100 * of_class['stamp']:.0f} % of them into this class"
        )
    n, rest = (round(NEIGHBOURS * of_class[name]) for name in ("disagreement", "disagreement_of_rest"))
    return (
        f"; in the planted group {n} of {NEIGHBOURS} nearest neighbours carry another label ({rest} in the rest of the "
        f"class), although the model is sure of this one ({of_class['z']:.1f} standard errors)"
    )


def _split(of_class: dict[str, Any]) -> str:
    """Evidence of a class that was split in two, in words."""
    text = f"; the class splits in two, {of_class['separation']:.1f} standard deviations apart"
    if "disagreement" in of_class:
        here, there = 100 * of_class["disagreement"], 100 * of_class["disagreement_of_rest"]
        text += (
            f"; of the nearest neighbours {here:.0f} % have another label on this side and {there:.0f} % on the other"
        )
        text += ", which decided between them" if of_class["side_by_labels"] else ""
    return text
