"""What the evidence of one group amounts to: the thresholds, and the rule.

A group is in conflict where level >= `level` and at least `rise` above that of the rest of its class, conflict >=
`conflict` and outvoted >= `outvoted_unsure`; it has a stamp (`stamp.py`) where both shares reach theirs. Rarity: share
of natural groups that are as odd, p the probability that any natural group of the data is (`natural.py`). The first
line that holds decides:

    burst      most of the group are near-duplicates of each other: copies, tracks. Left alone.
    planted    by labels: in conflict, outvoted >= `outvoted`, p <= `false_alarm_rate` and held-out separation >=
               `apart_separation`, or p <= `near_rate` and held-out separation >= `separation`
               by labels and stamp: in conflict, rarity <= `likely`, a stamp; p <= `doubt_rate` where the group is
               `stamp_share` of its class or the data are full of bursts, for then natural groups have stamps as well;
               or less than `stamp_share` of its class, held-out separation >= `far_separation`, few bursts in the group
               by stamp: a stamp, held-out separation >= `apart_separation`, less than `stamp_share` of its class, few
               bursts in the group and in the data
               by labels and shape: in conflict, rarity <= `likely`, outvoted >= `outvoted`, held-out separation >=
               `far_separation`; or level at least `rise` above that of the rest, conflict >= `conflict`, outvoted >=
               `outvoted_unsure`, p <= `false_alarm_rate`, held-out separation >= `apart_separation`; few bursts in the
               data
               the same, grown from conflict: level >= `level`, outvoted >= `outvoted`, held-out separation >=
               `grown_separation`, few bursts in the data, p <= `false_alarm_rate`; or p <= `doubt_rate` and a stamp
    unsure     by labels, or by labels and shape, but only p <= `doubt_rate` and less than `stamp_share` of its class;
               conflict and p <= `false_alarm_rate`, but fewer neighbours against the label, or held-out separation only
               >= `near_separation`; by stamp, but held-out separation only >= `near_separation`, or half of the images
               at neither strength; planted, if only there were a stamp, which could not be measured; planted, but the
               model has not learned. Nothing is removed.
    natural    all others. Left alone.

The size of a group decides nothing where labels speak: poison may be most of its class. The sign of z says which side
of a split it is.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from sanitize.score.toxic_direction.evidence import Evidence

Decided = Literal["planted", "unsure", "burst", "natural"]
Basis = Literal["labels", "labels and stamp", "stamp", "labels and shape", "no stamp", "near-duplicates", ""]
FEWEST_STAMPED = 16  # samples of a group whose stamp is measured


class EvidenceConfig(BaseModel):
    """Settings of the decision; the defaults lie between natural groups and poison on the data in docs/verdict.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    appearance: str = Field(default="gradients", description="embedding made without labels, in which neighbours count")
    level: float = Field(default=0.5, ge=0, le=1, description="least mean label disagreement of a planted group")
    # On CIFAR-10 with human labels, poison reached .12 and .13; how much is odd depends on the data: see the rates.
    conflict: float = Field(
        default=0.1, ge=0, le=2, description="least difference in conflict to the rest of the class"
    )
    outvoted: float = Field(default=0.5, ge=0, le=1, description="least share of a planted group outvoted by one label")
    outvoted_unsure: float = Field(default=0.4, ge=0, le=1, description="the same for an inconclusive verdict")
    false_alarm_rate: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="share of clean data sets, nominally, in which labels alone may name a group planted",
    )
    # A natural group of Fashion-MNIST 5.4 standard deviations away had p .0089, one of Adap-Blend 6.06 away .0068.
    near_rate: float = Field(
        default=0.001, gt=0, lt=1, description="the same where a group is nearer than `apart_separation`"
    )
    doubt_rate: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of clean data sets, nominally, in which labels may make a verdict inconclusive",
    )
    # Poison 4.1 (human labels) to 19, parts of it 3.0; natural groups as odd as in .1 % of clean data 3.1 (CIFAR-10).
    separation: float = Field(default=4.0, ge=0, description="least held-out separation of a group planted by labels")
    # Poison .056 and .063 on CIFAR-10, where all images have neighbours with other labels; natural groups .037.
    rise: float = Field(
        default=0.04, ge=0, le=1, description="least difference in label disagreement to the rest of the class"
    )
    burst: float = Field(default=0.8, gt=0, le=1, description="share of near-duplicates from which a group is a burst")
    likely: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="share of natural groups as odd from which labels suffice beside a stamp",
    )
    # Natural groups reached .16 and .37 on Fashion-MNIST, .15 and .66 on CIFAR-10, .19 and .79 among traffic signs;
    # SIG .33 and .81, BadNets .74 and .83.
    stamp: float = Field(default=0.25, gt=0, le=1, description="least share of images that a stamp turns")
    stamp_doubled: float = Field(
        default=0.5, gt=0, le=1, description="least share at that strength or at twice the pattern"
    )
    # SIG 7.1 (CIFAR-10) and 9.5 (Fashion-MNIST), BadNets on photographs 9.2; clean modes with a stamp 2.0 and 3.5.
    apart_separation: float = Field(
        default=6.0, gt=0, description="held-out separation from which a group is planted by its stamp alone"
    )
    near_separation: float = Field(
        default=3.0, gt=0, description="the same from which a verdict is inconclusive, by a stamp or by labels"
    )
    # Clean Fashion-MNIST 7.7 (9.2 in a class beside a poisoned one), SIG 9.5, BadNets on photographs 9.2.
    far_separation: float = Field(default=9.0, gt=0, description="held-out separation that no style of clean data has")
    # Natural groups are pairs: a large one that is odd or has a stamp is the class itself, seen from its rare style.
    stamp_share: float = Field(
        default=0.5, gt=0, le=1, description="share of its class below which a stamp, or `doubt_rate`, says something"
    )
    stamp_burst: float = Field(
        default=0.2, ge=0, le=1, description="share of near-duplicates in a group below which a stamp alone decides"
    )
    # Share of samples with four near-duplicates or more: Fashion-MNIST .01, traffic signs filmed from a car .5 to .65.
    bursty: float = Field(
        default=0.1, ge=0, le=1, description="share of bursts in the data from which a stamp alone decides nothing"
    )
    # CIFAR-10 with Adap-Blend, seen in all layers, 5.6; clean classes 3.0 on CIFAR-10, 4.4 on Fashion-MNIST.
    grown_separation: float = Field(
        default=5.0, gt=0, description="least held-out separation of a planted group grown from conflict"
    )


