import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanitize.errors import ConfigError
from sanitize.training.collaborate import Pair, exchange, networks_of
from sanitize.training.select_batch import SelectBatchConfig, keep_smallest


def test_the_kept_share_falls_linearly_and_then_stays() -> None:
    config = SelectBatchConfig(kind="prl_l", tau=0.4, warmup_epochs=10)
    assert [config.kept_fraction(epoch) for epoch in (0, 1, 5, 10, 11, 300)] == pytest.approx(
        [1.0, 0.96, 0.8, 0.6, 0.6, 0.6]
    )
    assert [config.n_kept(128, epoch) for epoch in (0, 5, 10)] == [128, 102, 77]
    assert [config.is_warm(epoch) for epoch in (0, 9, 10)] == [False, False, True]


def test_at_least_one_sample_is_kept() -> None:
    assert SelectBatchConfig(kind="spl", tau=0.99, warmup_epochs=1).n_kept(10, 5) == 1
    assert SelectBatchConfig(kind="min_sgd").n_kept(128, 0) == 1


@pytest.mark.parametrize(("kind", "tau"), [("all", 0.1), ("min_sgd", 0.1), ("prl_l", 0.0), ("prl_g", 0), ("spl", 0)])
def test_a_tau_that_does_nothing_and_a_filter_without_one_are_refused(kind: str, tau: float) -> None:
    with pytest.raises(ConfigError, match="tau"):
        SelectBatchConfig(kind=kind, tau=tau)  # type: ignore[arg-type]


scores = st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40, unique=True)


@given(scores, st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_smallest_are_kept_wherever_they_stand(values: list[float], n_kept: int, random) -> None:  # type: ignore[no-untyped-def]
    n_kept = min(n_kept, len(values))
    scores_B = torch.tensor(values)
    keep_B = keep_smallest(scores_B, n_kept)
    assert int(keep_B.sum()) == n_kept
    assert sorted(scores_B[keep_B].tolist()) == sorted(scores_B.tolist())[:n_kept]
    order_B = torch.tensor(random.sample(range(len(values)), len(values)))
    assert torch.equal(keep_smallest(scores_B[order_B], n_kept), keep_B[order_B])


def test_what_is_not_a_number_is_dropped_first() -> None:
    assert keep_smallest(torch.tensor([float("nan"), 5.0, float("inf"), 1.0]), 2).tolist() == [False, True, False, True]


def test_co_swaps_the_picks_and_decouple_asks_for_disagreement() -> None:
    keeps = [torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])]
    outputs = [torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 2, 1, 1]]]  # they agree on the first alone
    assert [keep_B.tolist() for keep_B in exchange("co", keeps, outputs)] == [keeps[1].tolist(), keeps[0].tolist()]
    first_B, second_B = exchange("decouple", keeps, outputs)
    assert first_B.tolist() == [False, True, False, False]
    assert second_B.tolist() == [False, False, True, False]
    assert exchange("none", keeps[:1], outputs[:1])[0] is keeps[0]


def test_a_pair_is_its_first_network_and_trains_both() -> None:
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    pair = Pair(first, second)
    x_B = torch.randn(4, 3)
    torch.testing.assert_close(pair(x_B), first(x_B))
    assert networks_of(pair) == [first, second]
    assert networks_of(first) == [first]
