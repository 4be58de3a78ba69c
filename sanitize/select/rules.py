"""Rules: from the scores of each class to the threshold above which samples are flagged. Every rule may find nothing.

To add a rule: its config, a subclass of `BaseRule`, and the function that decides, which `build` returns; and the
config's name in the union `Rule`.

Shapes: N scores of one class, K classes, M scores of trusted samples, S scorers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sanitize.errors import ConfigError
from sanitize.plural import counted

Scores = Mapping[int, np.ndarray]  # label -> float32 (N,)
Statistics = Mapping[int, Mapping[str, float]]
NO_SCORES = np.zeros(0, np.float32)


class RuleOutput(NamedTuple):
    """What a rule decides about each class.

    Attributes:
        thresholds: label -> threshold; samples with a score *above* it (>) are flagged. Infinity flags none.
        p_values: label -> p-values (N,) in (0, 1], float64; None for rules without p-values.
        levels: label -> separation above which the class is touched; empty for rules without such a level.
        uncapped: labels of the classes in which `max_removed_fraction` does not bind.
    """

    thresholds: dict[int, float]
    p_values: dict[int, np.ndarray] | None = None
    levels: Mapping[int, float] = {}
    uncapped: frozenset[int] = frozenset()


class RuleFunction(Protocol):
    """A rule with its settings, a function."""

    def __call__(self, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES) -> RuleOutput:
        """Decide about each class.

        Args:
            scores: label -> scores of the samples to judge.
            statistics: label -> what the scorer measured of the class.
            trusted_M: scores of the trusted samples, float32.

        Raises:
            ConfigError: the rule cannot be used with this scorer or with so few trusted samples.
        """
        ...


class BaseRule(BaseModel, ABC):
    """Settings of a rule.

    Attributes:
        gives_p_values: True where the rule gives p-values, as verdict `combined` needs.
        needs_trusted: True where the rule compares with trusted samples.
        scorers: kinds of the scorers whose scores the rule can judge; empty for all.
        kind: name of the rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    gives_p_values: ClassVar[bool] = False
    needs_trusted: ClassVar[bool] = False
    scorers: ClassVar[tuple[str, ...]] = ()

    kind: str

    @abstractmethod
    def build(self) -> RuleFunction:
        """The rule."""

    def check_trusted(self, n: int) -> None:
        """Raise ConfigError where `n` trusted samples are too few for the rule."""


class ContaminationRule(BaseRule):
    """Remove 1.5 x `rate` of every class, the highest scores first (Tran, Li & Madry, 2018, Algorithm 1).

    Attributes:
        rate: expected share of poison *within a class*, in (0, 0.5].
        factor: safety margin, a factor on the rate; 1.5 in the paper.
    """

    kind: Literal["contamination"] = "contamination"
    rate: float = Field(gt=0, le=0.5)
    factor: float = Field(default=1.5, gt=0)

    def build(self) -> RuleFunction:
        """The function `contamination` with these settings."""
        return partial(contamination, self)


def contamination(
    config: ContaminationRule, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES
) -> RuleOutput:
    """Thresholds: the score below the top `factor * rate` of each class."""
    share = config.factor * config.rate
    return RuleOutput({y: keep_all_but(s_N, round(share * len(s_N))) for y, s_N in scores.items()})


class SeparationRule(BaseRule):
    """Touch a class only where a part of it was planted; needs no rate.

    The scorer must be `toxic_direction`, which gives log-odds as scores: samples of a touched class that are more
    likely in the planted part than not are flagged (log-odds > `log_odds`).

    With evidence, the default, the scorer has decided which classes hold a planted group, by the thresholds of its
    `evidence` (`sanitize.score.toxic_direction.rule`). These classes are touched, and the cap does not bind there:
    the evidence says which side is poison, and poison may be most of a class.

    Without evidence (`evidence: null`) a class is touched where its two components are further apart than in clean
    classes. The level is calibrated on the classes of the run, and its upper bound keeps poison in many classes from
    hiding behind itself:

        level = clip(median + 3 * 1.4826 * median |separation - median|, floor, 1.1 * floor)

    Attributes:
        floor: without evidence: separation, in standard deviations of the components, below which a class is never
            touched. Clean classes of Fashion-MNIST and CIFAR-10 reach 3.9, poisoned ones begin at 5.3 (LOG.md).
        small_class_floor: without evidence: floor for classes of fewer than `small_class` samples, whose natural splits
            are wider: handwritten digits reach 7.3.
        small_class: fewest samples of a class that is not small.
        log_odds: natural log of the odds above which a sample of a touched class is flagged.
    """

    scorers: ClassVar[tuple[str, ...]] = ("toxic_direction",)

    kind: Literal["separation"] = "separation"
    floor: float = Field(default=4.5, ge=0)
    small_class_floor: float = Field(default=7.6, ge=0)
    small_class: int = Field(default=500, ge=0)
    log_odds: float = 0.0

    def build(self) -> RuleFunction:
        """The function `separation` with these settings."""
        return partial(separation, self)


