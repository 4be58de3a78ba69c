"""Adap-Blend (Qi et al., 2023, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", section 4):
a blended pattern cut into pieces. Each training image has random pieces of it, at test time an image has all of them;
cover samples have random pieces and their true label.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.attack.attack import Fraction, Poison
from sanitize.attack.blended import NoiseTrigger, blend
from sanitize.attack.size import Size
from sanitize.compute import Compute


class AdaptiveBlendConfig(NoiseTrigger):
    """Noise blended into random pieces of an image.

    Attributes:
        alpha: weight of the pattern while training, in (0, 1].
        test_alpha: weight of the pattern at test time, in (0, 1].
        pieces: pieces along each side of the image.
        kept: pieces with the pattern in a training image, as a share of all pieces; at least one.
        cover_rate: as for `Trigger`; by default as many cover samples as poisoned ones.
    """

    added: ClassVar[tuple[str, ...]] = ()

    kind: Literal["adaptive_blend"] = "adaptive_blend"
    alpha: float = Field(default=0.15, gt=0, le=1)
    test_alpha: float = Field(default=0.2, gt=0, le=1)
    pieces: int = Field(default=4, ge=1, le=64)
    kept: float = Field(default=0.5, gt=0, le=1)
    grain: Size = 0.04
    cover_rate: Fraction | None = None

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the whole pattern, as at test time."""
        return blend(images_BCHW, self.pattern(images_BCHW.shape[1:]), self.test_alpha)

    def build(self, surrogate: nn.Module | None, compute: Compute) -> Poison:
        """Blend random pieces of the pattern into each image, drawn from its own seed."""

        def poison(images_BCHW: Tensor, _labels_B: Tensor, seeds: Sequence[int]) -> Tensor:
            blended_BCHW = blend(images_BCHW, self.pattern(images_BCHW.shape[1:]), self.alpha)
            height, width = images_BCHW.shape[2:]
            has_pattern_B1HW = torch.stack([self._mask(seed, height, width) for seed in seeds])[:, None]
            return torch.where(has_pattern_B1HW.to(images_BCHW.device), blended_BCHW, images_BCHW)

        return poison

    def _mask(self, seed: int, height: int, width: int) -> Tensor:
        """True where a training image has the pattern, (H, W)."""
        n = self.pieces
        is_kept_N = torch.zeros(n * n, dtype=torch.bool)
        order_N = torch.randperm(n * n, generator=torch.Generator().manual_seed(seed))
        is_kept_N[order_N[: max(1, round(self.kept * n * n))]] = True
        row_H, column_W = (torch.arange(size) * n // size for size in (height, width))
        return is_kept_N.view(n, n)[row_H[:, None], column_W]
