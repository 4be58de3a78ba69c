"""Training that is stopped anywhere and goes on ends with the same bits; a damaged snapshot is an error."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.errors import ArtifactError
from sanitize.loop import OptimConfig, train
from sanitize.snapshots import Snapshots
from sanitize.training import Drops, Pair, robust_objective, zoo

N = 200
CONFIGS = {
    "adamw, one cycle, average": OptimConfig(epochs=3, batch_size=32, ema_decay=0.9, noise_sd=0.1),
    "adam, cosine": OptimConfig(optimizer="adam", schedule="cosine", epochs=3, batch_size=32),
    "sgd, constant, clipped": OptimConfig(
        optimizer="sgd", schedule="constant", epochs=3, batch_size=32, max_grad_norm=1.0
    ),
}


class Stopped(Exception):
    pass


def network() -> nn.Module:
    """A convolution too: its weights and their moments are laid out channels_last."""
    image = nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Flatten()
    return nn.Sequential(*image, nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))


def run(
    config: OptimConfig, compute: Compute, snapshots: Snapshots | None, stop_at: int | None
) -> tuple[dict[str, Tensor], list[dict[str, float]], Tensor]:
    """Weights, history, and how often each sample was dropped; or Stopped after so many steps."""
    compute.seed_global("test")
    generator = torch.Generator().manual_seed(3)
    y_N = torch.randint(3, (N,), generator=generator)
    x_ND = 2 * torch.eye(6)[y_N] + torch.randn(N, 6, generator=generator)
    method = zoo(tau=0.2, warmup_epochs=1)["co_prl_l"]
    model, drops = Pair(network(), network()), Drops(N, torch.device("cpu"))
    data = Resident(x_ND, y_N, config.batch_size, partial(compute.generator, "order"))
    augment = compute.generator("augment")
    n_steps = 0

    def on_step(n: int) -> None:
        nonlocal n_steps
        n_steps += n > 0
        if n_steps == stop_at:
            raise Stopped

    history = train(
        model,
        data.epoch,
        data.steps_per_epoch,
        config,
        compute,
        lambda x_BD: x_BD + 0.1 * torch.rand(x_BD.shape, generator=augment),
        on_step,
        robust_objective(method, compute, drops=drops),
        snapshots=snapshots,
        carried={"augment": augment, "dropped": drops.dropped_N, "seen": drops.seen_N},
    )
    return model.state_dict(), history, drops.dropped_N


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stops", [[1], [2], [5], [6], [7], [13], [18], [4, 4, 1, 9]])
def test_a_stopped_run_ends_with_the_same_bits(name: str, stops: list[int], compute: Compute, tmp_path: Path) -> None:
    config = CONFIGS[name]
    wanted_state, wanted_history, wanted_N = run(config, compute, None, None)
    snapshots = Snapshots(tmp_path / "snapshot", every=2)
    for stop_at in stops:
        with pytest.raises(Stopped):
            run(config, compute, snapshots, stop_at)
    state, history, dropped_N = run(config, compute, snapshots, None)
    assert state.keys() == wanted_state.keys()
    assert all(torch.equal(tensor, wanted_state[name]) for name, tensor in state.items())
    assert [list(row.items()) for row in history] == [list(row.items()) for row in wanted_history]
    assert torch.equal(dropped_N, wanted_N)
    assert wanted_N.sum() > 0


def test_snapshots_are_taken_though_each_epoch_is_shorter_than_their_distance(compute: Compute, tmp_path: Path) -> None:
    """An epoch has 6 steps."""
    config, snapshots = CONFIGS["adam, cosine"], Snapshots(tmp_path / "snapshot", every=7)
    taken = []
    for stop_at in (6, 7, 8, 13, 15):
        snapshots.path.unlink(missing_ok=True)
        with pytest.raises(Stopped):
            run(config, compute, snapshots, stop_at)
        state = snapshots.load()
        taken.append(state and (state["epoch"], state["n_steps"]))
    assert taken == [None, None, (1, 1), (1, 1), (2, 2)]
    assert run(config, compute, snapshots, None)[1] == run(config, compute, None, None)[1]


def test_going_on_does_not_begin_anew(compute: Compute, tmp_path: Path) -> None:
    config, snapshots = CONFIGS["adam, cosine"], Snapshots(tmp_path / "snapshot", every=2)
    with pytest.raises(Stopped):
        run(config, compute, snapshots, 8)
    done = snapshots.load()
    assert done is not None
    assert (done["epoch"], done["n_steps"]) == (0, 6)
    run(config, compute, snapshots, 14)  # 18 steps in all, 12 are left; those done are reported in one call


@pytest.mark.parametrize("damage", [b"", b"not a snapshot", b"\xff" * 100])
def test_a_damaged_snapshot_is_an_error_that_says_what_to_do(damage: bytes, compute: Compute, tmp_path: Path) -> None:
    (tmp_path / "snapshot").write_bytes(damage)
    with pytest.raises(ArtifactError, match=r"is damaged .*; delete it, and training begins anew"):
        run(CONFIGS["adam, cosine"], compute, Snapshots(tmp_path / "snapshot", 2), None)


TENSORS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.ones(shape).to(dtype))
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | TENSORS
STATES = st.dictionaries(
    st.text(), st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
)


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    return type(a) is type(b) and a == b


@given(state=STATES)
def test_a_saved_state_is_loaded_as_it_was(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(Path(folder) / "snapshot", every=1)
        snapshots.save(state)
        assert is_same(state, snapshots.load())


def test_a_pickle_is_no_snapshot(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "snapshot")
    with pytest.raises(ArtifactError, match="is damaged"):
        Snapshots(tmp_path / "snapshot", 1).load()
