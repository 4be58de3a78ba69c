import pytest
import torch
from pydantic import ValidationError

from sanitize.compute import Compute
from sanitize.errors import ConfigError


def draws(compute: Compute, *names: str | int) -> list[float]:
    return torch.rand(4, generator=compute.generator(*names)).tolist()


def test_a_stream_is_the_same_every_time_and_unlike_every_other() -> None:
    names = [("a",), ("b",), ("a", "b"), ("a", 1), ("a", 2), ()]
    streams = [draws(Compute(device="cpu"), *name) for name in names]
    assert streams == [draws(Compute(device="cpu"), *name) for name in names]
    assert len({tuple(stream) for stream in streams}) == len(names)


def test_another_seed_gives_other_streams() -> None:
    assert draws(Compute(device="cpu", seed=1), "a") != draws(Compute(device="cpu", seed=2), "a")
    assert Compute(device="cpu", seed=12).seed_for("3") != Compute(device="cpu", seed=1).seed_for("2", "3")


def test_a_draw_from_one_stream_moves_no_other() -> None:
    compute = Compute(device="cpu")
    first, second = compute.generator("a"), compute.generator("b")
    torch.rand(100, generator=first)
    torch.rand(100)
    assert torch.rand(4, generator=second).tolist() == draws(compute, "b")


def test_seeds_stay_below_two_to_the_63() -> None:
    seeds = [Compute(device="cpu", seed=2**63 - 1).seed_for("s", i) for i in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_seeding_globally_repeats_library_draws() -> None:
    compute = Compute(device="cpu")
    compute.seed_global("init")
    first = torch.nn.Linear(3, 3).weight
    compute.seed_global("init")
    assert torch.equal(first, torch.nn.Linear(3, 3).weight)
    compute.seed_global("other")
    assert not torch.equal(first, torch.nn.Linear(3, 3).weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_to_do(device: str) -> None:
    with pytest.raises(ConfigError, match=r"compute\.device=cpu"):
        Compute(device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_used_where_it_is_there() -> None:
    assert Compute(device="cuda").torch_device.type == "cuda"
    assert Compute().torch_device.type == "cuda"
    with pytest.raises(ConfigError):
        Compute(device=f"cuda:{torch.cuda.device_count()}")


def test_auto_takes_what_there_is_and_says_so() -> None:
    compute = Compute()
    assert compute.torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "auto" in compute.describe()
    assert "as set" in Compute(device="cpu").describe()


@pytest.mark.parametrize(
    "wrong", [{"device": "gpu"}, {"device": "cuda:x"}, {"precision": "float16"}, {"seed": -1}, {"threads": 0}, {"x": 1}]
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        Compute(**wrong)


def test_numerics_are_what_can_change_results_and_nothing_else() -> None:
    base = Compute(device="cpu", seed=3)
    assert base.numerics == Compute(device="auto", seed=3, threads=8).numerics
    assert base.numerics != Compute(device="cpu", seed=4).numerics
    assert base.numerics != Compute(device="cpu", seed=3, precision="bfloat16").numerics


def test_autocast_is_off_at_float32_and_on_at_bfloat16() -> None:
    x = torch.ones(2, 2)
    with Compute(device="cpu").autocast():
        assert (x @ x).dtype == torch.float32
    with Compute(device="cpu", precision="bfloat16").autocast():
        assert (x @ x).dtype == torch.bfloat16


def test_activate_sets_the_threads_of_the_config() -> None:
    before = torch.get_num_threads()
    try:
        Compute(device="cpu", threads=2).activate()
        assert torch.get_num_threads() == 2
    finally:
        Compute(device="cpu", threads=before).activate()
    assert torch.are_deterministic_algorithms_enabled()


def test_each_of_several_processes_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Compute(device="cpu").take_gpu(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert Compute(device="cuda").take_gpu(1)
    assert taken == [1]
    with pytest.raises(ConfigError, match="set device=cuda"):
        Compute(device="cuda:0").take_gpu(1)
