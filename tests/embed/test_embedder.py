from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.embed.embedder import learned
from sanitize.errors import ArtifactError, ConfigError, DataError
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig

FAST = EmbedderConfig(
    architecture=ConvNetConfig(widths=(4,)), optim=OptimConfig(epochs=1, batch_size=64), min_steps=1, max_steps=1
)


def test_the_suspect_model_learns_the_digits(checkpoint: Checkpoint, embedder_config: EmbedderConfig) -> None:
    history = checkpoint.read_json("history.json")
    assert len(history) == embedder_config.optim.epochs
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy"] > 0.3  # chance is 0.1
    assert checkpoint.config.n_classes == 10
    assert checkpoint.config.image_shape == (3, 8, 8)


def test_the_same_seed_trains_the_same_model_and_another_seed_another(
    tmp_path: Path, dataset: Dataset, compute: Compute
) -> None:
    first = train_embedder(FAST, dataset, str(tmp_path / "a"), compute)
    torch.rand(7)  # the global generator is no part of it
    assert train_embedder(FAST, dataset, str(tmp_path / "b"), Compute(device="cpu")).digest == first.digest
    other = train_embedder(FAST, dataset, str(tmp_path / "c"), Compute(device="cpu", seed=1))
    assert other.manifest().files["model.safetensors"] != first.manifest().files["model.safetensors"]


def test_a_data_set_that_is_streamed_is_learned_too(tmp_path: Path, dataset: Dataset, compute: Compute) -> None:
    config = FAST.model_copy(update={"cache_bytes": 200 * 192})
    first = train_embedder(config, dataset, str(tmp_path / "a"), compute)
    assert train_embedder(config, dataset, str(tmp_path / "b"), compute).digest == first.digest


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_the_user_are_taken_as_they_are(
    tmp_path: Path,
    dataset: Dataset,
    compute: Compute,
    checkpoint: Checkpoint,
    embedder_config: EmbedderConfig,
    suffix: str,
) -> None:
    state, path = checkpoint.model().state_dict(), tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    config = embedder_config.model_copy(update={"weights": str(path)})
    loaded = train_embedder(config, dataset, str(tmp_path / "a"), compute)
    assert all(torch.equal(t, state[name]) for name, t in loaded.model().state_dict().items())
    assert loaded.read_json("history.json") == []
    # Where they lie does not matter, what they hold does.
    moved = path.rename(tmp_path / f"moved{suffix}")
    config = embedder_config.model_copy(update={"weights": str(moved)})
    assert train_embedder(config, dataset, str(tmp_path / "b"), compute).digest == loaded.digest
    safetensors.torch.save_file({n: t * 2 for n, t in state.items()}, tmp_path / "other.safetensors")
    config = embedder_config.model_copy(update={"weights": str(tmp_path / "other.safetensors")})
    with pytest.raises(ArtifactError, match=r"inputs\.weights"):
        train_embedder(config, dataset, str(tmp_path / "a"), compute)


def test_weights_that_cannot_be_used_are_errors_of_ours(tmp_path: Path, dataset: Dataset, compute: Compute) -> None:
    out = str(tmp_path / "a")
    with pytest.raises(DataError, match=r"missing\.pt"):
        train_embedder(FAST.model_copy(update={"weights": str(tmp_path / "missing.pt")}), dataset, out, compute)
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="do not fit"):
        train_embedder(FAST.model_copy(update={"weights": str(tmp_path / "other.pt")}), dataset, out, compute)
    with pytest.raises(ConfigError, match="2 values"):
        train_embedder(FAST.model_copy(update={"mean": (0.5, 0.5)}), dataset, out, compute)
    assert not Path(out).exists()


@given(st.floats(0.01, 0.99))
def test_a_model_near_chance_has_not_learned_and_a_good_one_has(chance: float) -> None:
    assert learned(1.0, chance)
    assert learned((1.02 + chance) / 2, chance)  # a little more than half of the way from chance to 1
    assert not learned((0.98 + chance) / 2, chance)
    assert not learned(chance, chance)
    assert not learned(1.0, 1.0)


def test_training_goes_on_once_where_the_model_has_not_learned(
    tmp_path: Path, dataset: Dataset, compute: Compute
) -> None:
    config = FAST.model_copy(update={"min_steps": 12, "max_steps": 20})
    trained = train_embedder(config, dataset, str(tmp_path / "a"), compute)
    steps = dataset.n_samples // 64
    first, second = -(-12 // steps), min(-(-12 // steps), 20 // steps - -(-12 // steps))
    assert second > 0
    assert [row["epoch"] for row in trained.read_json("history.json")] == list(range(1, first + second + 1))
    assert trained.suspect is not None
    assert trained.suspect["steps"] == (first + second) * steps <= 20
    assert not trained.suspect["learned"]
    assert "below" in trained.suspect["why"]
    assert "max_steps" in trained.suspect["setting"]


def test_a_model_that_has_learned_is_not_trained_further(tmp_path: Path, dataset: Dataset, compute: Compute) -> None:
    optim = OptimConfig(epochs=1, batch_size=32, learning_rate=0.02)
    architecture = ConvNetConfig(widths=(8, 16))
    config = EmbedderConfig(architecture=architecture, optim=optim, min_steps=200, max_steps=10_000)
    suspect = train_embedder(config, dataset, str(tmp_path / "a"), compute).suspect
    assert suspect is not None
    assert suspect["learned"]
    assert 200 <= suspect["steps"] < 200 + dataset.n_samples // 32
    assert suspect["size"] == [8, 8]


@pytest.mark.parametrize("cache_bytes", [2**30, 130 * 192])
def test_a_sample_of_a_large_data_set_does_not_depend_on_the_order_of_its_shards(
    tmp_path: Path, digits: Digits, compute: Compute, cache_bytes: int
) -> None:
    config = FAST.model_copy(update={"max_samples": 150, "cache_bytes": cache_bytes})
    shards, made = digits.shards()[:4], []
    for name, order in (("a", shards), ("b", shards[::-1])):
        dataset = index_shards(IndexConfig(), order, str(tmp_path / name), compute)
        made.append(train_embedder(config, dataset, str(tmp_path / f"model-{name}"), compute))
    assert made[0].digest == made[1].digest
    assert made[0].suspect is not None
    assert (made[0].suspect["n_samples"], made[0].suspect["n_all"]) == (150, dataset.n_samples)
    assert made[0].suspect["steps"] == 150 // 64
