"""Principal components of the images of a data set, in one or a few passes over its shards.

Up to 8,192 pixels, the covariance matrix is accumulated and decomposed exactly. Beyond that, its product with a
block of random directions is accumulated instead (randomised subspace iteration: Halko, Martinsson & Tropp, SIAM Review
2011, Algorithm 4.4), once a pass. Pixels are on [0, 1]. Shapes: B images of a batch, D = C H W pixels, R components.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.errors import ArtifactError, ConfigError
from sanitize.plural import counted
from sanitize.progress import track
from sanitize.stage import Work, stage
from sanitize.streaming import Moments

MAX_EXACT = 8_192  # pixels; the matrix takes 512 MiB, and its eigenvectors minutes
_ROWS = 2_048  # images in one matrix product: the sums are read and written once for all of them


class PCAConfig(BaseModel):
    """Number of components and their estimate.

    Attributes:
        n_components: number of estimated components for images beyond 8,192 pixels; smaller images have all components.
        n_passes: passes over the shards for the estimate.
        oversampling: number of additional directions, dropped at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_components: int = Field(default=512, ge=1)
    n_passes: int = Field(default=4, ge=2)
    oversampling: int = Field(default=32, ge=0)


class Components(NamedTuple):
    """Principal components of images; float64.

    Attributes:
        mean_D: the mean image.
        values_R: variances along the components, descending.
        vectors_DR: the components, orthonormal, each with its largest entry positive.
        total: summed variance of all pixels, a scalar.
    """

    mean_D: Tensor
    values_R: Tensor
    vectors_DR: Tensor
    total: Tensor

    def energy(self, d: int) -> float:
        """Share of the variance in the first d components."""
        return float(self.values_R[:d].sum() / self.total)

    def dimensions(self, energy: float) -> int:
        """Smallest number of components with this share of the variance. Raises ConfigError if all have less."""
        shares_R = self.values_R.cumsum(0) / self.total
        d = int((shares_R < energy).sum()) + 1
        if d > len(shares_R):
            raise ConfigError(
                f"{len(shares_R)} components have {float(shares_R[-1]):.4f} of the variance, not {energy}: lower "
                "energy, or raise n_components"
            )
        return d


class PCA(Artifact):
    """`pca.safetensors`: `Components` of the images of a data set."""

    @cached_property
    def components(self) -> Components:
        """The components. Raises ArtifactError if the file does not hold finite components."""
        names = Components._fields
        tensors = self.read_tensors("pca.safetensors", *names)
        found = Components(**{name: tensors[name] for name in names})
        n_pixels, n = found.vectors_DR.shape if found.vectors_DR.ndim == 2 else (0, -1)
        wanted = ((n_pixels,), (n,), (n_pixels, n), ())
        if tuple(tuple(t.shape) for t in found) != wanted or not all(t.isfinite().all() for t in found):
            raise ArtifactError(f"{self.path} does not hold finite principal components")
        return found


@stage(PCA, gpu=False)
def fit_pca(config: PCAConfig, dataset: Dataset, out: str, compute: Compute) -> Work:
    """Principal components of the usable images of a data set.

    Args:
        config: number of components and passes.
        dataset: the images.
        out: folder of the artifact.
        compute: seed of the random directions.

    Raises:
        ConfigError: the data set has fewer than two images.
    """
    if dataset.n_samples < 2:
        raise ConfigError(f"{dataset.path} has {counted(dataset.n_samples, 'usable image')}: at least two are needed")
    n_pixels = torch.Size(dataset.image_shape).numel()

    def write(part: Part) -> None:
        n_passes = 1 if n_pixels <= MAX_EXACT else config.n_passes
        with track("components", n_passes * dataset.n_samples) as advance:

            def one_pass() -> Iterable[Tensor]:
                for batch in dataset.batches(_ROWS):
                    yield batch.images_BCHW.flatten(1).double() / 255
                    advance(len(batch.keys))

            if n_pixels <= MAX_EXACT:
                found = exact_components(one_pass(), n_pixels)
            else:
                found = estimated_components(one_pass, n_pixels, config, compute.generator("pca"))
        part.write("pca.safetensors", safetensors.torch.save(found._asdict()))
        part.counts.update(samples=dataset.n_samples)

    return Work(write=write)


