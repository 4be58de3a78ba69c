"""Principal components against scikit-learn's, exact and estimated, in one piece and in many."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.denoising import Components, PCAConfig, fit_pca
from sanitize.denoising.pca import CovarianceProduct, estimated_components, exact_components
from sanitize.errors import ConfigError


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Rows whose spectrum falls off as that of images does, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    turn_DD = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scale_D = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale_D @ turn_DD + 3.0


def angle(one_DR: Tensor, other_DR: Tensor) -> float:
    """Largest principal angle between two subspaces, in radians."""
    return float(torch.linalg.matrix_norm(one_DR - other_DR @ (other_DR.T @ one_DR), 2).clamp(max=1).asin())


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_exact_components_are_those_of_scikit_learn(batch_size: int) -> None:
    x_ND = rows(500, 30)
    found = exact_components(iter(x_ND.split(batch_size)), 30)
    theirs = PCA(svd_solver="full").fit(x_ND.numpy())
    torch.testing.assert_close(found.mean_D, torch.from_numpy(theirs.mean_), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.values_R * 500 / 499, torch.from_numpy(theirs.explained_variance_))
    for d in (1, 5, 29):
        assert angle(found.vectors_DR[:, :d], torch.from_numpy(theirs.components_[:d]).T) < 1e-6
    largest_D = found.vectors_DR.abs().argmax(0)
    assert (found.vectors_DR.gather(0, largest_D[None]) > 0).all()


def test_estimated_components_hold_what_the_exact_ones_do(compute: Compute) -> None:
    x_ND = rows(2000, 200)
    exact = exact_components([x_ND], 200)
    config = PCAConfig(n_components=20, oversampling=10, n_passes=4)
    n_passes = 0

    def one_pass() -> Iterable[Tensor]:
        nonlocal n_passes
        n_passes += 1
        return x_ND.split(300)

    found = estimated_components(one_pass, 200, config, compute.generator("test"))
    assert n_passes == 4
    assert found.vectors_DR.shape == (200, 20)
    torch.testing.assert_close(found.vectors_DR.T @ found.vectors_DR, torch.eye(20, dtype=torch.float64))
    centred_ND = x_ND - x_ND.mean(0)
    held = (centred_ND @ found.vectors_DR).square().mean(0).sum()
    assert held / exact.values_R[:20].sum() > 0.995
    torch.testing.assert_close(found.total, exact.values_R.sum())
    torch.testing.assert_close(found.values_R[:5], exact.values_R[:5], rtol=1e-3, atol=0)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_products_merge_to_what_one_pass_gives(seed: int, cut: int) -> None:
    x_ND = rows(41, 9, seed)
    directions_DR = rows(9, 4, seed + 1)
    whole, one, other = (CovarianceProduct(directions_DR) for _ in range(3))
    whole.update(x_ND)
    one.update(x_ND[:cut])
    other.update(x_ND[cut:])
    one.merge(CovarianceProduct.from_state_dict(other.state_dict()))
    torch.testing.assert_close(one.value(), whole.value(), rtol=1e-9, atol=1e-9)
    covariance_DD = x_ND.T.cov(correction=0)
    torch.testing.assert_close(whole.value(), covariance_DD @ directions_DR, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.total, covariance_DD.trace(), rtol=1e-9, atol=1e-9)


def test_components_of_shards(dataset: Dataset, components: Components) -> None:
    images_NCHW, _ = dataset.images()
    x_ND = images_NCHW.flatten(1).double() / 255
    torch.testing.assert_close(components.mean_D, x_ND.mean(0))
    assert components.energy(64 * dataset.image_shape[0]) == pytest.approx(1)
    d = components.dimensions(0.9)
    assert components.energy(d - 1) < 0.9 <= components.energy(d)


def test_more_energy_than_the_components_have_is_refused(components: Components) -> None:
    with pytest.raises(ConfigError, match=r"of the variance, not 1\.5"):
        components.dimensions(1.5)


def test_beyond_the_limit_components_are_estimated(
    dataset: Dataset,
    components: Components,
    compute: Compute,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sanitize.denoising.pca.MAX_EXACT", 10)
    estimated = fit_pca(PCAConfig(n_components=8), dataset, str(tmp_path / "pca"), compute).components
    assert len(estimated.values_R) == 8
    assert estimated.energy(8) == pytest.approx(components.energy(8), rel=1e-3)
    assert angle(estimated.vectors_DR[:, :3], components.vectors_DR[:, :3]) < 1e-3
