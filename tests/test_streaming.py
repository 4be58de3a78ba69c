import random

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sanitize.streaming import ClassMoments, HashSample, Moments


@st.composite
def rows_and_cuts(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """(N, D) rows with a scale and an offset, and where they are cut into batches, empty ones among them."""
    n, d = draw(st.integers(2, 60)), draw(st.integers(1, 6))
    offset, scale = draw(st.sampled_from([0.0, -3.0, 1e3, 1e6])), draw(st.sampled_from([1e-3, 1.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x_ND = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + offset
    return x_ND, sorted(draw(st.lists(st.integers(0, n), max_size=12)))


def split(x_ND: Tensor, cuts: list[int]) -> list[Tensor]:
    return list(x_ND.tensor_split(cuts))


def roundtrip(moments: Moments) -> Moments:
    return Moments.from_state_dict(safetensors.torch.load(safetensors.torch.save(moments.state_dict())))


def of_batch(x_BD: Tensor) -> Moments:
    moments = Moments(x_BD.shape[1])
    moments.update(x_BD)
    return moments


def assert_same(moments: Moments, x_ND: Tensor) -> None:
    """The moments of x_ND, to 1e-10 relative to the size of the covariance matrix."""
    assert moments.count == len(x_ND)
    torch.testing.assert_close(moments.mean_D, x_ND.mean(0), rtol=1e-10, atol=0)
    wanted_DD = torch.cov(x_ND.T).reshape(moments.scatter_DD.shape)
    # What float64 itself can hold: a mean near 1e6 is known to 1e-10 only.
    noise = (x_ND.abs().max() * 2**-52) ** 2 + 2**-52 * x_ND.abs().max() * wanted_DD.abs().max().sqrt()
    error = (moments.covariance() - wanted_DD).abs().max()
    assert error <= 1e-10 * wanted_DD.abs().max() + noise


@given(rows_and_cuts())
def test_any_split_into_batches_gives_the_moments_of_one(case: tuple[Tensor, list[int]]) -> None:
    x_ND, cuts = case
    moments = Moments(x_ND.shape[1])
    for x_BD in split(x_ND, cuts):
        moments.update(x_BD)
    assert_same(moments, x_ND)


@given(rows_and_cuts(), st.randoms(use_true_random=False), st.booleans())
def test_any_order_and_tree_of_merges_saved_and_loaded_gives_the_moments_of_one(
    case: tuple[Tensor, list[int]], rng: random.Random, save: bool
) -> None:
    x_ND, cuts = case
    states = [of_batch(x_BD) for x_BD in split(x_ND, cuts)]
    while len(states) > 1:
        rng.shuffle(states)
        other = states.pop()
        states[-1].merge(roundtrip(other) if save else other)
    assert_same(states[0], x_ND)


@given(rows_and_cuts())
def test_row_by_row_equals_all_at_once(case: tuple[Tensor, list[int]]) -> None:
    x_ND, _ = case
    moments = Moments(x_ND.shape[1])
    for x_1D in x_ND.split(1):
        moments.update(x_1D)
    assert_same(moments, x_ND)


def test_an_offset_of_a_million_costs_no_digits_of_the_covariance() -> None:
    """The naive sum of squares is off in the fourth digit here."""
    x_ND = torch.randint(-512, 513, (5000, 4), generator=torch.Generator().manual_seed(0)).double() / 256
    moments = Moments(4)
    for x_BD in (x_ND + 2.0**20).split(17):
        moments.update(x_BD)
    torch.testing.assert_close(moments.covariance(), torch.cov(x_ND.T), rtol=1e-9, atol=1e-11)


def test_saving_and_loading_loses_no_bit() -> None:
    moments = of_batch(torch.randn(7, 3, generator=torch.Generator().manual_seed(1)))
    again = roundtrip(moments)
    assert again.count == moments.count
    assert torch.equal(again.mean_D, moments.mean_D)
    assert torch.equal(again.scatter_DD, moments.scatter_DD)
    assert again.scatter_DD.dtype == torch.float64


def test_float32_rows_are_summed_in_float64() -> None:
    x_ND = (torch.randn(4000, 2, generator=torch.Generator().manual_seed(2)) + 100).float()
    assert_same(of_batch(x_ND), x_ND.double())


def test_merging_leaves_the_other_state_as_it_was() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = of_batch(torch.randn(5, 2, generator=generator)), of_batch(torch.randn(4, 2, generator=generator))
    before = {name: tensor.clone() for name, tensor in b.state_dict().items()}
    a.merge(b)
    a.update(torch.ones(1, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in b.state_dict().items())


def test_a_loaded_state_does_not_share_memory_with_the_dictionary() -> None:
    moments = of_batch(torch.eye(3))
    again = Moments.from_state_dict(moments.state_dict())
    again.mean_D += 1
    again.scatter_DD += 1
    assert torch.equal(moments.mean_D, of_batch(torch.eye(3)).mean_D)
    assert torch.equal(moments.scatter_DD, of_batch(torch.eye(3)).scatter_DD)


@pytest.mark.parametrize(("n", "ddof"), [(0, 1), (1, 1), (0, 0)])
def test_too_few_rows_have_no_covariance(n: int, ddof: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        of_batch(torch.zeros(n, 2)).covariance(ddof)


@given(rows_and_cuts(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_class_moments_equal_the_moments_of_each_class(
    case: tuple[Tensor, list[int]], n_classes: int, rng: random.Random
) -> None:
    x_ND, cuts = case
    labels_N = torch.tensor([rng.randrange(n_classes) * 7 for _ in x_ND])
    states = []
    for x_BD, labels_B in zip(split(x_ND, cuts), labels_N.tensor_split(cuts), strict=True):
        state = ClassMoments(x_ND.shape[1])
        state.update(x_BD, labels_B)
        saved = safetensors.torch.save(state.state_dict())
        states.append(ClassMoments.from_state_dict(x_ND.shape[1], safetensors.torch.load(saved)))
    rng.shuffle(states)
    for other in states[1:]:
        states[0].merge(other)
    assert set(states[0].by_class) == set(labels_N.tolist())
    for label, moments in states[0].by_class.items():
        of_class = x_ND[labels_N == label]
        if len(of_class) > 1:
            assert_same(moments, of_class)
        else:
            assert moments.count == 1
            assert torch.equal(moments.mean_D, of_class[0])


# --- HashSample -------------------------------------------------------------------------------------------------


def sample_of(hashes: list[int], size: int, order: list[int] | None = None) -> HashSample:
    """Row i holds its hash, so that a mix-up of rows and hashes shows."""
    sample = HashSample(size)
    for i in order or range(len(hashes)):
        sample.update([hashes[i]], torch.tensor([[float(hashes[i])]]))
    return sample


HASHES = st.lists(st.integers(0, 2**20), min_size=1, max_size=80)


@given(HASHES, st.integers(1, 20), st.randoms(use_true_random=False))
def test_the_sample_is_the_smallest_hashes_whatever_the_order(hashes: list[int], size: int, rng: random.Random) -> None:
    wanted = sorted(set(hashes))[:size]
    order = list(range(len(hashes)))
    rng.shuffle(order)
    sample = sample_of(hashes, size, order)
    assert len(sample) == len(wanted)
    assert sample.rows().squeeze(1).tolist() == wanted


@given(HASHES, st.integers(1, 20), st.integers(0, 80), st.booleans())
def test_merging_samples_is_sampling_the_union(hashes: list[int], size: int, cut: int, swap: bool) -> None:
    """Halves may overlap: a row in both counts once."""
    parts = [sample_of(hashes[: cut + 5], size), sample_of(hashes[cut:], size)]
    a, b = parts[::-1] if swap else parts
    a.merge(b)
    assert a.rows().squeeze(1).tolist() == sorted(set(hashes))[:size]


def test_a_sample_keeps_a_copy_of_its_rows() -> None:
    sample, x_BD = HashSample(2), torch.ones(2, 3)
    sample.update([5, 3], x_BD)
    x_BD.zero_()
    assert torch.equal(sample.rows(), torch.ones(2, 3))


def test_the_sample_of_hashed_rows_is_about_uniform() -> None:
    """Rows in the first half of the stream are as likely as those in the second: 500 of 5000, sd about 11."""
    from sanitize.data.tables import EmbeddingBatch
    from sanitize.score.scorer import row_hashes

    positions_N = torch.arange(5000)
    z_ND = positions_N[:, None].float()
    batch = EmbeddingBatch("a.tar", positions_N, [""] * 5000, positions_N * 0, z_ND)
    counts = []
    for seed in range(5):
        sample = HashSample(500)
        sample.update(row_hashes(batch, seed), z_ND)
        counts.append(int((sample.rows() < 2500).sum()))
    assert all(190 < count < 310 for count in counts)
    assert len(set(counts)) > 1


@given(st.lists(st.integers(0, 10**6), max_size=40, unique=True), st.integers(1, 30), st.integers(1, 30))
def test_a_sample_that_was_shrunk_is_the_smaller_sample(values: list[int], size: int, smaller: int) -> None:
    rows_N1 = torch.tensor(values)[:, None].double()
    shrunk, small = HashSample(size), HashSample(min(size, smaller))
    half = len(values) // 2
    shrunk.update(values[:half], rows_N1[:half])
    shrunk.shrink(smaller)
    shrunk.update(values[half:], rows_N1[half:])
    small.update(values, rows_N1)
    assert shrunk.hashes() == small.hashes()