class Measures(NamedTuple):
    """Facts about a group beside its labels.

    Attributes:
        size: samples that no earlier round has taken.
        share: size as a share of the class.
        separation: held-out separation from the rest of the class (`grow.held_out`); 0 where it was not needed.
        is_grown: True for a group grown from conflict, whose labels chose it.
        is_bursty: True where the data are full of bursts.
        stamp: shares of images of other classes that the stamp turns; None where it was not measured.
    """

    size: int = 0
    share: float = 0.0
    separation: float = 0.0
    is_grown: bool = False
    is_bursty: bool = False
    stamp: tuple[float, float] | None = None


NO_MEASURES = Measures()


def decision(
    evidence: Evidence, config: EvidenceConfig, has_learned: bool = True, measures: Measures = NO_MEASURES
) -> tuple[Decided, Basis]:
    """What the evidence of a group amounts to, and which evidence decided: the first row of the table that holds."""
    stamp, apart, p, is_grown = measures.stamp, measures.separation, evidence.p, measures.is_grown
    is_sparse, is_minor = not measures.is_bursty, measures.share < config.stamp_share
    has_faint_stamp = stamp is not None and stamp[0] >= config.stamp
    # Twice a saturated pattern is no stronger pattern: either strength may turn half of the images.
    has_stamp = has_faint_stamp and stamp is not None and max(stamp) >= config.stamp_doubled
    is_against = evidence.outvoted >= config.outvoted
    by_labels, odd = is_likely(evidence, config, measures), is_odd(evidence, config, measures)
    by_stamp = may_be_clean_label(evidence, config, measures)
    is_core = is_grown and is_sparse and apart >= config.grown_separation and evidence.level >= config.level
    is_core = is_core and is_against
    # Natural groups have no stamp where they are a small part of their class and the data are not full of bursts.
    # Tracks are far from the rest of their class and have stamps, but they are near-duplicates of each other.
    stamp_tells = (is_sparse and is_minor) or p <= config.doubt_rate
    is_varied = is_minor and evidence.burst < config.stamp_burst and apart >= config.far_separation
    is_doubtful = p <= (config.doubt_rate if is_minor else config.false_alarm_rate)
    is_surely_odd = p <= config.false_alarm_rate
    is_enough = is_surely_odd and (p <= config.near_rate or apart >= config.apart_separation)
    planted: Decided = "planted" if has_learned else "unsure"
    table: list[tuple[bool, Decided, Basis]] = [
        (evidence.burst >= config.burst, "burst", "near-duplicates"),
        (by_labels and is_enough and is_against and apart >= config.separation, planted, "labels"),
        (by_labels and has_stamp and (stamp_tells or is_varied), planted, "labels and stamp"),
        (by_stamp and has_stamp and apart >= config.apart_separation, planted, "stamp"),
        (by_labels and is_against and is_sparse and apart >= config.far_separation, planted, "labels and shape"),
        (
            odd and is_sparse and evidence.outvoted >= config.outvoted_unsure and apart >= config.apart_separation,
            planted,
            "labels and shape",
        ),
        (is_core and is_surely_odd, planted, "labels and shape"),
        (is_core and is_minor and has_stamp and p <= config.doubt_rate, planted, "labels and stamp"),
        (by_stamp and has_faint_stamp and apart >= config.near_separation, "unsure", "stamp"),
        (by_labels and is_doubtful and apart >= config.near_separation, "unsure", "labels"),
        (is_core and is_doubtful, "unsure", "labels"),
        (odd and apart >= config.near_separation, "unsure", "labels"),
        (stamp is None and needs_stamp(evidence, config, measures), "unsure", "no stamp"),
    ]
    return next(((decided, basis) for holds, decided, basis in table if holds), ("natural", ""))


