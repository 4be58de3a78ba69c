"""Products and sums whose bits depend on the row alone."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from sanitize import exact

# Narrow products and odd widths are where MKL on AVX-512 rounds a row by its place; 64 x 64 is where it does not.
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 40))
CUTS = st.lists(st.integers(0, 40), max_size=4)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=dtype)


def divided(seed: int, cuts: list[int], n: int = 40) -> list[Tensor]:
    """The numbers 0 to n - 1, shuffled and cut into parts, some of them empty."""
    order_N = torch.randperm(n, generator=Generator().manual_seed(seed))
    return [order_N[a:b] for a, b in pairwise(sorted([0, n, *cuts]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(0, 99), SIZES, CUTS)
def test_a_row_has_the_same_bits_in_any_batch_and_place(
    dtype: torch.dtype, seed: int, size: tuple[int, int], cuts: list[int]
) -> None:
    d, k = size
    x_ND, weight_DK = drawn(seed, 40, d, dtype=dtype), drawn(seed + 1, d, k, dtype=dtype)
    bias_21K = drawn(seed + 2, 2, 1, k)
    parts = divided(seed, cuts)
    order_N = torch.cat(parts)
    whole = exact.matmul(x_ND, weight_DK)
    assert torch.equal(torch.cat([exact.matmul(x_ND[part], weight_DK) for part in parts]), whole[order_N])

    def affine(rows: Tensor) -> Tensor:
        return exact.baddbmm(bias_21K, rows.float().expand(2, -1, -1), weight_DK.float().expand(2, -1, -1))

    assert torch.equal(torch.cat([affine(x_ND[part]) for part in parts], 1), affine(x_ND)[:, order_N])
    summed = torch.cat([exact.total(x_ND[part]) for part in parts])
    assert torch.equal(summed, exact.total(x_ND)[order_N])


@given(st.integers(0, 99), SIZES)
def test_it_is_the_product_to_float32(seed: int, size: tuple[int, int]) -> None:
    d, k = size
    x_ND, weight_DK = drawn(seed, 20, d), drawn(seed + 1, d, k)
    wanted = x_ND.double() @ weight_DK.double()
    torch.testing.assert_close(exact.matmul(x_ND, weight_DK), wanted, rtol=0, atol=2e-6 * d**0.5)
    twice = exact.baddbmm(torch.zeros(1, 1, k), x_ND[None], weight_DK[None])[0]
    torch.testing.assert_close(twice.double(), wanted, rtol=0, atol=2e-6 * d**0.5)


@given(st.integers(0, 99), st.integers(1, 4097))
def test_the_sums_are_exact(seed: int, d: int) -> None:
    """Against sums of fractions, with all entries as large as they can be and of one sign: nothing may be rounded."""
    x_D = 1 - drawn(seed, d).abs() * 1e-6
    weight_D = 1 - drawn(seed + 1, d).abs() * 1e-6
    bits = 53 - max(0, d - 1).bit_length()
    integers, unit = exact._rounded(x_D[None], bits // 2, -1)
    factors, factor_unit = exact._rounded(weight_D[:, None], bits - bits // 2, -2)
    wanted = sum(Fraction(a) * Fraction(b) for a, b in zip(integers[0].tolist(), factors[:, 0].tolist(), strict=True))
    assert Fraction(float((integers @ factors)[0, 0])) == wanted
    assert float(unit) * 2.0 ** (bits // 2) in (1.0, 0.5, 2.0)
    assert float(factor_unit) > 0


@given(st.integers(0, 99))
def test_columns_may_have_any_units(seed: int) -> None:
    x_ND, weight_DK = drawn(seed, 20, 7).double(), drawn(seed + 1, 7, 3).double()
    unit_D = torch.tensor([1.0, 1e-12, 1e12, 1e-30, 1e30, 3.0, 1e5], dtype=torch.float64)
    found = exact.matmul(x_ND * unit_D, weight_DK / unit_D[:, None])
    torch.testing.assert_close(found, x_ND @ weight_DK, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_extremes_are_no_trouble(dtype: torch.dtype) -> None:
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    x_ND = torch.tensor([[0, 0, 0], [tiny, tiny / 4, 0], [huge, -huge, huge / 2], [1, tiny, huge]], dtype=dtype)
    for product in (exact.matmul(x_ND, torch.zeros(3, 2)), exact.matmul(x_ND / huge, torch.ones(3, 2))):
        assert product.isfinite().all()
    assert exact.matmul(x_ND, torch.zeros(3, 2)).abs().max() == 0
    assert exact.matmul(x_ND[:0], torch.ones(3, 2)).shape == (0, 2)
    assert exact.total(x_ND[:0]).shape == (0,)
    assert exact.total(x_ND[:, :0]).tolist() == [0.0] * 4


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 70), st.integers(1, 15), st.booleans())
def test_a_narrow_linear_gives_a_row_the_same_bits_in_every_place(seed: int, d: int, k: int, bias: bool) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(d, k, bias=bias)
    x_ND = drawn(seed, 32, d)
    plain = linear(x_ND)
    exact.make_narrow_linears_exact(linear)
    order_N = torch.randperm(32, generator=Generator().manual_seed(seed))
    with torch.inference_mode():
        assert torch.equal(linear(x_ND[order_N]), linear(x_ND)[order_N])
        torch.testing.assert_close(linear(x_ND), plain.detach(), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = linear(x_ND)
            assert low.dtype == torch.bfloat16
            assert torch.equal(linear(x_ND[order_N]), low[order_N])
