"""Mini-batches and first weights of RCA and RobustRealNVP."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from sanitize.score.estimator import epoch, n_batches, uniform_layers


@given(st.integers(1, 300), st.integers(1, 400), st.integers(0, 99))
def test_an_epoch_has_equal_batches_of_different_rows(n_rows: int, batch_size: int, seed: int) -> None:
    x_ND = torch.arange(n_rows)[:, None]
    batches = list(epoch(x_ND, batch_size, Generator().manual_seed(seed)))
    assert len(batches) == n_batches(n_rows, batch_size)
    assert len({len(x_BD) for x_BD in batches}) == 1
    seen = torch.cat(batches).flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert n_rows - len(seen) < len(batches)
    assert abs(len(batches[0]) - batch_size) <= batch_size / 2 or len(batches) == 1


def test_first_weights_are_uniform_within_the_bound_of_their_inputs() -> None:
    layers = uniform_layers((3, 2), [(4, 50), (50, 7)], Generator().manual_seed(0))
    for (weight, bias), (n_in, n_out) in zip(layers, [(4, 50), (50, 7)], strict=True):
        assert weight.shape == (3, 2, n_in, n_out)
        assert bias.shape == (3, 2, 1, n_out)
        assert 0.9 * n_in**-0.5 < weight.abs().max() <= n_in**-0.5
        assert abs(float(weight.mean())) < 0.1 * n_in**-0.5
