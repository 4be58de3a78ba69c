"""Algorithm 1 against its slow twin, and the shards it writes."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sanitize.artifacts import read_manifest
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.denoising import PCA, Components, DenoiseConfig, PCANoise, PCANoiseConfig, denoise_shards
from sanitize.errors import ConfigError

CPU = torch.device("cpu")


def algorithm_1(x_D: Tensor, xi_m: Tensor, d: int, scale: float, components: Components) -> Tensor:
    """To the letter, one image at a time."""
    a_D = components.vectors_DR.T @ (x_D.double() - components.mean_D)
    a_D[d:] = 0
    for i, xi in enumerate(xi_m.tolist()):
        a_D[d + i] = scale * components.values_R[d + i].sqrt() * xi
    return components.vectors_DR @ a_D + components.mean_D


@pytest.mark.parametrize("mode", ["pca", "noise"])
def test_it_is_algorithm_1(mode: str, dataset: Dataset, components: Components) -> None:
    modify = PCANoise(PCANoiseConfig(mode=mode, dims=12, noise_dims=5, scale=3.0), components, CPU)
    images_NCHW, _ = dataset.images()
    x_BCHW = images_NCHW[:6].float() / 255
    xi_Bm = torch.randn(6, modify.n_noise)
    found_BCHW = modify(x_BCHW, xi_Bm)
    for x_CHW, xi_m, found_CHW in zip(x_BCHW, xi_Bm, found_BCHW, strict=True):
        expected_D = algorithm_1(x_CHW.flatten(), xi_m, 12, 3.0, components)
        torch.testing.assert_close(found_CHW.flatten().double(), expected_D, rtol=1e-4, atol=1e-5)


def test_noise_has_the_scale_that_was_asked_for_and_leaves_the_kept_components(
    dataset: Dataset, components: Components
) -> None:
    modify = PCANoise(PCANoiseConfig(dims=10, noise_dims=4, scale=10.0), components, CPU)
    x_BCHW = (dataset.images()[0][:1].float() / 255).expand(4000, -1, -1, -1)
    xi_Bm = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    a_BR = (modify(x_BCHW, xi_Bm).flatten(1).double() - components.mean_D) @ components.vectors_DR
    before_R = (x_BCHW[0].flatten().double() - components.mean_D) @ components.vectors_DR
    torch.testing.assert_close(a_BR[:, :10], before_R[:10].expand(4000, -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(a_BR[:, 10:14].std(0), 10 * components.values_R[10:14].sqrt(), rtol=0.05, atol=0)
    assert a_BR[:, 14:].abs().max() < 1e-4


def test_dimensions_by_energy(components: Components) -> None:
    modify = PCANoise(PCANoiseConfig(mode="pca", energy=0.9), components, CPU)
    assert components.energy(modify.dims - 1) < 0.9 <= components.energy(modify.dims)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either dims"),
        ({"dims": 3, "energy": 0.5}, "give either dims"),
        ({"dims": 10_000}, "components, but there are"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str, components: Components) -> None:
    with pytest.raises(ConfigError, match=message):
        PCANoise(PCANoiseConfig(**settings), components, CPU)


def test_shards_have_the_modified_images_and_all_else_as_it_was(
    dataset: Dataset,
    pca: PCA,
    compute: Compute,
    tmp_path: Path,
    read_tar: Callable[..., list[tuple[str, bytes]]],
) -> None:
    config = DenoiseConfig(dims=10, noise_dims=4, member="npy")
    exact = denoise_shards(config, pca, dataset, str(tmp_path / "npy"), compute)
    clipped = denoise_shards(config.model_copy(update={"member": "png"}), pca, dataset, str(tmp_path / "png"), compute)
    modify = PCANoise(config, pca.components, CPU)
    for shard in dataset.shards:
        before, npys, pngs = (
            dict(read_tar(path))
            for path in (dataset.urls[shard], exact.file(f"shards/{shard}"), clipped.file(f"shards/{shard}"))
        )
        rows = {row["key"]: row for row in dataset.rows(shard).to_pylist()}
        for name, data in before.items():
            key, _, suffix = name.partition(".")
            if suffix == "cls":
                assert npys[name] == pngs[name] == data
                continue
            image_CHW = np.load(io.BytesIO(npys[f"{key}.npy"]), allow_pickle=False)
            pixels_HWC = np.asarray(Image.open(io.BytesIO(pngs[f"{key}.png"])).convert("RGB"))
            np.testing.assert_array_equal(
                pixels_HWC.transpose(2, 0, 1), image_CHW.round().clip(0, 255).astype(np.uint8)
            )
        last = rows[key]
        xi_1m = torch.randn(1, 4, generator=compute.generator("denoise", shard, last["key"], last["position"]))
        original_CHW = torch.from_numpy(np.array(Image.open(io.BytesIO(before[last["image"]])).convert("RGB"))).permute(
            2, 0, 1
        )
        expected_CHW = 255 * modify(original_CHW[None].float() / 255, xi_1m)[0]
        np.testing.assert_allclose(image_CHW, expected_CHW.numpy(), atol=1e-3)


def test_order_of_shards_and_workers_change_no_byte(
    dataset: Dataset, pca: PCA, compute: Compute, tmp_path: Path
) -> None:
    config = DenoiseConfig(dims=10)
    whole = denoise_shards(config, pca, dataset, str(tmp_path / "whole"), compute)
    for shard in reversed(dataset.shards):
        denoise_shards(config, pca, dataset, str(tmp_path / "parts"), compute, shards=[shard])
    parts = denoise_shards(config, pca, dataset, str(tmp_path / "parts"), compute)
    assert parts.digest == whole.digest
    other = denoise_shards(config, pca, dataset, str(tmp_path / "other"), Compute(device="cpu", seed=1))
    assert read_manifest(other.path).files != read_manifest(whole.path).files
