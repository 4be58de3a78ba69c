"""Stamps of groups: a model that keys on a patch, and what must hold for all images."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanitize.score.toxic_direction.evidence import Appearance, appearance_of
from sanitize.score.toxic_direction.stamp import (
    GAINS,
    MATCHES,
    OTHERS,
    STAMPED,
    Matched,
    Suspect,
    matched,
    measure,
    other_images,
    patterns,
    turned,
)

N_CLASSES, SIDE, BRIGHT = 4, 8, 120
PATCH = (..., slice(5, 8), slice(5, 8))
SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 800, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) with one bright row for each class, on noise, and their labels."""
    labels_N = torch.arange(n) % N_CLASSES
    x_NCHW = torch.randint(0, 60, (n, 1, SIDE, SIDE), generator=seeded(seed))
    x_NCHW[torch.arange(n), 0, labels_N] += BRIGHT
    return x_NCHW.to(torch.uint8), labels_N


def predict(x_BCHW: Tensor) -> Tensor:
    """A linear model: the brightest of the first rows, but class 0 where the patch is bright."""
    logits_BK = x_BCHW.float().mean((1, 3))[:, :N_CLASSES].clone()
    logits_BK[:, 0] += 5 * (x_BCHW[PATCH].float().mean((1, 2, 3)) - 60).clamp(min=0)
    return logits_BK.argmax(1)


def with_patch(x_NCHW: Tensor, rows: Tensor) -> Tensor:
    x_NCHW = x_NCHW.clone()
    for row in rows.tolist():
        x_NCHW[row][PATCH] = 200
    return x_NCHW


def look(x_NCHW: Tensor, labels_N: Tensor) -> Appearance:
    return appearance_of(x_NCHW.flatten(1).float(), labels_N)


def suspect(x_NCHW: Tensor, size: int = 64) -> Suspect:
    """The model, with images in memory."""

    def read(row_of: Mapping[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        for names in torch.tensor(sorted(row_of)).split(size):
            yield torch.tensor([row_of[name] for name in names.tolist()]), x_NCHW[names]

    return Suspect(read, predict)


def stamp(x_NCHW: Tensor, labels_N: Tensor, group: Tensor, size: int = 64) -> tuple[float, float] | None:
    label = int(labels_N[group[0]])
    of_class = labels_N == label
    of_class[group] = False
    one = matched(look(x_NCHW, labels_N), group, of_class.nonzero()[:, 0])
    is_right_N = predict(x_NCHW) == labels_N
    return measure([one], suspect(x_NCHW, size), range(len(labels_N)), labels_N, is_right_N)[0]


def test_the_pattern_of_a_trigger_turns_nearly_all_images() -> None:
    x_NCHW, labels_N = images()
    group = (labels_N == 0).nonzero()[:60, 0]
    found = stamp(with_patch(x_NCHW, group), labels_N, group)
    assert found is not None
    assert min(found) > 0.95


def test_the_pattern_of_a_natural_group_turns_hardly_any() -> None:
    """A style: the upper row is brighter, and so is a column that the model does not look at."""
    x_NCHW, labels_N = images()
    group = (labels_N == 0).nonzero()[:60, 0]
    x_NCHW[group, 0, 0] += 40
    x_NCHW[group, 0, :5, 7] += 30
    found = stamp(x_NCHW, labels_N, group)
    assert found is not None
    assert found[0] < 0.05
    assert found[1] < 0.2


def test_a_random_part_of_a_class_has_no_pattern() -> None:
    x_NCHW, labels_N = images()
    assert stamp(x_NCHW, labels_N, (labels_N == 2).nonzero()[:60, 0]) == (0.0, 0.0)


def test_matches_look_like_the_group_without_its_pattern() -> None:
    """The patch is projected out: matches are of the same class, none is in the group."""
    x_NCHW, labels_N = images()
    group = (labels_N == 1).nonzero()[:60, 0]
    x_NCHW = with_patch(x_NCHW, group)
    rest = (labels_N == 1).nonzero()[60:, 0]
    one = matched(look(x_NCHW, labels_N), group, rest)
    assert one.label == 1
    assert len(one.matches) == MATCHES * len(group)
    assert not torch.isin(one.matches, group).any()
    assert (labels_N[one.matches] == 1).double().mean() > 0.9
    pattern_CHW = patterns([one], [(torch.arange(len(x_NCHW)), x_NCHW)], len(x_NCHW))[0]
    assert pattern_CHW[PATCH].mean() > 140
    pattern_CHW[PATCH] = 0
    assert pattern_CHW.abs().mean() < 5


def test_a_large_group_is_represented_by_its_first_images() -> None:
    x_NCHW, labels_N = images(2400)
    of_class = (labels_N == 3).nonzero()[:, 0]
    one = matched(look(x_NCHW, labels_N), of_class[:400], of_class[400:])
    assert one.group_m.tolist() == of_class[:STAMPED].tolist()


def test_no_stamp_where_the_model_is_right_on_hardly_any_other_image() -> None:
    x_NCHW, labels_N = images(240)
    group = (labels_N == 0).nonzero()[:20, 0]
    is_right_N = (labels_N == 0) | (torch.arange(240) < 40)
    one = matched(look(x_NCHW, labels_N), group, (labels_N == 0).nonzero()[20:, 0])
    assert measure([one], suspect(x_NCHW), range(240), labels_N, is_right_N) == [None]
    assert measure([], suspect(x_NCHW), range(240), labels_N, is_right_N) == []


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 300))
def test_patterns_depend_on_no_order_and_no_batch(seed: int, size: int) -> None:
    """Equal to the bit, and equal to the definition."""
    n = 120
    x_NCHW = torch.randint(0, 256, (n, 3, 5, 4), generator=seeded(seed)).to(torch.uint8)
    draw = torch.randint(0, n, (30,), generator=seeded(seed + 1))
    groups = [Matched(0, draw[:10].unique(), draw[10:]), Matched(1, draw[20:].unique(), draw[:20])]
    whole_GCHW = patterns(groups, [(torch.arange(n), x_NCHW)], n)
    order = torch.randperm(n, generator=seeded(seed))
    parts_GCHW = patterns(groups, [(rows, x_NCHW[rows]) for rows in order.split(size)], n)
    assert torch.equal(whole_GCHW, parts_GCHW)
    for one, pattern_CHW in zip(groups, whole_GCHW, strict=True):
        wanted_CHW = x_NCHW[one.group_m].double().mean(0) - x_NCHW[one.matches].double().mean(0)
        torch.testing.assert_close(pattern_CHW.double(), wanted_CHW, rtol=0, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, scale=st.floats(0, 500))
