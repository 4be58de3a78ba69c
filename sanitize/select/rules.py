"""Rules: from the scores of each class to the threshold above which samples are flagged. Every rule may find nothing.

To add a rule: a subclass of `BaseRule` with its `kind`, and its name in the union `Rule`.

Shapes: N scores of one class, K classes, M scores of trusted samples, S scorers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sanitize.errors import ConfigError

Scores = Mapping[int, np.ndarray]  # label -> float32 (N,)
Statistics = Mapping[int, Mapping[str, float]]
NO_SCORES = np.zeros(0, np.float32)


class BaseRule(BaseModel, ABC):
    """Protocol of all rules; a rule is its own config.

    Attributes:
        kind: name of the rule.
        gives_p_values: True where `p_values` is defined, as verdict `combined` needs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    gives_p_values: ClassVar[bool] = False

    kind: str

    @abstractmethod
    def thresholds(self, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES) -> dict[int, float]:
        """One threshold a class; samples with a score *above* it (>) are flagged. Infinity flags none.

        Args:
            scores: label -> scores of the samples to judge.
            statistics: label -> what the scorer measured of the class.
            trusted_M: scores of the trusted samples, float32.

        Raises:
            ConfigError: the rule cannot be used with this scorer or with so few trusted samples.
        """

    def levels(self, scores: Scores, statistics: Statistics) -> dict[int, float]:
        """Label -> separation above which the class is touched; empty for rules without such a level."""
        return {}

    def uncapped(self, statistics: Statistics) -> set[int]:
        """Labels of the classes in which `max_removed_fraction` does not bind."""
        return set()

    def p_values(self, scores: Scores, trusted_M: np.ndarray = NO_SCORES) -> dict[int, np.ndarray]:
        """Label -> p-values (N,) in (0, 1], float64; empty for rules without p-values."""
        return {}


class ContaminationRule(BaseRule):
    """Remove 1.5 x `rate` of every class, the highest scores first (Tran, Li & Madry, 2018, Algorithm 1).

    Attributes:
        rate: expected share of poison *within a class*, in (0, 0.5].
        factor: safety margin, a factor on the rate; 1.5 in the paper.
    """

    kind: Literal["contamination"] = "contamination"
    rate: float = Field(gt=0, le=0.5)
    factor: float = Field(default=1.5, gt=0)

    def thresholds(self, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES) -> dict[int, float]:
        """The score below the top `factor * rate` of each class."""
        return {y: keep_all_but(s_N, round(self.factor * self.rate * len(s_N))) for y, s_N in scores.items()}


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

    kind: Literal["separation"] = "separation"
    floor: float = Field(default=4.5, ge=0)
    small_class_floor: float = Field(default=7.6, ge=0)
    small_class: int = Field(default=500, ge=0)
    log_odds: float = 0.0

    def thresholds(self, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES) -> dict[int, float]:
        """`log_odds` for the touched classes, infinity for the others.

        Raises:
            ConfigError: the scorer measures no separation.
        """
        if statistics and not any("separation" in of_class for of_class in statistics.values()):
            raise ConfigError(
                "rule 'separation' needs scorer 'toxic_direction'; use 'fdr', 'conformal' or 'contamination'"
            )
        levels = self.levels(scores, statistics)
        above = {y for y, of_class in statistics.items() if of_class.get("separation", 0.0) > levels.get(y, math.inf)}
        touched = above | self.uncapped(statistics)
        return {y: self.log_odds if y in touched else math.inf for y in scores}

    def levels(self, scores: Scores, statistics: Statistics) -> dict[int, float]:
        """Label -> separation above which the class is touched; empty where evidence has decided."""
        if any("planted" in of_class for of_class in statistics.values()):
            return {}
        separations_K = np.array([of_class.get("separation", 0.0) for of_class in statistics.values()] or [0.0])
        centre = float(np.median(separations_K))
        natural = centre + 3 * 1.4826 * float(np.median(np.abs(separations_K - centre)))
        floors = {
            y: self.floor if len(s_N) >= self.small_class else self.small_class_floor for y, s_N in scores.items()
        }
        return {y: min(max(natural, floor), 1.1 * floor) for y, floor in floors.items()}

    def uncapped(self, statistics: Statistics) -> set[int]:
        """Labels of the classes in which the evidence names a planted group."""
        return {y for y, of_class in statistics.items() if of_class.get("planted", 0.0) > 0}


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
    """

    kind: Literal["fdr"] = "fdr"

    def thresholds(self, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES) -> dict[int, float]:
        """The highest score of each class that is not rejected."""
        p_values = self.p_values(scores)
        return {y: keep_all_but(s_N, benjamini_hochberg(p_values[y], self.q)) for y, s_N in scores.items()}

    def p_values(self, scores: Scores, trusted_M: np.ndarray = NO_SCORES) -> dict[int, np.ndarray]:
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

    kind: Literal["conformal"] = "conformal"

    def thresholds(self, scores: Scores, statistics: Statistics, trusted_M: np.ndarray = NO_SCORES) -> dict[int, float]:
        """One threshold for all classes: the highest score that is not rejected."""
        p_N = np.concatenate([*self.p_values(scores, trusted_M).values(), np.ones(0)])
        s_N = np.concatenate([*scores.values(), NO_SCORES])
        return dict.fromkeys(scores, keep_all_but(s_N, benjamini_hochberg(p_N, self.q)))

    def p_values(self, scores: Scores, trusted_M: np.ndarray = NO_SCORES) -> dict[int, np.ndarray]:
        """Label -> conformal p-values (N,) in (0, 1].

        Raises:
            ConfigError: too few trusted samples for any p-value to reach q.
        """
        n_needed = math.ceil(1 / self.q) - 1
        if len(trusted_M) < n_needed:
            raise ConfigError(
                f"rule 'conformal' at q = {self.q} needs at least {n_needed} trusted samples, not {len(trusted_M)}: no "
                "p-value is below 1 / (trusted samples + 1). Name more shards under `trusted:`; to find a few outliers "
                "among N samples, about N trusted samples are needed"
            )
        ordered_M = np.sort(trusted_M)
        return {y: (1 + n_at_least(ordered_M, s_N)) / (1 + len(ordered_M)) for y, s_N in scores.items()}


Rule = Annotated[ContaminationRule | SeparationRule | FDRRule | ConformalRule, Field(discriminator="kind")]


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
