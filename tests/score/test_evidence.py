"""Planted or natural: each way in which a group of a class can be mistaken, on small data made for it.

An image is its origin: `gradients` cluster by the true class, `pooled` by the given label and the trigger, and logits
are sure of the given label, as a model makes them that has learned its data.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

import sanitize
from sanitize.arrays import PoisonFound
from sanitize.near_duplicates import near_duplicates
from sanitize.score.toxic_direction import EvidenceConfig, ToxicDirectionConfig
from sanitize.score.toxic_direction.candidates import Candidate
from sanitize.score.toxic_direction.complete import complete
from sanitize.score.toxic_direction.decide import weighed_again
from sanitize.score.toxic_direction.evidence import (
    AXES,
    Evidence,
    appearance_of,
    disagreement,
    expected_disagreement,
    falling,
    fisher_directions,
    neighbour_labels,
    outvoted,
    without,
)
from sanitize.score.toxic_direction.grow import FOLDS, grow, log_odds
from sanitize.score.toxic_direction.mixed import most_mixed
from sanitize.score.toxic_direction.natural import UNKNOWN_SPREAD, compared, natural_groups, spread_of
from sanitize.score.toxic_direction.rule import Measures, decision
from sanitize.score.toxic_direction.scorer import fair_share
from sanitize.score.toxic_direction.twins import Twins, most_contradicted
from sanitize.score.toxic_direction.verdict import finding
from sanitize.score.toxic_direction.weigh import compare, decided_among, know, weigh_class, weighed_group

N_CLASSES, D = 5, 16
STYLES, LOOKS = 6, 48  # styles of a class, and columns of what images look like
QUICK, CONFIG = ToxicDirectionConfig(n_starts=32), EvidenceConfig()
SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Data(NamedTuple):
    """Embeddings, given labels and poison."""

    pooled: Tensor
    gradients: Tensor
    logits: Tensor
    labels: Tensor
    poison: Tensor

    def find(self, **more: Any) -> PoisonFound:
        """The result with few starts."""
        names = ("pooled", "gradients", "logits")
        given = {name: getattr(self, name) for name in names}
        return sanitize.find_poison(given, self.labels, **{"scorer": QUICK, **more})


def data(n: int = 900, seed: int = 0, kinship: float = 0.7) -> Data:
    """Clean samples of five classes; without kinship, the styles of a class have nothing in common."""
    generator = seeded(seed)
    true_N = torch.arange(n) % N_CLASSES
    centres_KSD = torch.randn(N_CLASSES, STYLES, LOOKS, generator=generator)
    centres_KSD = centres_KSD + kinship * torch.randn(N_CLASSES, 1, LOOKS, generator=generator)
    style_N = torch.randint(STYLES, (n,), generator=generator)
    gradients_ND = centres_KSD[true_N, style_N] + torch.randn(n, LOOKS, generator=generator)
    pooled_ND = 3 * torch.eye(N_CLASSES, D)[true_N] + torch.randn(n, D, generator=generator)
    logits_NK = 8 * torch.eye(N_CLASSES)[true_N] + torch.randn(n, N_CLASSES, generator=generator)
    return Data(pooled_ND, gradients_ND, logits_NK, true_N, torch.zeros(n, dtype=torch.bool))


def with_trigger(clean: Data, rows: Tensor, target: int, axis: int, look: float = 0.0) -> Data:
    """These rows get the label `target`: the model has learned a trigger, which adds `look` to what they look like."""
    pooled, gradients, labels, poison = (t.clone() for t in (clean.pooled, clean.gradients, clean.labels, clean.poison))
    generator = seeded(axis)
    pooled[rows] = 3 * torch.eye(N_CLASSES, D)[target] + torch.randn(len(rows), D, generator=generator)
    pooled[rows, axis] = 12 + 0.3 * torch.randn(len(rows), generator=generator)
    gradients[rows, axis] += look
    labels[rows], poison[rows] = target, True
    logits = 8 * torch.eye(N_CLASSES)[labels] + torch.randn(len(labels), N_CLASSES, generator=generator)
    return Data(pooled, gradients, logits, labels, poison)


def others(clean: Data, target: int) -> Tensor:
    """Rows of all other classes."""
    return (clean.labels != target).nonzero()[:, 0]


def test_planted_samples_are_found_and_the_evidence_says_why() -> None:
    clean = data()
    poisoned = with_trigger(clean, others(clean, 0)[:40], 0, 7, look=4.0)
    found = poisoned.find()
    assert found.mask.tolist() == poisoned.poison.tolist()
    assert found.finding["verdict"] == "found"
    (group,) = [group for group in found.finding["groups"] if group["decision"] == "planted"]
    assert (group["label"], group["size"]) == (0, 40)
    assert group["level"] > 0.8 > group["level_rest"] + 0.2
    assert group["p"] <= QUICK.evidence.false_alarm_rate  # type: ignore[union-attr]
    assert "nearest neighbours carry another label" in group["reason"]
    assert found.evidence[0]["decision"] == "planted"
    assert {found.evidence[label]["decision"] for label in range(1, N_CLASSES)} <= {"natural", "burst"}


def test_clean_data_are_left_alone() -> None:
    found = data().find()
    assert not found.mask.any()
    assert found.finding["verdict"] == "nothing"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_styles_that_have_nothing_in_common_are_not_removed(seed: int) -> None:
    """Erasing what tells such a style apart leaves its images without neighbours of their own class."""
    found = data(seed=seed, kinship=0.0).find()
    assert not found.mask.any()
    assert found.finding["verdict"] in ("nothing", "inconclusive")


def test_poison_may_be_most_of_its_class_and_the_cap_does_not_bind() -> None:
    clean = data(1200)
    kept_N = (clean.labels != 0) | (torch.arange(1200) < 300)  # 60 of class 0, 960 of the others
    clean = Data(*(t[kept_N] for t in clean))
    poisoned = with_trigger(clean, others(clean, 0)[:140], 0, 7)
    found = poisoned.find()
    assert poisoned.poison[poisoned.labels == 0].double().mean() == 0.7
    assert (found.mask == poisoned.poison.numpy()).mean() > 0.99
    assert not found.evidence[0]["capped"]


@pytest.mark.parametrize(
    ("sizes", "verdict"), [((180, 180, 180, 20, 20), "nothing"), ((60, 30, 30, 30, 30), "inconclusive")]
)
def test_small_classes_are_named_and_most_samples_must_be_in_others(sizes: tuple[int, ...], verdict: str) -> None:
    clean = data()
    rows = torch.cat([(clean.labels == label).nonzero()[:size, 0] for label, size in enumerate(sizes)])
    found = Data(*(t[rows] for t in clean)).find()
    assert found.finding["verdict"] == verdict
    assert not found.mask.any()
    small = [label for label, size in enumerate(sizes) if size < QUICK.min_class]
    assert f"{len(small)} classes ({', '.join(map(str, small))})" in found.finding["why"]


def test_two_triggers_in_one_class_are_found_in_one_run() -> None:
    clean = data(1500)
    rows = others(clean, 0)
    poisoned = with_trigger(with_trigger(clean, rows[:60], 0, 7), rows[60:120], 0, 11)
    found = poisoned.find()
    assert (found.mask == poisoned.poison.numpy()).mean() > 0.995
    assert found.mask[poisoned.poison.numpy()].mean() > 0.95


def test_poison_in_every_class_is_found_although_natural_groups_are_few() -> None:
    """All-to-all: the groups that stand out in each class do not count among the natural groups of the others."""
    clean = poisoned = data(1500)
    for label in range(N_CLASSES):
        rows = (clean.labels == (label - 1) % N_CLASSES).nonzero()[:40, 0]
        poisoned = with_trigger(poisoned, rows, label, 7, look=4.0)
    found = poisoned.find()
    assert found.mask[poisoned.poison.numpy()].mean() > 0.9
    assert found.mask[~poisoned.poison.numpy()].mean() < 0.01


def test_poison_that_only_an_early_layer_shows_is_found_there() -> None:
    """Later layers mix the trigger with what the image shows; the labels alone cannot say which samples have it."""
    clean = data(2400)
    rows = others(clean, 0)[:60]
    poisoned = with_trigger(clean, rows, 0, 7)
    pooled = torch.where(poisoned.poison[:, None], 3 * torch.eye(N_CLASSES, D)[0], poisoned.pooled)
    pooled[rows] += torch.randn(len(rows), D, generator=seeded(3))
    early = torch.randn(2400, 8, generator=seeded(4))
    early[rows, 5] += 6
    hidden = poisoned._replace(pooled=pooled)
    given = {"pooled": pooled, "gradients": hidden.gradients, "logits": hidden.logits}
    assert not sanitize.find_poison(given, hidden.labels, scorer=QUICK).mask.any()
    found = sanitize.find_poison({**given, "early": early}, hidden.labels, scorer=QUICK)
    assert found.finding["verdict"] == "found"
    assert found.mask[poisoned.poison.numpy()].mean() > 0.95
    assert found.mask[~poisoned.poison.numpy()].mean() < 0.002
    untouched = {"pooled": clean.pooled, "gradients": clean.gradients, "logits": clean.logits, "early": early}
    assert not sanitize.find_poison(untouched, clean.labels, scorer=QUICK).mask.any()  # a group alone is no evidence


def test_a_group_of_poison_from_one_class_is_completed_by_that_from_others() -> None:
    """Half of the class is poison from four classes, each far from the others in the embedding of the model."""
    clean = data(2000)
    rows = others(clean, 0)[:400]
    poisoned = with_trigger(clean, rows, 0, 7)
    poisoned.pooled[:, 7] = torch.randn(2000, generator=seeded(5))
    poisoned.pooled[rows, 7] += 6
    poisoned.pooled[rows, 8 + clean.labels[rows]] += 5
    of_class = (poisoned.labels == 0).nonzero()[:, 0]
    assert len(of_class) == 800
    poison_n, part_n = poisoned.poison[of_class], poisoned.poison[of_class] & (clean.labels[of_class] == 1)
    fold_n = torch.randint(FOLDS, (800,), generator=seeded(6))
    appearance = appearance_of(poisoned.gradients, poisoned.labels)
    alone = grow({"pooled": poisoned.pooled[of_class]}, part_n, fold_n, QUICK)
    alone_n = log_odds(alone, poisoned.pooled[of_class], fold_n) > 0
    assert (alone_n & poison_n).sum() < 0.5 * poison_n.sum()
    whole = complete(poisoned.pooled, appearance, of_class, part_n, fold_n, QUICK)
    assert whole is not None
    assert (whole.members_n & poison_n).sum() > 0.95 * poison_n.sum()
    assert (whole.members_n & ~poison_n).sum() < 0.02 * (~poison_n).sum()
    found = poisoned.find()
    assert found.mask[poisoned.poison.numpy()].mean() > 0.95
    assert found.mask[~poisoned.poison.numpy()].mean() < 0.005


def test_what_is_left_of_a_group_whose_poison_an_earlier_round_took_has_no_stamp_and_no_distance() -> None:
    clean = data()
    poisoned = with_trigger(clean, others(clean, 0)[:40], target=0, axis=12)
    digests_N = torch.arange(len(poisoned.labels))
    known = know({"pooled": poisoned.pooled}, poisoned.gradients, poisoned.logits, poisoned.labels, digests_N)
    weighed = [
        weigh_class(known, label, (poisoned.labels == label).nonzero()[:, 0], CONFIG, QUICK, seeded(label))
        for label in range(N_CLASSES)
    ]
    of_class = compare(weighed, known, CONFIG)[0]
    is_poison_n = poisoned.poison[of_class.rows]
    members_n = is_poison_n.clone()
    members_n[(~is_poison_n).nonzero()[:20, 0]] = True
    group = weighed_group(
        known,
        0,
        of_class.rows,
        Candidate("pooled", members_n, 20.0),
        torch.ones_like(members_n),
        Measures(separation=20.0, stamp=(0.9, 0.9)),
    )
    assert decided_among(group, of_class.natural, CONFIG, known).decision == "planted"
    left = weighed_again(of_class, group, known, ~is_poison_n, CONFIG)
    assert left.measures.size == 20
    assert left.decision == "natural"


def test_a_natural_group_is_not_completed_by_samples_of_other_styles() -> None:
    """What a style has and images of other classes lack, no other style of its class has."""
    clean = data(2000)
    of_class = (clean.labels == 0).nonzero()[:, 0]
    style_n, fold_n = torch.arange(400) < 60, torch.randint(FOLDS, (400,), generator=seeded(6))
    clean.pooled[of_class[style_n], 7] += 8
    whole = complete(clean.pooled, appearance_of(clean.gradients, clean.labels), of_class, style_n, fold_n, QUICK)
    assert whole is None or int((whole.members_n & ~style_n).sum()) <= 2


def test_copies_of_one_picture_are_a_burst_and_stay() -> None:
    clean = data()
    copies = (clean.labels == 2).nonzero()[:40, 0]
    for x_ND in (clean.pooled, clean.gradients, clean.logits):
        x_ND[copies] = x_ND[copies[0]] + 0.001 * torch.randn(40, x_ND.shape[1], generator=seeded(1))
    clean.pooled[copies, 9] += 12
    found = clean.find()
    assert not found.mask.any()
    assert found.finding["verdict"] == "nothing"
    bursts = [group for group in found.finding["groups"] if group["decision"] == "burst"]
    assert [group["label"] for group in bursts] == [2]
    assert bursts[0]["size"] == pytest.approx(40, abs=2)
    assert "near-duplicates" in bursts[0]["reason"]
    assert found.evidence[2]["decision"] == "burst"


def test_a_natural_group_that_the_model_finds_hard_as_well_stays() -> None:
    """A style of class 1 that looks like class 2: neighbours disagree, but the model doubts these labels too."""
    clean = data()
    rows = (clean.labels == 1).nonzero()[:40, 0]
    alike = (clean.labels == 2).nonzero()[:40, 0]
    clean.gradients[rows] = clean.gradients[alike] + 0.7 * torch.randn(40, LOOKS, generator=seeded(2))
    clean.pooled[rows, 9] += 12
    doubted = torch.cat([(clean.labels == y).nonzero()[40:60, 0] for y in range(N_CLASSES)])  # hard in the same way
    clean.gradients[doubted] = clean.gradients[doubted + 1] + 0.7 * torch.randn(100, LOOKS, generator=seeded(3))
    doubted = torch.cat([rows, doubted])
    clean.logits[doubted] = torch.randn(len(doubted), N_CLASSES, generator=seeded(3))
    clean.logits[rows[:, None], torch.tensor([[0, 3, 4]])] -= 8  # class 1 or 2, but which
    found = clean.find()
    assert not found.mask.any()
    assert found.finding["verdict"] == "nothing"
    sure = clean._replace(logits=8 * torch.eye(N_CLASSES)[clean.labels])
    assert sure.find().finding["verdict"] != "nothing"  # the same groups, were the model sure of them


def test_a_model_that_has_not_learned_gives_no_all_clear_and_nothing_is_removed() -> None:
    clean = data()
    poisoned = with_trigger(clean, others(clean, 0)[:40], 0, 7, look=4.0)
    logits = torch.randn(poisoned.logits.shape, generator=seeded(4))
    for one in (clean, poisoned):
        found = one._replace(logits=logits).find()
        assert not found.mask.any()
        assert found.finding["verdict"] == "inconclusive"
        assert "has not learned" in found.finding["why"]


def test_the_rate_of_false_alarms_is_a_setting() -> None:
    clean = data()
    poisoned = with_trigger(clean, others(clean, 0)[:40], 0, 7)
    strict = ToxicDirectionConfig(n_starts=32, evidence=EvidenceConfig(false_alarm_rate=1e-300))
    found = poisoned.find(scorer=strict)
    assert not found.mask.any()
    assert found.finding["verdict"] == "inconclusive"
    assert "may be planted" in found.finding["why"]


def test_other_names_of_the_classes_give_the_same_result() -> None:
    clean = data()
    poisoned = with_trigger(clean, others(clean, 0)[:40], 0, 7)
    renamed_K = torch.tensor([3, 0, 4, 1, 2])
    other = poisoned._replace(labels=renamed_K[poisoned.labels], logits=poisoned.logits[:, renamed_K.argsort()])
    one, two = poisoned.find(), other.find()
    assert two.mask.tolist() == one.mask.tolist()
    for label, measures in one.evidence.items():
        renamed = two.evidence[int(renamed_K[label])]
        assert renamed["decision"] == measures["decision"]
        assert renamed["z"] == pytest.approx(measures["z"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(SEEDS)
def test_the_order_of_the_rows_changes_nothing(seed: int) -> None:
    clean = data(600)
    poisoned = with_trigger(clean, others(clean, 0)[:40], 0, 7)
    order = torch.randperm(600, generator=seeded(seed))
    shuffled = Data(*(t[order] for t in poisoned)).find()
    found = poisoned.find()
    assert np.array_equal(shuffled.scores, found.scores[order.numpy()])
    assert shuffled.finding == found.finding


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(st.floats(-50, 50), st.sampled_from([0.25, 8.0]))
def test_a_constant_and_a_scale_of_an_embedding_change_no_verdict(shift: float, scale: float) -> None:
    clean = data(600)
    poisoned = with_trigger(clean, others(clean, 0)[:40], 0, 7)
    moved = poisoned._replace(pooled=scale * poisoned.pooled + shift, gradients=scale * poisoned.gradients - shift)
    assert moved.find().mask.tolist() == poisoned.find().mask.tolist() == poisoned.poison.tolist()


# --- parts ------------------------------------------------------------------------------------------------------


def test_near_duplicates_with_two_labels_are_counted_and_other_neighbours_are_not() -> None:
    x_ND = torch.randn(400, 20, generator=seeded(0))
    tracks = x_ND[:40].repeat(10, 1) + 0.01 * torch.randn(400, 20, generator=seeded(1))  # 40 objects, 10 frames each
    labels_N = torch.arange(400) % 40 % 4
    assert most_contradicted(tracks, labels_N).n == 0
    assert most_contradicted(x_ND, torch.arange(400) % 4).n <= 2  # close by chance
    relabelled = torch.arange(400) % 40 == 5  # an object of class 1
    labels_N[relabelled & (torch.arange(400) < 280)] = 3  # 7 of its 10 frames: the wrong label is the majority
    assert most_contradicted(tracks, labels_N) == Twins(1, 3, 3)
    labels_N[torch.arange(400) % 40 == 9] = torch.tensor([3] * 6 + [1] * 4)
    assert most_contradicted(tracks, labels_N) == Twins(1, 3, 7)


def test_tracks_with_two_labels_give_no_all_clear() -> None:
    """Each image is filmed six times; some frames of class 1 are labelled 0, and nothing else is odd about them."""
    clean = data(1500)
    first = torch.arange(1500) // 6 * 6
    tracked = clean._replace(labels=clean.labels[first], logits=8 * torch.eye(N_CLASSES)[clean.labels[first]])
    tracked.gradients[:] = clean.gradients[first] + 0.02 * torch.randn(1500, LOOKS, generator=seeded(1))
    tracked.pooled[:] = 3 * torch.eye(N_CLASSES, D)[tracked.labels] + torch.randn(1500, D, generator=seeded(2))
    assert tracked.find().finding["verdict"] == "nothing"
    frames = (tracked.labels == 1).nonzero()[:, 0]
    frames = frames[frames % 6 < 4][:24]  # four of six frames of six images
    tracked.labels[frames] = 0
    tracked.logits[frames] = 8 * torch.eye(N_CLASSES)[0]
    found = tracked.find()
    assert found.finding["verdict"] in ("found", "inconclusive")
    assert found.finding["verdict"] == "found" or "near-duplicates of images labelled" in found.finding["why"]


def test_near_duplicates_are_grouped_and_others_are_alone() -> None:
    x_ND = torch.randn(300, 20, generator=seeded(0))
    x_ND[:30] = x_ND[0] + 0.01 * torch.randn(30, 20, generator=seeded(1))
    x_ND[30:35] = x_ND[30].clone()
    groups_N = near_duplicates(x_ND)
    assert len(groups_N[:30].unique()) == len(groups_N[30:35].unique()) == 1
    assert 260 <= len(groups_N.unique()) <= 300 - 29 - 4  # a few of the others may be close by chance
    for n in range(4):
        assert len(near_duplicates(x_ND[100 : 100 + n])) == n


@pytest.mark.parametrize("n_copies", [20, 60, 200])
def test_many_copies_are_near_duplicates_as_few_are(n_copies: int) -> None:
    """Around a picture with more than 50 copies, the 50th neighbour is a copy as well."""
    x_ND = torch.randn(600, 20, generator=seeded(0))
    x_ND[:n_copies] = x_ND[0] + 0.05 * torch.randn(n_copies, 20, generator=seeded(1))
    groups_N = near_duplicates(x_ND)
    assert len(groups_N[:n_copies].unique()) == 1
    assert len(groups_N[n_copies:].unique()) > 0.9 * (600 - n_copies)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_near_duplicates_do_not_depend_on_the_order(seed: int) -> None:
    x_ND = torch.randn(120, 8, generator=seeded(seed))
    x_ND[:60:2] = x_ND[1:61:2] + 0.02
    order = torch.randperm(120, generator=seeded(seed + 1))
    one_N, two_N = near_duplicates(x_ND)[order], near_duplicates(x_ND[order])
    assert torch.equal(one_N[:, None] == one_N, two_N[:, None] == two_N)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.1, 3)), min_size=1, max_size=15))
def test_falling_is_isotonic_regression(pairs: list[tuple[float, float]]) -> None:
    y, weight = (np.array(values) for values in zip(*pairs, strict=True))
    wanted = IsotonicRegression(increasing=False).fit_transform(np.arange(len(y)), y, sample_weight=weight)
    np.testing.assert_allclose(falling(y, weight), wanted, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 300))
def test_expected_disagreement_falls_and_keeps_the_mean(seed: int, n: int) -> None:
    d_N = torch.rand(n, generator=seeded(seed))
    log_p_N = -torch.rand(n, generator=seeded(seed + 1)).double()
    expected_N = expected_disagreement(d_N, log_p_N)
    assert (expected_N[log_p_N.argsort()].diff() <= 1e-6).all()
    assert float(expected_N.min()) >= float(d_N.min()) - 1e-6
    assert expected_disagreement(d_N, torch.zeros(n).double()) == pytest.approx(float(d_N.mean()), abs=0.2)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_erased_directions_are_orthonormal_and_take_the_difference_away(seed: int) -> None:
    one, other = torch.randn(2, 200, 12, generator=seeded(seed))
    one[:, 3] += 5
    erased_PR = fisher_directions(one, other)
    torch.testing.assert_close(erased_PR.T @ erased_PR, torch.eye(erased_PR.shape[1]), atol=1e-4, rtol=0)
    assert without(one, erased_PR)[:, 3].mean().abs() < 0.2


def test_neighbours_are_no_near_duplicates() -> None:
    """The vote of 25 copies of a sample does not count, whatever their label."""
    x_ND = torch.randn(400, 6, generator=seeded(0))
    x_ND[:25] = x_ND[0] + 0.001 * torch.randn(25, 6, generator=seeded(1))
    labels_N = torch.where(torch.arange(400) < 25, 0, 1)
    appearance = appearance_of(x_ND, labels_N)
    assert appearance.z_NP.shape[1] == min(AXES, 6)
    nearest = neighbour_labels(appearance, torch.arange(25))
    assert disagreement(nearest, labels_N[:25]).min() == outvoted(nearest, labels_N[:25]) == 1


PLANTED = Evidence(
    level=0.9, level_rest=0.1, outvoted=0.8, conflict=0.5, error=0.05, burst=0.0, z=5.0, rarity=1e-5, p=1e-3
)


def test_the_size_of_a_group_decides_nothing_and_the_rule_is_monotone() -> None:
    config, apart = EvidenceConfig(), Measures(separation=5.0)

    def decided(evidence: Evidence, has_learned: bool = True) -> str:
        return decision(evidence, config, has_learned, apart)[0]

    assert decided(PLANTED) == "planted"
    assert decided(PLANTED, has_learned=False) == "unsure"
    assert decided(PLANTED._replace(p=0.05)) == "unsure"
    assert decided(PLANTED._replace(p=0.2)) == "natural"
    assert decided(PLANTED._replace(z=-5.0, conflict=-0.5, rarity=1.0, p=1.0)) == "natural"
    assert decided(PLANTED._replace(level=0.4)) == "unsure"
    assert decided(PLANTED._replace(level=0.4, p=0.05)) == "natural"
    assert decided(PLANTED._replace(level_rest=0.95)) == "natural"
    assert decided(PLANTED._replace(outvoted=0.45)) == "unsure"
    assert decided(PLANTED._replace(outvoted=0.3)) == "unsure"
    assert decided(PLANTED._replace(outvoted=0.3, p=0.05)) == "natural"
    assert decided(PLANTED._replace(burst=0.9)) == "burst"


def test_a_stamp_beside_labels_counts_less_where_natural_groups_have_one() -> None:
    """Most of a class has the look of the class as its stamp, and the frames of one object the object."""
    config, weak = EvidenceConfig(), PLANTED._replace(rarity=0.005, p=0.5)
    stamped = Measures(size=50, share=0.2, stamp=(0.4, 0.6))
    assert decision(weak, config, True, stamped) == ("planted", "labels and stamp")
    for natural in (stamped._replace(share=0.8), stamped._replace(is_bursty=True)):
        assert decision(weak, config, True, natural)[0] != "planted"
        assert decision(weak._replace(p=0.05), config, True, natural) == ("planted", "labels and stamp")


def test_a_faint_sign_with_a_stamp_is_no_all_clear() -> None:
    faint = PLANTED._replace(conflict=0.05, z=1.0, rarity=0.2, p=1.0)
    measures = Measures(size=50, share=0.2, separation=3.4, stamp=(0.56, 0.95))
    assert decision(faint, EvidenceConfig(), True, measures) == ("unsure", "stamp")


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.0, 0.3))
def test_the_spread_of_natural_groups_is_measured_whatever_a_quarter_of_them_holds(seed: int, spread: float) -> None:
    error_G = 0.02 + 0.05 * torch.rand(400, generator=seeded(seed))
    conflict_G = (error_G.square() + spread**2).sqrt() * torch.randn(400, generator=seeded(seed + 1))
    assert spread_of(conflict_G, error_G) == pytest.approx(spread, abs=0.03 + 0.15 * spread)
    conflict_G[:100] = 0.7
    assert spread_of(conflict_G, error_G) < 0.05 + 1.7 * spread


@settings(max_examples=5, deadline=None)
@given(SEEDS)
def test_clean_data_have_few_false_alarms_whatever_their_spread(seed: int) -> None:
    """200 data sets of natural groups in five classes: at most the rate that is set names one planted."""
    alarms, n_sets, generator = 0, 200, seeded(seed)
    for number in range(n_sets):
        spread = 0.05 * (number % 5)
        made = {label: [natural_group(spread, generator) for _ in range(15)] for label in range(5)}
        natural = natural_groups(made, 75)
        least = min(compared(one, natural[label]).p for label, groups in made.items() for one in groups)
        alarms += least <= 0.05
    assert alarms / n_sets <= 0.05 + 3 * (0.05 / n_sets) ** 0.5


def natural_group(spread: float, generator: torch.Generator) -> Evidence:
    """Evidence of a group whose conflict is natural."""
    error = 0.02 + 0.08 * float(torch.rand(1, generator=generator))
    conflict = math.hypot(error, spread) * float(torch.randn(1, generator=generator))
    return Evidence(0.6, 0.3, 0.6, conflict, error, 0.0, conflict / error)


def test_planted_groups_stand_out_of_natural_ones_and_few_independent_images_do_not() -> None:
    generator = seeded(0)
    made = {label: [natural_group(0.1, generator) for _ in range(15)] for label in range(5)}
    natural = natural_groups(made, 75)[0]
    planted = Evidence(0.9, 0.2, 0.9, 0.7, 0.05, 0.0, 14.0)
    assert compared(planted, natural).p < 0.001
    assert compared(planted._replace(error=0.2, freedom=2.0), natural).p > 0.1
    alone = natural_groups({0: [planted], 1: []}, 1)
    assert alone[0].spread == UNKNOWN_SPREAD


def test_outvoted_counts_one_other_label_not_all_of_them() -> None:
    own, rival, mixed = [7] * 10 + [3] * 9, [7] * 9 + [3] * 10, [7] * 5 + [0, 1, 2, 3] * 3 + [4, 5]
    nearest = torch.tensor([own, rival, mixed])
    assert outvoted(nearest, torch.full((3,), 7)) == pytest.approx(1 / 3)


def test_a_grown_group_scores_rows_it_has_not_seen_and_other_axes_do_not_matter() -> None:
    x_ND = torch.randn(1200, D, generator=seeded(0))
    members_N = torch.arange(1200) % 10 == 0
    x_ND[members_N, 2] += 9
    fold_N = torch.arange(1200) // 7 % FOLDS
    fitted, fresh = torch.arange(1200) < 800, torch.arange(1200) >= 800
    lines = grow({"pooled": x_ND[fitted]}, members_N[fitted], fold_N[fitted], QUICK)
    odds_B = log_odds(lines, x_ND[fresh], fold_N[fresh])
    assert torch.equal(odds_B > 0, members_N[fresh])
    alone = torch.cat([log_odds(lines, x_ND[i : i + 1], fold_N[i : i + 1]) for i in range(800, 830)])
    assert torch.equal(alone, odds_B[:30])
    with_nan = torch.full((1, D), torch.nan)
    assert float(log_odds(lines, with_nan, torch.zeros(1, dtype=torch.int64))) < 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(20, 400), st.integers(1, 60))
def test_a_fair_share_keeps_small_classes_and_the_total(counts: list[int], total: int, most: int) -> None:
    share = fair_share(counts, total, most)

    def kept(limit: int) -> int:
        return sum(min(count, limit) for count in counts)

    assert 1 <= share <= most
    assert kept(share) <= total
    assert share == most or kept(share + 1) > total


@pytest.mark.slow
def test_a_finding_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sanitize.score.toxic_direction.verdict.SHOWN", 10)
    n = 45 * 40
    clean = data(n)
    labels = torch.arange(n) % 45
    logits = 8 * torch.eye(45)[labels]
    quick: Sequence[Any] = (clean.pooled, clean.gradients, logits, labels, clean.poison)
    found = Data(*quick).find(scorer=ToxicDirectionConfig(n_starts=16))
    assert len(found.finding["groups"]) == 10


# --- a class that is mixed with every other one -------------------------------------------------------------------


def _confused(
    sizes: list[int], into: dict[tuple[int, int], float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits and labels of samples; `into[a, b]` is the share of samples labelled `a` that look like class `b`."""
    labels_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    looks_N = labels_N.clone()
    for (label, other), share in into.items():
        rows = (labels_N == label).nonzero()[:, 0]
        chosen = rows[torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]]
        looks_N[chosen] = other
    # A calibrated model: for an image that looks like b, the shares of all labels among such images.
    counts_KK = torch.zeros(len(sizes), len(sizes)).index_put_((looks_N, labels_N), torch.ones(len(labels_N)), True)
    return (counts_KK / counts_KK.sum(1, keepdim=True)).clamp(min=1e-9).log()[looks_N], labels_N


