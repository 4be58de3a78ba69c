"""Are the principal components of streamed shards those of the whole matrix, and what do they cost? CIFAR-10.

    python -m benchmarks.pca [--json FILE]     minutes on 2 cores

Exact: `fit_pca` on ten shards, 50,000 images of 3,072 pixels, against scikit-learn's PCA of the matrix. Estimated:
5,000 images enlarged to 64 x 64, 12,288 pixels, 512 components in 4 passes; the exact energy comes from their Gram
matrix, which is smaller than their covariance. Targets: the first 300 exact components span scikit-learn's to 1e-6
(largest principal angle, radians); the estimated ones hold at least 99.5 % of the energy of the exact ones. Time and
peak memory are those of `fit_pca` in a process of its own, with the decoding of the images. Exits with 1 where a
target is missed.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA as ReferencePCA
from torch import Tensor

from benchmarks.data import SHARED
from benchmarks.memory import status
from benchmarks.report import conclude, print_table
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.index import IndexConfig, index_shards
from sanitize.denoising import PCA, PCAConfig, fit_pca

DIMS, ANGLE, ENERGY = 300, 1e-6, 0.995


def fitted(shards: list[str], size: int, out: str) -> dict[str, float]:
    """Index, fit, and what the fit cost; run in a fresh process."""
    compute = Compute(device="cpu")
    config = IndexConfig(n_classes=10, image=ImageConfig(size=(size, size)))
    dataset = index_shards(config, shards, f"{out}/index", compute)
    before = status("VmHWM")
    start, cpu = time.perf_counter(), time.process_time()
    fit_pca(PCAConfig(), dataset, f"{out}/pca", compute)
    return {
        "images": dataset.n_samples,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "mib_before": before,
        "peak_mib": status("VmHWM"),
    }


def matrix(out: str) -> np.ndarray:
    """All images as rows of float64 on [0, 1]."""
    images_NCHW, _ = Dataset.load(f"{out}/index").images()
    return images_NCHW.flatten(1).double().numpy() / 255


def angle(one_DR: Tensor, other_DR: Tensor) -> float:
    """Largest principal angle between two subspaces, in radians."""
    return float(torch.linalg.matrix_norm(one_DR - other_DR @ (other_DR.T @ one_DR), 2).clamp(max=1).asin())


def exact(folder: Path) -> dict[str, Any]:
    """Against scikit-learn."""
    shards = sorted(map(str, (SHARED / "cifar10").glob("train-*.tar.gz")))
    cost = _alone(fitted, shards, 32, str(folder))
    reference = ReferencePCA(DIMS, svd_solver="covariance_eigh").fit(matrix(str(folder)))
    found = PCA.load(folder / "pca").components
    return cost | {"angle": angle(found.vectors_DR[:, :DIMS], torch.from_numpy(reference.components_).T)}


def estimated(folder: Path) -> dict[str, Any]:
    """Against the eigenvalues of the Gram matrix."""
    shards = [str(SHARED / "cifar10" / "test-000000.tar.gz")]
    cost = _alone(fitted, shards, 64, str(folder))
    found = PCA.load(folder / "pca").components
    x_ND = torch.from_numpy(matrix(str(folder)))
    centred_ND = x_ND - x_ND.mean(0)
    values_N = torch.linalg.eigvalsh(centred_ND @ centred_ND.T).flip(0)
    held = (centred_ND @ found.vectors_DR).square().sum()
    return cost | {"energy": float(held / values_N[: found.vectors_DR.shape[1]].sum())}


def _alone(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"components": "exact, 3,072 pixels"} | exact(Path(folder) / "exact"),
            {"components": "estimated, 12,288 pixels"} | estimated(Path(folder) / "estimated"),
        ]
    columns = ["components", "images", "seconds", "cpu_seconds", "mib_before", "peak_mib", "angle", "energy"]
    print_table(rows, columns, "principal components of shards")
    missed = [
        f"{name} {sign} {target}, got {got}"
        for name, sign, target, got, is_met in (
            ("angle", "<", ANGLE, rows[0]["angle"], rows[0]["angle"] < ANGLE),
            ("energy", ">=", ENERGY, rows[1]["energy"], rows[1]["energy"] >= ENERGY),
        )
        if not is_met
    ]
    conclude(missed, arguments.json, start, rows=rows)


if __name__ == "__main__":
    main()
