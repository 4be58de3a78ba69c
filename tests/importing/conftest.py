"""Small sources."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write files below a folder: write({"cat/1.png": b"..."}, "photos")."""

    def files(given: dict[str, bytes], name: str = "source") -> Path:
        for path, data in given.items():
            place = tmp_path / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        return tmp_path / name

    return files


@pytest.fixture
def photos(make_png: Callable[..., bytes]) -> dict[str, bytes]:
    """Thirty images of three classes."""
    return {
        f"{name}/{i:02d}.png": make_png(10 * k + i) for k, name in enumerate(("ant", "bee", "cat")) for i in range(10)
    }