@pytest.mark.parametrize("sizes", [[300] * 6, [2000, 60, 90, 150, 60, 600]])
def test_a_class_with_images_of_every_other_class_is_named(sizes: list[int]) -> None:
    pairs = {(1, 2): 0.2, (2, 1): 0.2, (3, 4): 0.3}  # classes that look alike
    generator = torch.Generator().manual_seed(0)
    assert not most_mixed(*_confused(sizes, pairs, generator)).stands_out
    everywhere = {(5, other): 0.1 for other in range(5)}
    found = most_mixed(*_confused(sizes, pairs | everywhere, generator))
    assert found.stands_out
    assert found.label == 5
    verdict = finding([], [], 0.9, "", mixed=found)
    assert verdict["verdict"] == "inconclusive"
    assert "confuses class 5 with every other class" in verdict["why"]


def test_wrong_labels_in_every_class_and_few_classes_are_no_mixed_class() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = {(a, b): 0.08 for a in range(6) for b in range(6) if a != b}
    found = most_mixed(*_confused([400] * 6, noise, generator))
    assert found.least > 0.02
    assert not found.stands_out
    few = {(0, 1): 0.3, (0, 2): 0.3}
    assert most_mixed(*_confused([400] * 3, few, generator)).label == -1
    assert most_mixed(*_confused([400, 30, 30, 30, 30, 30], few, generator)).label == -1
