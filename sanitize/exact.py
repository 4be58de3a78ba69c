"""Products and sums of rows whose bits depend on the row alone: not on the batch, the BLAS or the processor.

A floating-point sum depends on its order, and a BLAS chooses the order. On AVX-512, MKL gives a row of a product other
bits in a batch of another size, and also in another place of a batch of the same size (up to 11 columns, and widths
that are no multiple of 4), so that blocks of one shape are not enough. `MKL_CBWR` must be in the environment before
torch is imported, slows down every product of the process, and does not apply to Arm, where there is no MKL.

Here the order does not matter, because no sum is rounded. Each row of x, and each column of the weights, is rounded to
integers of p and of q bits in a unit of its own (a power of two), with

    p + q + log2 D <= 53,

so that all products, and all their sums in any order, are integers that float64 represents exactly (Ozaki, Ogita, Oishi
& Rump, Numerical Algorithms 2012). The error of an entry is at most 2^-(p + 1) of the largest entry of its row: 2^-24
with 64 columns, like float32, and 2^-23 with 512. All other operations are element by element, and IEEE 754 rounds them
correctly, so they give the same bits everywhere.

The cost is a product in float64 and a few passes over the rows, measured in docs/methods.md. Shapes: ... leading
dimensions, B rows, D columns of the rows, K columns of the product.
"""

import math

import torch
from torch import Tensor, nn

_MANTISSA = 53  # bits of float64
_LARGEST = 1023  # exponent of the largest power of two in float64
_POWERS = torch.tensor([math.ldexp(1.0, i) for i in range(-_LARGEST, _LARGEST + 1)], dtype=torch.float64)
_NARROW = 16  # outputs; MKL was found to use other code for up to 11
_CHUNK = 1 << 17  # approximate size of a temporary, in numbers; larger ones do not stay in the cache


def matmul(x_BD: Tensor, weight_DK: Tensor) -> Tensor:
    """x @ weight, float64 (B, K), for columns in any units: a small column with large weights keeps its precision.

    Args:
        x_BD: rows, finite, any floating dtype.
        weight_DK: float64 or float32, finite.
    """
    unit_D1 = _power_above(weight_DK.double().abs().amax(-1, keepdim=True))
    weight_DK, unit_D = weight_DK.double() / unit_D1, unit_D1.squeeze(-1)
    rows = max(1, _CHUNK // max(1, *x_BD.shape[1:], weight_DK.shape[1]))
    return torch.cat([_product(chunk_bD.double() * unit_D, weight_DK) for chunk_bD in x_BD.split(rows)])


def baddbmm(bias_M1K: Tensor, x_MBD: Tensor, weight_MDK: Tensor) -> Tensor:
    """`torch.baddbmm`, float32 (M, B, K), for columns of similar size, such as activations of a network."""
    return _product(x_MBD, weight_MDK).float() + bias_M1K


def similarity(x_BD: Tensor, y_MD: Tensor) -> Tensor:
    """x @ y^T, float32 (B, M), for rows of unit length."""
    return _product(x_BD, y_MD.T).float()


def total(x: Tensor, dim: int = -1) -> Tensor:
    """Sum over a dimension in an order that depends on its length alone: halves are added repeatedly."""
    n = x.shape[dim]
    if n == 0:
        return x.sum(dim)
    while n > 1:
        half = n // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat([folded, x.narrow(dim, n - 1, 1)], dim) if n % 2 else folded
        n -= half
    return x.squeeze(dim)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, float64 (..., B, K)."""
    bits = _MANTISSA - max(0, x.shape[-1] - 1).bit_length()
    integers, unit = _rounded(x, bits // 2, -1)
    factors, factor_unit = _rounded(weight, bits - bits // 2, -2)
    return (integers @ factors).mul_(unit).mul_(factor_unit)


def _rounded(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Integers of at most 2^bits, float64, with one unit along `dim`; and the units."""
    exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent
    # The exponents that float32 can scale by; smaller numbers are rounded to fewer bits.
    exponent = exponent.clamp(-100, 128) if x.dtype == torch.float32 else exponent.clamp(-900, 1000)
    scaled = x * _power(bits - exponent).to(x.dtype)
    return scaled.round_().double(), _power(exponent - bits)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, float64, exactly; `torch.ldexp` computes it by `pow`, which is not always exact."""
    return _POWERS.to(exponent.device)[exponent.long() + _LARGEST]


def _power_above(x: Tensor) -> Tensor:
    """Power of two above each number; 1 for a zero."""
    exponent = torch.frexp(x).exponent.clamp(-900, 900)
    return _power(exponent.where(x > 0, 0))


def make_narrow_linears_exact(model: nn.Module) -> None:
    """Make the output of every Linear of `model` with fewer than 16 outputs depend on the row alone, to the bit.

    On a CPU, in batches of one shape, only these layers were found to depend on the place of a row: MKL on AVX-512
    multiplies narrow matrices by other code, whose sums begin where the memory is aligned.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features < _NARROW:
            module.register_forward_hook(_exact_output)


def _exact_output(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # Autocast does not change a product in float64.
    product = _product(inputs[0].to(output.dtype).float(), linear.weight.T.to(output.dtype).float()).float()
    return (product if linear.bias is None else product + linear.bias).to(output.dtype)
