"""PCA-noise: training images without their small-scale features, and noise where those were (Li, Cheng, Su & Zhu,
"Defense Against Adversarial Attacks via Controlling Gradient Leaking on Embedded Manifolds", Algorithm 1).

A network that may use any direction leans on directions in which the data hardly vary, and small perturbations along
these change its mind. Of a = V^T (x - mean) the first d components are kept; the next m become c sqrt(lambda_i) xi with
xi ~ N(0, 1); the rest become zero; x' = V a + mean. Images to classify are never touched.

Shapes: B images, D = C H W pixels on [0, 1].
"""

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.denoise.pca import Components
from sanitize.errors import ConfigError


class PCANoiseConfig(BaseModel):
    """What is kept, and what is put in place of the rest.

    Attributes:
        mode: pca leaves nothing in place of the rest; noise, noise.
        dims: d, components that are kept; or
        energy: the share of all variance that those kept have: .9685 is 300 of CIFAR-10's.
        noise_dims: m, components that become noise.
        scale: c, their standard deviation as a multiple of what it was.
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
            raise ConfigError("denoise: give one of dims (a number of components) and energy (a share of the variance)")
        return self


class PCANoise:
    """Algorithm 1 with fitted components.

    Args:
        config: what is kept and what becomes noise.
        components: of the training images.
        device: where images will be.

    Attributes:
        dims: d.

    Raises:
        ConfigError: there are fewer components than the configuration asks for.
    """

    def __init__(self, config: PCANoiseConfig, components: Components, device: torch.device) -> None:
        self.dims = config.dims or components.dimensions(config.energy or 1.0)
        self.n_noise = config.noise_dims if config.mode == "noise" else 0
        wanted, there = self.dims + self.n_noise, len(components.values_R)
        if wanted > there:
            raise ConfigError(f"denoise: {self.dims} + {self.n_noise} components are asked for, there are {there}")
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
