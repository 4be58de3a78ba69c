"""The certificate of a vote: its formula against every possible attack, and what it depends on."""

from itertools import combinations_with_replacement, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sanitize.certification.partition import certified_poisons, content_digest, partition_of

K = 3
IMAGES = [torch.full((1, 2, 2), value, dtype=torch.uint8) for value in range(4)]
SAMPLES = [(i, label) for i in range(len(IMAGES)) for label in range(K)]  # all training samples there can be
Multiset = tuple[int, ...]


def partitions(training: Multiset, k: int) -> list[Multiset]:
    """Samples of each partition, in the order of their digests."""
    digests = [content_digest(IMAGES[i], label, b"key") for i, label in SAMPLES]
    members: list[list[int]] = [[] for _ in range(k)]
    for sample in sorted(training, key=digests.__getitem__):
        members[partition_of(digests[sample], k)].append(sample)
    return [tuple(samples) for samples in members]


def base_model(samples: Multiset) -> int:
    """Some deterministic learner, as brittle as can be: any change of its samples may change what it says."""
    return int.from_bytes(repr(samples).encode(), "big") % 7919 % K


def ensemble(training: Multiset, k: int) -> tuple[int, int]:
    """Prediction and certified number of poisons."""
    said = torch.tensor([base_model(samples) for samples in partitions(training, k)])
    vote = certified_poisons(torch.bincount(said, minlength=K)[None])
    return int(vote.prediction), int(vote.radius)


def neighbours(training: Multiset) -> set[Multiset]:
    """One sample inserted or removed."""
    more = {tuple(sorted((*training, sample))) for sample in range(len(SAMPLES))}
    return more | {training[:i] + training[i + 1 :] for i in range(len(training))}


def test_no_attack_within_the_certificate_changes_a_prediction_and_one_more_sample_can() -> None:
    tight = 0
    certified = set()
    for k, training in product((1, 3, 5), combinations_with_replacement(range(0, len(SAMPLES), 2), 3)):
        prediction, radius = ensemble(training, k)
        certified.add(radius)
        reached = {training}
        for _ in range(min(radius, 2)):
            reached |= set().union(*map(neighbours, reached))
        if radius <= 2:
            assert all(ensemble(attacked, k)[0] == prediction for attacked in reached)
        if radius <= 1:
            beyond = set().union(*map(neighbours, reached))
            tight += any(ensemble(attacked, k)[0] != prediction for attacked in beyond)
    assert {0, 1, 2} <= certified
    assert tight > 100


def slow_radius(votes: list[int]) -> tuple[int, int]:
    """By its definition: attackers move one vote each, or make one abstain, until another class wins."""
    winner = max(range(len(votes)), key=lambda c: (votes[c], -c))
    moved = 0
    while True:
        for rival in set(range(len(votes))) - {winner}:
            attacked = list(votes)
            attacked[winner] -= min(moved, votes[winner])
            attacked[rival] += moved
            if max(range(len(votes)), key=lambda c: (attacked[c], -c)) != winner:
                return winner, moved - 1
        moved += 1


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6))
def test_the_radius_is_one_below_the_smallest_attack_that_works(votes: list[int]) -> None:
    vote = certified_poisons(torch.tensor([votes]))
    assert (int(vote.prediction), int(vote.radius)) == slow_radius(votes)
    assert int(vote.radius) == (int(vote.n_top) - int(vote.n_rival)) // 2


@pytest.mark.parametrize("change", ["pixel", "label", "shape", "key"])
def test_the_partition_hangs_on_content_and_key_alone(change: str) -> None:
    image_CHW = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    digest = content_digest(image_CHW, 1, b"key")
    assert content_digest(image_CHW.clone(memory_format=torch.contiguous_format), 1, b"key") == digest
    changed: dict[str, tuple[Tensor, int, bytes]] = {
        "pixel": (image_CHW ^ (torch.arange(12) == 5).reshape(1, 3, 4), 1, b"key"),
        "label": (image_CHW, 2, b"key"),
        "shape": (image_CHW.reshape(1, 4, 3), 1, b"key"),
        "key": (image_CHW, 1, b"other"),
    }
    assert content_digest(*changed[change]) != digest


def test_partitions_are_of_about_one_size() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5000, 1, 2, 2), dtype=torch.uint8, generator=generator)
    counts = torch.bincount(
        torch.tensor([partition_of(content_digest(image, 0, b"key"), 10) for image in images]), minlength=10
    )
    chi2 = float(((counts - 500.0) ** 2 / 500).sum())
    assert chi2 < 27.9  # of 9 degrees of freedom: one seed in a thousand