def test_shares_are_bounded_deterministic_and_do_not_depend_on_the_order(seed: int, scale: float) -> None:
    x_NCHW, labels_N = images(240, seed)
    patterns_GCHW = scale * torch.randn(3, 1, SIDE, SIDE, generator=seeded(seed))
    labels = [0, 1, 1]
    shares = turned(patterns_GCHW, labels, x_NCHW, labels_N, predict)
    assert all(one is not None and len(one) == len(GAINS) and 0 <= min(one) <= max(one) <= 1 for one in shares)
    assert turned(patterns_GCHW, labels, x_NCHW, labels_N, predict) == shares
    order = torch.randperm(240, generator=seeded(seed))
    assert turned(patterns_GCHW, labels, x_NCHW[order], labels_N[order], predict) == shares
    assert turned(patterns_GCHW[1:2], [1], x_NCHW, labels_N, predict) == shares[1:2]
    assert turned(torch.zeros(1, 1, SIDE, SIDE), [2], x_NCHW, labels_N, predict) == [(0.0, 0.0)]


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n_classes=st.integers(1, 400))
def test_other_images_come_from_all_classes(seed: int, n_classes: int) -> None:
    labels_N = torch.randint(0, n_classes, (4000,), generator=seeded(seed))
    is_right_N = torch.rand(4000, generator=seeded(seed + 1)) < 0.7
    chosen = other_images(labels_N, is_right_N)
    assert len(chosen.unique()) == len(chosen) <= 2 * OTHERS
    assert is_right_N[chosen].all()
    if 2 <= n_classes <= 20:
        counts = labels_N[chosen].bincount(minlength=n_classes)
        assert len(chosen) - counts.max() >= min(OTHERS, 0.9 * int(is_right_N.sum()) * (1 - 1 / n_classes))


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        patterns([Matched(0, torch.tensor([0]), torch.tensor([1]))], [], 2)
    assert len(other_images(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))) == 0
