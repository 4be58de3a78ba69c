"""Training images without their small-scale features."""

from sanitize.denoising.pca import PCA, Components, PCAConfig, fit_pca
from sanitize.denoising.pca_noise import PCANoise, PCANoiseConfig
from sanitize.denoising.stage import DenoiseConfig, Denoised, denoise_shards

__all__ = [
    "PCA",
    "Components",
    "DenoiseConfig",
    "Denoised",
    "PCAConfig",
    "PCANoise",
    "PCANoiseConfig",
    "denoise_shards",
    "fit_pca",
]
