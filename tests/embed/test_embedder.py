from pathlib import Path

import pytest
import safetensors.torch
import torch

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.errors import ArtifactError, ConfigError, DataError
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig

FAST = EmbedderConfig(architecture=ConvNetConfig(widths=(4,)), optim=OptimConfig(epochs=1, batch_size=64))


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
