"""Components of the digits."""

from pathlib import Path

import pytest

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.denoise import Components, PCAConfig, fit_pca


@pytest.fixture(scope="session")
def components(home: Path, dataset: Dataset, compute: Compute) -> Components:
    return fit_pca(PCAConfig(), dataset, str(home / "components"), compute)