def separation(
    config: SeparationRule, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES
) -> RuleOutput:
    """Thresholds: `log_odds` for the touched classes, infinity for the others.

    The classes in which the evidence names a planted group are not capped.

    Raises:
        ConfigError: the scorer measures no separation.
    """
    if statistics and not any("separation" in of_class for of_class in statistics.values()):
        raise ConfigError("rule 'separation' needs scorer 'toxic_direction'; use 'fdr', 'conformal' or 'contamination'")
    levels = separation_levels(config, scores, statistics)
    above = {y for y, of_class in statistics.items() if of_class.get("separation", 0.0) > levels.get(y, math.inf)}
    planted = {y for y, of_class in statistics.items() if of_class.get("planted", 0.0) > 0}
    thresholds = {y: config.log_odds if y in above | planted else math.inf for y in scores}
    return RuleOutput(thresholds, levels=levels, uncapped=frozenset(planted))


def separation_levels(config: SeparationRule, scores: Scores, statistics: Statistics) -> dict[int, float]:
    """Label -> separation above which the class is touched; empty where evidence has decided."""
    if any("planted" in of_class for of_class in statistics.values()):
        return {}
    separations_K = np.array([of_class.get("separation", 0.0) for of_class in statistics.values()] or [0.0])
    centre = float(np.median(separations_K))
    natural = centre + 3 * 1.4826 * float(np.median(np.abs(separations_K - centre)))
    floors = {
        y: config.floor if len(s_N) >= config.small_class else config.small_class_floor for y, s_N in scores.items()
    }
    return {y: min(max(natural, floor), 1.1 * floor) for y, floor in floors.items()}


class _PValueRule(BaseRule):
    """Rules by p-values.

    Attributes:
        q: bound on the expected share of clean samples among those removed, in (0, 1).
    """

    gives_p_values: ClassVar[bool] = True

    q: float = Field(default=0.05, gt=0, lt=1)


class FDRRule(_PValueRule):
    """Benjamini-Hochberg at level `q` with an empirical null: the standardised scores of all *other* classes.

    Parametric nulls removed 10-16 % of clean images: natural outliers lie as far out as poison. The null of the other
    classes of the run is right where poison is in few classes, and cautious elsewhere.

    A scorer that counts, such as `neighbours`, states the `resolution` of its scores in each class: their standard
    error. Scores no more than three of them above the median of the class differ by chance, and are not rejected,
    however alike the scores of the other classes are.
    """

    kind: Literal["fdr"] = "fdr"

    def build(self) -> RuleFunction:
        """The function `fdr` with these settings."""
        return partial(fdr, self)


def fdr(config: FDRRule, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES) -> RuleOutput:
    """Thresholds: the highest score of each class that is not rejected."""
    p_values = empirical_p_values(scores)
    for y, s_N in scores.items():
        resolution = statistics.get(y, {}).get("resolution", 0.0)
        if resolution > 0:
            p_values[y][s_N <= np.median(s_N) + 3 * resolution] = 1.0
    thresholds = {y: keep_all_but(s_N, benjamini_hochberg(p_values[y], config.q)) for y, s_N in scores.items()}
    return RuleOutput(thresholds, p_values)


def empirical_p_values(scores: Scores) -> dict[int, np.ndarray]:
    """Label -> share of the other classes' scores that are at least as high, (N,) in (0, 1]."""
    z = {y: standardised(s_N) for y, s_N in scores.items()}
    ordered = np.sort(np.concatenate([*z.values(), NO_SCORES]))
    found = {}
    for y, z_N in z.items():
        above_N = n_at_least(ordered, z_N) - n_at_least(np.sort(z_N), z_N)
        found[y] = (1 + above_N) / (1 + len(ordered) - len(z_N))
    return found


