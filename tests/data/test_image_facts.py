import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sanitize.data.image_facts import ALIKE, SIDE, ImageFacts, ReducedImage, describe, flat_rows, reduced

SIDES = st.integers(1, 90)
CHANNELS = st.sampled_from([1, 3])


def picture(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@given(height=SIDES, width=SIDES, channels=CHANNELS, seed=st.integers(0, 9))
@settings(max_examples=15)
def test_a_reduced_pixel_is_the_sum_of_three_by_three(height: int, width: int, channels: int, seed: int) -> None:
    pixels_HWC = picture(height, width, channels, seed)
    kept = reduced(pixels_HWC)
    if not isinstance(kept, ReducedImage):
        assert (height, width) == (SIDE, SIDE)
        assert kept is pixels_HWC
        return
    sums_SX, details_SX, _ = kept
    rows, columns = ([int((i + 0.5) * side / 96) for i in range(96)] for side in (height, width))
    found = sums_SX.reshape(SIDE, channels, SIDE)
    for y, x, c in ((0, 0, 0), (31, 31, channels - 1), (7, 19, 0), (20, 3, channels - 1)):
        wanted = sum(int(pixels_HWC[rows[3 * y + a], columns[3 * x + b], c]) for a in range(3) for b in range(3))
        assert found[y, c, x] == wanted
    assert set(details_SX.ravel().tolist()) <= set(pixels_HWC.ravel().tolist())


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    """Noise of 32 x 32 pixels or another size, often with rows of one colour at an end."""
    height, width = draw(st.one_of(st.just((SIDE, SIDE)), st.tuples(SIDES, SIDES)))
    pixels_HWC = picture(height, width, 3, draw(st.integers(0, 9))) >> draw(st.integers(0, 7))
    rows = slice(*draw(st.sampled_from([(0, 0), (0, height // 2), (height // 2, height), (0, height)])))
    pixels_HWC[rows] = draw(st.tuples(*3 * [st.integers(0, 255)]))
    return pixels_HWC[..., : draw(CHANNELS)]


@given(found=st.lists(pictures(), min_size=1, max_size=12))
@settings(max_examples=40)
def test_facts_do_not_depend_on_the_images_beside(found: list[np.ndarray]) -> None:
    for channels in (1, 3):
        images = [image for image in found if image.shape[2] == channels]
        alone = []
        for i, image in enumerate(images):
            facts = ImageFacts()
            facts.add(i, image)
            alone.append(facts.table())
        many = ImageFacts()
        for i in range(20 * len(images)):  # more than are described by one call
            many.add(i, images[i % len(images)])
        together = many.table()
        for repeat in range(20 if images else 0):
            part = together.slice(repeat * len(images), len(images))
            assert part.drop_columns("position").equals(pa.concat_tables(alone).drop_columns("position"))


@given(seed=st.integers(0, 99), amplitude=st.sampled_from([1, 40, 255]))
@settings(max_examples=15)
def test_facts_of_an_image_are_those_of_the_plain_formulas(seed: int, amplitude: int) -> None:
    rng = np.random.default_rng(seed)
    grey_SS = (
        rng.integers(0, amplitude + 1, (SIDE, SIDE)) if amplitude < 255 else 255 * rng.integers(0, 2, (SIDE, SIDE))
    )
    facts, _ = describe([grey_SS[None].astype(np.uint16)])
    lines = [grey_SS[::4].reshape(-1, 4, 8), grey_SS[:, ::4].T.reshape(-1, 4, 8)]
    near = sum(float(((x[..., 2:] - x[..., 1:-1]) ** 2 + (x[..., 1:-1] - x[..., :-2]) ** 2).sum()) / 2 for x in lines)
    far = sum(float(((x[..., 2:] - x[..., :-2]) ** 2).sum()) for x in lines)
    assert facts["smoothness"][0] == pytest.approx(near / far if far else 1, rel=1e-6)
    bins = grey_SS[:, ::2].ravel() // 4
    shares = np.bincount(bins, minlength=64) / bins.size
    assert facts["entropy"][0] == pytest.approx(-sum(p * np.log2(p) for p in shares if p), abs=6e-4)
    assert facts["contrast"][0] == pytest.approx(4 * bins.std(), rel=1e-5)
    assert facts["low"][0] == 4 * np.quantile(bins, 0.05, method="inverted_cdf")
    assert facts["high"][0] == 4 * np.quantile(bins, 0.99, method="inverted_cdf") + 3
    assert facts["red"][0] == grey_SS.mean() // 1


@given(
    height=st.integers(1, 40),
    width=st.sampled_from([1, 2, 21, 32, 100]),
    n_flat=st.integers(0, 40),
    drift=st.integers(0, 6),
    channels=CHANNELS,
)
@example(height=40, width=21, n_flat=8, drift=0, channels=3)  # rows are compared in blocks of 8, 16, ...
@example(height=40, width=100, n_flat=24, drift=0, channels=1)
@settings(max_examples=60)
def test_flat_rows_are_counted_to_the_first_that_differs(
    height: int, width: int, n_flat: int, drift: int, channels: int
) -> None:
    pixels_HWC = picture(height, width, channels, height)
    pixels_HWC[:n_flat] = 128
    pixels_HWC[2:n_flat] += np.uint8(drift)
    wanted = 0
    while wanted < height and (np.ptp(pixels_HWC[: wanted + 1].astype(int), axis=(0, 1)) <= ALIKE).all():
        wanted += 1
    assert flat_rows(pixels_HWC) == pytest.approx(wanted / height)


@given(place=st.integers(0, 99), channel=st.integers(0, 2), row=st.integers(0, 39))
@settings(max_examples=30)
def test_one_other_pixel_ends_the_flat_rows(place: int, channel: int, row: int) -> None:
    pixels_HWC = np.full((40, 100, 3), 128, np.uint8)
    pixels_HWC[row, place, channel] += ALIKE + 1
    assert flat_rows(pixels_HWC) == row / 40


@pytest.mark.hostile
@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1), (9, 300_000)])
def test_a_long_picture_takes_no_more_memory_than_itself(size: tuple[int, int]) -> None:
    pixels_HWC = np.zeros((*size, 3), np.uint8)
    facts = ImageFacts()
    tracemalloc.start()
    try:
        facts.add(0, pixels_HWC)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * pixels_HWC.nbytes
