from pathlib import Path

import pytest
import safetensors.torch
import torch

from sanitize.augment import AugmentConfig
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


# --- augmentation -----------------------------------------------------------------------------------------------


def augmented(config: AugmentConfig, x_BCHW: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return config(x_BCHW, torch.Generator().manual_seed(seed))


def test_nothing_asked_for_changes_nothing() -> None:
    x_BCHW = torch.randn(5, 3, 4, 4)
    assert torch.equal(augmented(AugmentConfig(brightness=0, contrast=0), x_BCHW), x_BCHW)


def test_brightness_and_contrast_stay_within_their_share_and_move_no_pixel() -> None:
    x_BCHW = torch.randn(400, 1, 4, 4)
    out_BCHW = augmented(AugmentConfig(brightness=0.1, contrast=0.2), x_BCHW)
    for x, y in zip(x_BCHW.flatten(1).double(), out_BCHW.flatten(1).double(), strict=True):
        gain = ((y - y.mean()) @ (x - x.mean())) / (x - x.mean()).square().sum()
        shift = y.mean() - gain * x.mean()
        assert 0.8 - 1e-4 <= gain <= 1.2 + 1e-4
        assert abs(shift) <= 0.1 + 1e-4
        torch.testing.assert_close(y, gain * x + shift, rtol=1e-4, atol=1e-4)


def test_flip_mirrors_about_half_of_the_images() -> None:
    x_BCHW = torch.randn(400, 1, 3, 3)
    out_BCHW = augmented(AugmentConfig(brightness=0, contrast=0, flip=True), x_BCHW)
    mirrored_B = (out_BCHW == x_BCHW.flip(3)).flatten(1).all(1)
    same_B = (out_BCHW == x_BCHW).flatten(1).all(1)
    assert (mirrored_B ^ same_B).all()
    assert 150 < mirrored_B.sum() < 250


def test_a_crop_is_a_part_of_the_image_enlarged() -> None:
    """Two ramps, in x and in y, stay ramps: their slopes say how large the part is, their ends where it was."""
    n, side = 300, 16
    at_W = (torch.arange(side) + 0.5) / side
    ramps_2HW = torch.stack(torch.meshgrid(at_W, at_W, indexing="xy"))
    out_B2HW = augmented(AugmentConfig(crop=0.25), ramps_2HW.expand(n, -1, -1, -1).contiguous())
    inner_B2HW = out_B2HW[:, :, 3:-3, 3:-3]  # at the border there is nothing to interpolate with
    width_B = side * (inner_B2HW[:, 0, :, 1:] - inner_B2HW[:, 0, :, :-1]).mean((1, 2))
    height_B = side * (inner_B2HW[:, 1, 1:] - inner_B2HW[:, 1, :-1]).mean((1, 2))
    torch.testing.assert_close(out_B2HW[:, 0, 3], out_B2HW[:, 0, 12])  # nothing is turned or sheared
    area_B, aspect_B = width_B * height_B, width_B / height_B
    assert 0.25 - 1e-3 < area_B.min() < 0.3
    assert 0.9 < area_B.max() < 1 + 1e-3
    assert 3 / 4 - 1e-3 < aspect_B.min() < 0.8
    assert 1.25 < aspect_B.max() < 4 / 3 + 1e-3
    assert out_B2HW.min() >= 0
    assert out_B2HW.max() <= 1
    centre_B = inner_B2HW[:, 0].mean((1, 2))
    assert centre_B.min() < 0.35
    assert centre_B.max() > 0.65


def test_colours_fade_and_greys_do_not() -> None:
    x_BCHW = torch.randn(200, 3, 4, 4)
    out_BCHW = augmented(AugmentConfig(saturation=0.5), x_BCHW)
    torch.testing.assert_close(out_BCHW.mean(1), x_BCHW.mean(1), rtol=0, atol=1e-5)
    gain_B = (out_BCHW - out_BCHW.mean(1, True)).flatten(1).norm(dim=1) / (x_BCHW - x_BCHW.mean(1, True)).flatten(
        1
    ).norm(dim=1)
    assert 0.5 - 1e-4 <= gain_B.min() < 0.6
    assert 1.4 < gain_B.max() <= 1.5 + 1e-4
    grey_B = augmented(AugmentConfig(grey=0.3), x_BCHW).std(1).flatten(1).amax(1) < 1e-5
    assert 35 < grey_B.sum() < 85
    one_BCHW = x_BCHW[:, :1]
    torch.testing.assert_close(augmented(AugmentConfig(saturation=0.5, grey=0.5), one_BCHW), one_BCHW)