class ConformalRule(_PValueRule):
    """Benjamini-Hochberg at level `q` on conformal p-values: a bounded false discovery rate.

    Needs trusted samples that the scorer was not fitted on. The p-value of a score s is
    p = (1 + #{trusted scores >= s}) / (M + 1); all classes are judged together. Where trusted samples and the clean
    ones among the others are exchangeable, at most the share `q` of the removed samples is clean, on average over data
    sets, whatever the scorer and the distribution: sharing the trusted samples makes these p-values dependent, but
    positively (PRDS), which Benjamini-Hochberg allows (Bates, Candes, Lei, Romano & Sesia, "Testing for outliers with
    conformal p-values", Annals of Statistics 2023, section 2). The samples judged are usually those the scorer was
    fitted on; these look less abnormal than fresh ones, so the rule errs on the side of keeping.

    No p-value is below 1 / (M + 1): of N samples judged, N / (q (M + 1)) must stand out together for any to be found.
    """

    needs_trusted: ClassVar[bool] = True

    kind: Literal["conformal"] = "conformal"

    def build(self) -> RuleFunction:
        """The function `conformal` with these settings."""
        return partial(conformal, self)

    def check_trusted(self, n: int) -> None:
        """Raise ConfigError where no p-value from `n` trusted samples can reach `q`."""
        n_needed = math.ceil(1 / self.q) - 1
        if n < n_needed:
            raise ConfigError(
                f"rule 'conformal' at q = {self.q} needs at least {counted(n_needed, 'trusted sample')}, not {n}: no "
                "p-value is below 1 / (trusted samples + 1). Name more shards under `trusted:`; to find a few outliers "
                "among N samples, about N trusted samples are needed"
            )


def conformal(
    config: ConformalRule, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES
) -> RuleOutput:
    """One threshold for all classes: the highest score that is not rejected.

    Raises:
        ConfigError: too few trusted samples for any p-value to reach q.
    """
    config.check_trusted(len(trusted_M))
    ordered_M = np.sort(trusted_M)
    p_values = {y: (1 + n_at_least(ordered_M, s_N)) / (1 + len(ordered_M)) for y, s_N in scores.items()}
    p_N = np.concatenate([*p_values.values(), np.ones(0)])
    s_N = np.concatenate([*scores.values(), NO_SCORES])
    threshold = keep_all_but(s_N, benjamini_hochberg(p_N, config.q))
    return RuleOutput(dict.fromkeys(scores, threshold), p_values)


Rule = Annotated[ContaminationRule | SeparationRule | FDRRule | ConformalRule, Field(discriminator="kind")]
RULE: TypeAdapter[Rule] = TypeAdapter(Rule)


def standardised(s_N: np.ndarray) -> np.ndarray:
    """Scores minus their median, in units of 1.4826 x the median absolute deviation; zeros where that is 0."""
    centred_N = s_N - np.median(s_N)
    scale = 1.4826 * np.median(np.abs(centred_N))
    return centred_N / scale if scale > 0 else np.zeros_like(centred_N)


def benjamini_hochberg(p_N: np.ndarray, q: float) -> int:
    """Number of hypotheses rejected at false-discovery level q (Benjamini & Hochberg, 1995)."""
    n = len(p_N)
    below = np.sort(p_N) <= q * np.arange(1, n + 1) / n
    return int(below.nonzero()[0][-1]) + 1 if below.any() else 0


def n_at_least(ordered_M: np.ndarray, s_N: np.ndarray) -> np.ndarray:
    """For each number in s_N, the count of numbers in `ordered_M` (ascending) that are >= it, int64 (N,)."""
    return np.asarray(len(ordered_M) - np.searchsorted(ordered_M, s_N, side="left"))


def cauchy_combination(p_SN: np.ndarray) -> np.ndarray:
    """One p-value (N,) from S dependent ones: p = acot(T) / pi, T = mean over S of cot(pi p_s).

    cot(pi p_s) is a Cauchy variable, and so is T: exactly where the p-values are independent or equal, and in the tail
    also where they come from jointly normal statistics of any correlation (Liu & Xie, "Cauchy combination test", JASA
    2020, Theorem 1). p-values above 0.99 count as 0.99: at p = 1, T is minus infinity, and one scorer with p = 1 would
    overrule all others.

    It holds its level where scorers depend on each other; for ranking alone, Fisher's method is better
    (docs/methods.md).
    """
    T_N = (1 / np.tan(np.pi * p_SN.clip(max=0.99))).mean(0)
    return np.asarray(np.arctan2(1, T_N) / np.pi)


def keep_all_but(s_N: np.ndarray, n_removed: int) -> float:
    """Threshold with at most `n_removed` scores above it; scores tied with the next one are kept."""
    if n_removed <= 0:
        return math.inf
    if n_removed >= len(s_N):
        return -math.inf
    return float(np.partition(s_N, len(s_N) - n_removed - 1)[len(s_N) - n_removed - 1])
