"""Scaling: one variance or one range, whatever the units, the gaps and the block a row came in."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sanitize.errors import DataError
from sanitize.score import scaling
from sanitize.score.scaling import Scaling, as_rows


def rows() -> Tensor:
    """Columns in units of 1e-6 to 1e6, one of them nearly always the same, one constant, one with gaps."""
    x_ND = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 6)))
    x_ND[:, 1] = (x_ND[:, 1] > 2.5).double()
    x_ND[:, 2] = 7.0
    x_ND[::3, 3] = torch.nan
    return x_ND * torch.tensor([1e-6, 1, 1, 1e6, 1, 3])


def test_one_variance() -> None:
    z_ND = Scaling.of(rows()).apply(rows())
    torch.testing.assert_close(z_ND.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(z_ND.var(0, correction=0), torch.tensor([1.0, 1, 0, 1, 1, 1]))


def test_one_range_and_on_the_average_one_variance() -> None:
    z_ND = Scaling.of(rows(), equal="range").apply(rows())
    torch.testing.assert_close(z_ND.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    ranges_D = (z_ND.amax(0) - z_ND.amin(0))[[0, 1, 3, 4, 5]]
    torch.testing.assert_close(ranges_D, ranges_D[:1].expand(5))
    variances_D = z_ND.var(0, correction=0)
    assert float(variances_D[[0, 1, 3, 4, 5]].mean()) == pytest.approx(1, rel=1e-4)
    assert variances_D[1] < variances_D[0] / 2  # the rare ones of column 1 do not blow it up
    assert not z_ND[:, 2].any()


@pytest.mark.parametrize("equal", ["variance", "range"])
def test_blocks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, equal: str) -> None:
    whole = Scaling.of(rows(), equal=equal)  # type: ignore[arg-type]
    monkeypatch.setattr(scaling, "_SCALED", 7)
    in_blocks = Scaling.of(rows(), equal=equal)  # type: ignore[arg-type]
    torch.testing.assert_close(in_blocks.apply(rows()), whole.apply(rows()))
    assert in_blocks.missing_fraction == pytest.approx(167 / 3000) == whole.missing_fraction


@pytest.mark.parametrize("equal", ["variance", "range"])
def test_constant_columns_alone_are_zero(equal: str) -> None:
    x_ND = torch.full((5, 2), 3.0)
    assert not Scaling.of(x_ND, equal=equal).apply(x_ND).any()  # type: ignore[arg-type]


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(DataError, match="column"):
        Scaling.of(torch.tensor([[1.0, torch.nan], [2.0, torch.nan]]))
    with pytest.raises(DataError, match="infinite"):
        as_rows(torch.tensor([[1.0, torch.inf]]))
