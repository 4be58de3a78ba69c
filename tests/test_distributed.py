"""Two processes (gloo) give what one process gives with the joined batch."""

import os
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.distributed import joined, world
from sanitize.errors import ConfigError
from sanitize.loop import OptimConfig, train
from sanitize.training import Pair, robust_objective, zoo


def fit(name: str, folder: Path) -> None:
    """Train and save `NAME-SIZE.safetensors` with the weights and the mean losses of the epochs."""
    compute = Compute(device="cpu", threads=1)
    compute.seed_global("test")
    generator = torch.Generator().manual_seed(3)
    y_N = torch.randint(3, (120,), generator=generator)
    x_ND = 2 * torch.eye(6)[y_N] + torch.randn(120, 6, generator=generator)
    config = OptimConfig(optimizer="sgd", learning_rate=0.05, epochs=3, batch_size=30, max_grad_norm=1.0)
    method = zoo(tau=0.2, warmup_epochs=1)[name]
    made = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(method.n_networks)]
    model = made[0] if len(made) == 1 else Pair(*made)
    data = Resident(x_ND, y_N, config.batch_size, partial(compute.generator, "order"))
    objective = None if name == "standard" else robust_objective(method, compute)
    history = train(model, data.epoch, data.steps_per_epoch, config, compute, lambda x_BD: x_BD, objective=objective)
    rank, size = world()
    if rank == 0:
        state = model.state_dict() | {"losses": torch.tensor([row["loss"] for row in history])}
        safetensors.torch.save_file(state, folder / f"{name}-{size}.safetensors")


# min_sgd and decouple choose within a rank's share; where every sample counts, shares make no difference.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "bootstrap", "at"])
def test_two_processes_are_one_with_the_joined_batch(name: str, tmp_path: Path) -> None:
    fit(name, tmp_path)
    _two_processes(name, tmp_path)
    one, two = (safetensors.torch.load_file(tmp_path / f"{name}-{size}.safetensors") for size in (1, 2))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_each_process_drops_of_its_own_share_and_the_mean_counts_what_is_kept(tmp_path: Path) -> None:
    """With a share of 15 and tau 0.2 each process keeps 12: the sum of gradients is that of 24 samples of 30."""
    _two_processes("prl_l", tmp_path)
    fit("prl_l", tmp_path)
    one, two = (safetensors.torch.load_file(tmp_path / f"prl_l-{size}.safetensors") for size in (1, 2))
    # Nothing is dropped in the first epoch, so it is the same; then the shares choose for themselves.
    torch.testing.assert_close(two["losses"][0], one["losses"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0.2, atol=0.05)
    assert not torch.equal(two["0.weight"], one["0.weight"])


def test_a_batch_that_cannot_be_shared_evenly_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sanitize.loop.world", lambda: (0, 4))
    with pytest.raises(ConfigError, match="batch_size=30 is not a multiple of the number of processes, 4"):
        fit("standard", tmp_path)


@pytest.mark.parametrize("end", ["well", "well, and the others are late", "badly"])
def test_a_process_waits_for_the_others_before_it_leaves_but_not_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    called: list[str] = []

    class Reduction:
        def wait(self, timeout: timedelta) -> None:
            called.append("wait")
            assert timedelta() < timeout < timedelta(minutes=5)
            if "late" in end:
                raise RuntimeError("timed out")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda *_args, **_more: called.append("join"))
    monkeypatch.setattr(dist, "all_reduce", lambda *_args, async_op: Reduction())
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("leave"))
    with suppress(KeyError), joined(Compute(device="cpu")):
        if end == "badly":
            raise KeyError
    assert called == (["join", "leave"] if end == "badly" else ["join", "wait", "leave"])


def _two_processes(name: str, folder: Path) -> None:
    """Run this file as two processes that find each other by a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, name, str(folder), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


if __name__ == "__main__":
    method_name, out, own_rank = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{out}/{method_name}", rank=int(own_rank), world_size=2)
    fit(method_name, Path(out))
    dist.barrier()  # a group that is destroyed while the other process still uses it ends that process
    dist.destroy_process_group()