def exact_components(batches: Iterable[Tensor], n_pixels: int) -> Components:
    """All components of rows (B, D), float64."""
    moments = Moments(n_pixels)
    for x_BD in batches:
        moments.update(x_BD)
    values_D, vectors_DD = torch.linalg.eigh(moments.covariance(ddof=0))
    values_D, vectors_DD = values_D.flip(0).clamp(min=0), vectors_DD.flip(1)
    return _components(moments.mean_D, values_D, vectors_DD, values_D.sum())


class CovarianceProduct:
    """The covariance of rows times a matrix, without the covariance; mergeable.

    Args:
        directions_DR: the matrix, float64.

    Attributes:
        count: rows seen.
        sum_D: their sum.
        product_DR: sum of x (x^T directions).
        squares: sum of the squares of all entries.
    """

    def __init__(self, directions_DR: Tensor) -> None:
        self.directions_DR = directions_DR
        self.count = 0
        self.sum_D = torch.zeros(len(directions_DR), dtype=torch.float64)
        self.product_DR = torch.zeros_like(directions_DR)
        self.squares = torch.zeros((), dtype=torch.float64)

    def update(self, x_BD: Tensor) -> None:
        """Add rows (B, D), float64."""
        self.count += len(x_BD)
        self.sum_D = self.sum_D + x_BD.sum(0)
        self.product_DR.addmm_(x_BD.T, x_BD @ self.directions_DR)
        self.squares = self.squares + x_BD.square().sum()

    def merge(self, other: Self) -> None:
        """Add the rows of `other`, which has the same directions."""
        self.count += other.count
        self.sum_D = self.sum_D + other.sum_D
        self.product_DR += other.product_DR
        self.squares = self.squares + other.squares

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and the directions, lossless."""
        state = {"directions": self.directions_DR, "sum": self.sum_D, "product": self.product_DR}
        return state | {"count": torch.tensor(self.count), "squares": self.squares}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        product = cls(state["directions"].clone())
        product.count = int(state["count"])
        product.sum_D, product.product_DR = state["sum"].clone(), state["product"].clone()
        product.squares = state["squares"].clone()
        return product

    @property
    def mean_D(self) -> Tensor:
        """Mean of the rows."""
        return self.sum_D / self.count

    @property
    def total(self) -> Tensor:
        """Variance of the rows, summed over entries."""
        return self.squares / self.count - self.mean_D.square().sum()

    def value(self) -> Tensor:
        """Covariance times directions (D, R)."""
        return self.product_DR / self.count - torch.outer(self.mean_D, self.mean_D @ self.directions_DR)


def estimated_components(
    passes: Callable[[], Iterable[Tensor]], n_pixels: int, config: PCAConfig, generator: torch.Generator
) -> Components:
    """The leading components, estimated by subspace iteration.

    Each pass multiplies the block by the covariance once. The components are the eigenvectors of the covariance within
    the last block (Rayleigh & Ritz).
    """
    n_directions = min(config.n_components + config.oversampling, n_pixels)
    block_DR = torch.randn(n_pixels, n_directions, generator=generator, dtype=torch.float64)
    for _ in range(config.n_passes):
        block_DR = torch.linalg.qr(block_DR).Q
        product = CovarianceProduct(block_DR)
        for x_BD in passes():
            product.update(x_BD)
        inside_DR, block_DR = block_DR, product.value()
    values_R, turn_RR = torch.linalg.eigh(inside_DR.T @ block_DR)
    keep = slice(0, config.n_components)
    values_R, vectors_DR = values_R.flip(0).clamp(min=0)[keep], (inside_DR @ turn_RR.flip(1))[:, keep]
    return _components(product.mean_D, values_R, vectors_DR, product.total)


def _components(mean_D: Tensor, values_R: Tensor, vectors_DR: Tensor, total: Tensor) -> Components:
    # The sign of a component is arbitrary: the largest entry is made positive, for reproducible bytes.
    largest_R = vectors_DR.gather(0, vectors_DR.abs().argmax(0, keepdim=True))[0]
    vectors_DR = vectors_DR * torch.where(largest_R < 0, -1.0, 1.0)
    return Components(mean_D, values_R.contiguous(), vectors_DR.contiguous(), total)
