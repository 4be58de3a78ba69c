"""Components of the digits."""

from pathlib import Path

import pytest

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.denoising import PCA, Components, PCAConfig, fit_pca


@pytest.fixture(scope="session")
def pca(home: Path, dataset: Dataset, compute: Compute) -> PCA:
    return fit_pca(PCAConfig(), dataset, str(home / "pca"), compute)


@pytest.fixture(scope="session")
def components(pca: PCA) -> Components:
    return pca.components
