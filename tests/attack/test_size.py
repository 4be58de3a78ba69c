"""A size as a share of the image means the same at any resolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sanitize.attack import (
    AdaptiveBlendConfig,
    BadNetsConfig,
    BlendedConfig,
    CleanLabelConfig,
    L0Config,
    SIGConfig,
    SmoothConfig,
    TaCTConfig,
    Trigger,
    TrojanSquareConfig,
    TrojanWatermarkConfig,
    WaNetConfig,
)
from sanitize.attack.size import draw, grid, spread

corners = st.sampled_from(["top-left", "top-right", "bottom-left", "bottom-right"])
patterns = st.sampled_from(["checkerboard", "white"])
sizes = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**63 - 1)
rate = st.just(0.1)
# Drawn on cells: at two resolutions they differ by the rounding of levels alone.
DRAWN = st.one_of(
    st.builds(BadNetsConfig, rate=rate, size=sizes, corner=corners, pattern=patterns),
    st.builds(TaCTConfig, rate=rate, size=sizes, corner=corners, pattern=patterns),
    st.builds(CleanLabelConfig, rate=rate, size=st.floats(0.01, 0.4)),  # larger patches overlap
    st.builds(TrojanSquareConfig, rate=rate, side=sizes, pattern_seed=seeds, cells=st.integers(1, 8)),
    st.builds(BlendedConfig, rate=rate, grain=st.floats(0.1, 0.99), noise=st.sampled_from(["uniform", "gaussian"])),
    st.builds(AdaptiveBlendConfig, rate=rate, grain=st.floats(0.1, 0.99), pattern_seed=seeds),
    st.builds(L0Config, rate=rate, size=st.floats(0.1, 0.99), n_pixels=st.integers(1, 9), pattern_seed=seeds),
)
SMOOTH = [  # at any setting; they are sampled, so that two resolutions differ a little everywhere, or at edges
    (WaNetConfig(rate=0.1), 2.0),
    (WaNetConfig(rate=0.1, grid=6, strength=2), 2.0),
    (SmoothConfig(rate=0.1), 2.0),
    (TrojanWatermarkConfig(rate=0.1), 5.0),
]


def enlarged(images: Tensor, factor: int) -> Tensor:
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def scaled(images: Tensor, factor: int) -> Tensor:
    return nn.functional.avg_pool2d(images.double(), factor)


@given(
    trigger=DRAWN,
    height=st.integers(10, 40),
    width=st.integers(10, 40),
    factor=st.integers(2, 5),
    level=st.integers(0, 255),
)
@settings(deadline=None, max_examples=150)
def test_a_trigger_of_a_share_is_the_same_at_two_resolutions(
    trigger: Trigger, height: int, width: int, factor: int, level: int
) -> None:
    images = torch.full((1, 3, height, width), level, dtype=torch.uint8)
    low, high = trigger.apply(images), trigger.apply(enlarged(images, factor))
    assert (scaled(high, factor) - low).abs().max() <= (4 if isinstance(trigger, CleanLabelConfig) else 1) + 1e-6


@pytest.mark.parametrize(("trigger", "tolerance"), SMOOTH)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_triggers_all_over_the_image_are_nearly_the_same_at_two_resolutions(
    trigger: Trigger, tolerance: float, factor: int
) -> None:
    side = 32 * factor
    ramp = torch.linspace(30, 220, side)[:, None] * 0.5 + torch.linspace(30, 220, side) * 0.5
    high = ramp.round().to(torch.uint8).expand(1, 1, side, side).contiguous()
    low = scaled(high, factor).round().to(torch.uint8)
    moved = (trigger.apply(low).double() - low.double()).abs().mean()
    difference = (scaled(trigger.apply(high), factor) - trigger.apply(low)).abs().mean()
    assert difference < tolerance
    assert difference < moved / 2


@pytest.mark.parametrize("factor", [2, 3, 18])
def test_sig_has_the_same_level_at_the_same_place(factor: int) -> None:
    images = torch.full((1, 1, 4, 28), 128, dtype=torch.uint8)
    trigger = SIGConfig(rate=0.1)
    assert torch.equal(trigger.apply(enlarged(images, factor))[..., ::factor, ::factor], trigger.apply(images))


@given(size=st.integers(1, 10_000), height=st.integers(1, 20), width=st.integers(1, 20))
@settings(deadline=None)
def test_cells_of_whole_pixels_tile_the_image(size: int, height: int, width: int) -> None:
    rows, columns = grid(size, height, width)
    cells_1rc = torch.arange(rows * columns).view(1, rows, columns)
    image_1HW = spread(cells_1rc, size, height, width)
    wanted = [[cells_1rc[0, i // size, j // size] for j in range(width)] for i in range(height)]
    assert torch.equal(image_1HW[0], torch.tensor(wanted))


@given(share=st.floats(0.002, 0.999), height=st.integers(1, 50), width=st.integers(1, 50))
@settings(deadline=None)
def test_cells_of_a_share_cover_each_pixel_once(share: float, height: int, width: int) -> None:
    rows, columns = grid(share, height, width)
    assert rows <= height
    assert columns <= width
    ones_1HW = spread(torch.ones(1, rows, columns), share, height, width)
    torch.testing.assert_close(ones_1HW, torch.ones(1, height, width, dtype=torch.float64))


@given(
    side=st.floats(0.1, 12),
    top=st.floats(-3, 9),
    left=st.floats(-3, 9),
    cells=st.integers(1, 4),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_a_pixel_has_the_mean_colour_below_it(side: float, top: float, left: float, cells: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (1, 1, 7, 9), dtype=torch.uint8, generator=generator)
    colours = torch.randint(256, (cells, cells), generator=generator)
    out = draw(image, colours, top, left, side)
    n = 40  # points along a side of a pixel
    points_Y, points_X = ((torch.arange(size * n) + 0.5) / n for size in (7, 9))
    row_Y, column_X = (
        ((points_Y - top) / side * cells).floor().long(),
        ((points_X - left) / side * cells).floor().long(),
    )
    inside_YX = ((row_Y >= 0) & (row_Y < cells))[:, None] & ((column_X >= 0) & (column_X < cells))
    drawn_YX = colours[row_Y.clamp(0, cells - 1)[:, None], column_X.clamp(0, cells - 1)]
    fine = torch.where(inside_YX, drawn_YX, enlarged(image, n)[0, 0])
    assert (scaled(fine[None, None], n) - out).abs().max() <= 0.5 + 2 * 255 / n * (1 + cells)


def test_a_share_reaches_the_same_size_as_its_pixels() -> None:
    black = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    pixels = BadNetsConfig(rate=0.1, size=3, pattern="white").apply(black)
    assert torch.equal(BadNetsConfig(rate=0.1, size=3 / 32, pattern="white").apply(black), pixels)