def in_conflict(evidence: Evidence, config: EvidenceConfig) -> bool:
    """True where most neighbours speak against the labels of a group, beyond the doubt of the model."""
    is_against = evidence.level >= config.level and evidence.outvoted >= config.outvoted_unsure
    return is_against and leans(evidence, config)


def leans(evidence: Evidence, config: EvidenceConfig) -> bool:
    """True where labels speak more against a group than against the rest of its class, beyond the model's doubt."""
    return evidence.level - evidence.level_rest >= config.rise and evidence.conflict >= config.conflict


def may_be_clean_label(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where a stamp alone can decide."""
    is_loose = not measures.is_bursty and evidence.burst < config.stamp_burst
    return is_loose and measures.share < config.stamp_share


def is_likely(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where labels speak against a group, but do not suffice. They cannot judge a group that they chose."""
    return in_conflict(evidence, config) and not measures.is_grown and evidence.rarity <= config.likely


def stands_out(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where a group is in conflict and far from the rest of its class, however odd that is in these data."""
    is_against = in_conflict(evidence, config) and evidence.outvoted >= config.outvoted
    return is_against and measures.separation >= config.apart_separation


def is_odd(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where the labels of a group are odd among natural groups, though most of its neighbours carry its label.

    Where classes are few or look alike, poison has many neighbours that carry its label by chance.
    """
    return leans(evidence, config) and not measures.is_grown and evidence.p <= config.false_alarm_rate


def wants_stamp(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where a stamp can change the decision on a group that is not planted without one."""
    if evidence.burst >= config.burst or measures.size < FEWEST_STAMPED:
        return False
    by_stamp = may_be_clean_label(evidence, config, measures) and measures.separation >= config.near_separation
    return is_likely(evidence, config, measures) or by_stamp


def needs_stamp(evidence: Evidence, config: EvidenceConfig, measures: Measures) -> bool:
    """True where a group is too odd to be called natural without a stamp.

    All clean data have groups that want a stamp. Only those far from the rest of their class make a verdict
    inconclusive; without hints from labels, those farther than the styles of clean data.
    """
    if not wants_stamp(evidence, config, measures):
        return False
    likely = is_likely(evidence, config, measures)
    return measures.separation >= (config.apart_separation if likely else config.far_separation)
