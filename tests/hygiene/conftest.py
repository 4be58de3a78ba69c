import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter


@pytest.fixture(scope="session")
def scene() -> Callable[..., Image.Image]:
    """A picture of smooth shapes with edges, another one for every seed: scene(seed, size=(H, W))."""

    def make(seed: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
        rng = np.random.default_rng(seed)
        height, width = size
        low = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), 3)
        pixels = np.array(low).astype(float)
        for _ in range(8):
            top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
            pixels[top : top + rng.integers(3, height // 2), left : left + rng.integers(3, width // 2)] = rng.integers(
                0, 256, 3
            )
        pixels += rng.normal(0, 4, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))

    return make


@pytest.fixture(scope="session")
def stored() -> Callable[..., bytes]:
    """An image as a file: stored(image, format="PNG", **options)."""

    def encode(image: Image.Image, format: str = "PNG", **options: int) -> bytes:
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    return encode
