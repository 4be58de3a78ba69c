"""PCA-noise: training images with noise in place of their small-scale features (Li, Cheng, Su & Zhu,
"Defense Against Adversarial Attacks via Controlling Gradient Leaking on Embedded Manifolds", Algorithm 1).

An undefended network relies on directions in which the data hardly vary, and small perturbations along these change its
predictions. Of a = V^T (x - mean), the first d components are kept; the next m become c sqrt(lambda_i) xi with
xi ~ N(0, 1); the rest become zero; x' = V a + mean. Images to classify are not changed.

Shapes: B images, D = C H W pixels on [0, 1].
"""

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.denoising.pca import Components
from sanitize.errors import ConfigError


class PCANoiseConfig(BaseModel):
    """Components that are kept, and the noise.

    Attributes:
        mode: pca sets the other components to zero; noise replaces `noise_dims` of them by noise.
        dims: d, number of kept components; give dims or energy.
        energy: share of the variance in the kept components; .9685 keeps 300 of CIFAR-10.
        noise_dims: m, number of components that become noise.
        scale: c, standard deviation of the noise as a multiple of that of the component.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["pca", "noise"] = "noise"
    dims: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    noise_dims: int = Field(default=10, ge=1)
    scale: float = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def _dimension_is_given_once(self) -> Self:
        if (self.dims is None) == (self.energy is None):
            raise ConfigError("denoise: give either dims (a number of components) or energy (a share of the variance)")
        return self


class PCANoise:
    """Algorithm 1 with fitted components.

    Args:
        config: kept components and noise.
        components: principal components of the training images.
        device: device of the images.

    Attributes:
        dims: d.

    Raises:
        ConfigError: the configuration needs more components than there are.
    """

    def __init__(self, config: PCANoiseConfig, components: Components, device: torch.device) -> None:
        self.dims = config.dims or components.dimensions(config.energy or 1.0)
        self.n_noise = config.noise_dims if config.mode == "noise" else 0
        wanted, there = self.dims + self.n_noise, len(components.values_R)
        if wanted > there:
            raise ConfigError(f"denoise needs {self.dims} + {self.n_noise} components, but there are {there}")
        vectors_DR = components.vectors_DR[:, :wanted].to(device, torch.float32)
        deviations_R = components.values_R[:wanted].sqrt().to(device, torch.float32)
        self._mean_D = components.mean_D.to(device, torch.float32)
        self._kept_Dd = vectors_DR[:, : self.dims].contiguous()
        self._noise_mD = (config.scale * deviations_R * vectors_DR)[:, self.dims :].T.contiguous()

    def __call__(self, x_BCHW: Tensor, xi_Bm: Tensor) -> Tensor:
        """Modified images, float32, not clipped to [0, 1].

        Args:
            x_BCHW: images, float32 on [0, 1].
            xi_Bm: standard normal draws, one row an image, `n_noise` columns.
        """
        x_BD = x_BCHW.flatten(1)
        kept_BD = (x_BD - self._mean_D) @ self._kept_Dd @ self._kept_Dd.T + self._mean_D
        return torch.addmm(kept_BD, xi_Bm, self._noise_mD).view_as(x_BCHW)
