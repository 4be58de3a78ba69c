import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sanitize.data.image_facts import ImageFacts, hashes
from sanitize.hygiene.copies import PIXELS, Thumbnails, first_of, near_groups, usual_distance

Scene = Callable[..., Image.Image]
DIGEST = np.dtype([("a", "<u8"), ("b", "<u8")])


def facts_of(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (N,) and thumbnails (N, 256)."""
    facts = ImageFacts()
    for i, image in enumerate(images):
        facts.add(i, np.array(image))
    table = facts.table()
    return table["hash"].to_numpy(), np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8).reshape(
        -1, PIXELS
    )


def grouped(hash_N: np.ndarray, pixels_NP: np.ndarray, distance: float = 0.28) -> np.ndarray:
    n = len(hash_N)
    with tempfile.TemporaryFile() as file:
        file.write(pixels_NP.tobytes())
        file.flush()
        start_N = np.arange(n, dtype=np.int32)
        return near_groups(hash_N, start_N, np.ones(n, bool), Thumbnails(file), 10, distance)[1]


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "smaller": lambda image: image.resize((40, 30), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "brighter": lambda image: image.point(lambda value: min(255, int(0.8 * value + 30))),
    "fewer colours": lambda image: image.quantize(64).convert("RGB"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_changed_copy_is_found(change: str, scene: Scene) -> None:
    originals = [scene(seed) for seed in range(30)]
    found_N = grouped(*facts_of([*originals, *map(CHANGES[change], originals)]))
    assert (found_N[30:] == np.arange(30)).mean() >= 0.9
    assert (found_N[:30] == np.arange(30)).all()


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_a_copy_that_was_encoded_again_is_found(quality: int, scene: Scene, stored: Callable[..., bytes]) -> None:
    originals = [scene(seed) for seed in range(30)]
    again = [Image.open(io.BytesIO(stored(image, "JPEG", quality=quality))) for image in originals]
    assert (grouped(*facts_of([*originals, *again]))[30:] == np.arange(30)).mean() >= 0.9


@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 8), (32, 32), (33, 70), (300, 40)]))
@settings(max_examples=15)
def test_noise_has_no_copies(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(40)]
    assert (grouped(*facts_of(images)) == np.arange(40)).all()


@given(st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_groups_do_not_depend_on_the_order(random: object) -> None:
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    base_NP = rng.integers(0, 256, (60, PIXELS), dtype=np.uint8)
    pixels_NP = base_NP[rng.integers(0, 40, 60)]
    noisy_NP = (pixels_NP.astype(int) + rng.integers(-3, 4, pixels_NP.shape)).clip(0, 255).astype(np.uint8)
    hash_N = hashes(noisy_NP.reshape(-1, 16, 16))
    order = rng.permutation(60)
    one_N, two_N = grouped(hash_N, noisy_NP), grouped(hash_N[order], noisy_NP[order])
    same = one_N[:, None] == one_N
    assert (same[order][:, order] == (two_N[:, None] == two_N)).all()


def test_equal_digests_point_to_the_first_and_missing_ones_to_nothing() -> None:
    digest_N = np.zeros(7, DIGEST)
    digest_N["a"] = [5, 3, 5, 0, 0, 3, 5]
    digest_N["b"] = [1, 1, 1, 0, 0, 2, 1]
    assert first_of(digest_N).tolist() == [0, 1, 0, 3, 4, 5, 0]


@pytest.mark.hostile
def test_colliding_hashes_cost_no_more_than_others() -> None:
    n = 20_000
    rng = np.random.default_rng(0)
    pixels_NP = rng.integers(0, 256, (n, PIXELS), dtype=np.uint8)
    start = time.process_time()
    found_N = grouped(np.full(n, 77, np.uint64), pixels_NP)
    assert (found_N == np.arange(n)).all()
    assert time.process_time() - start < 10


def test_a_burst_is_one_group() -> None:
    rng = np.random.default_rng(0)
    pixels_NP = rng.integers(0, 256, (500, PIXELS), dtype=np.uint8)
    pixels_NP[::10] = pixels_NP[0] ^ (rng.random((50, PIXELS)) < 0.3).astype(np.uint8)
    found_N = grouped(hashes(pixels_NP.reshape(-1, 16, 16)), pixels_NP)
    assert (found_N[::10] == 0).all()
    assert len(np.unique(found_N)) == 451


def test_pictures_that_are_all_alike_have_a_small_usual_distance() -> None:
    rng = np.random.default_rng(0)
    base_P = rng.integers(60, 190, PIXELS)
    alike = (base_P + rng.integers(-20, 20, (300, PIXELS))).astype(np.uint8)
    different = rng.integers(0, 256, (300, PIXELS), dtype=np.uint8)
    found = []
    for pixels_NP in (alike, different):
        with tempfile.TemporaryFile() as file:
            file.write(pixels_NP.tobytes())
            file.flush()
            key_N = rng.integers(0, 2**63, 300).astype(np.uint64)
            found.append(usual_distance(key_N, np.ones(300, bool), Thumbnails(file)))
    assert found[0] < 0.5 < 1 < found[1]


def test_thumbnails_are_read_and_not_mapped() -> None:
    pixels_NP = np.random.default_rng(0).integers(0, 256, (1000, PIXELS), dtype=np.uint8)
    pixels_NP[7] = 9
    at = np.array([999, 0, 7, 0])
    wanted_MP = pixels_NP[at].astype(float) - pixels_NP[at].mean(1, keepdims=True)
    wanted_MP /= np.maximum(np.linalg.norm(wanted_MP, axis=1, keepdims=True), 1e-6)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pixels_NP.tobytes())
        file.flush()
        thumbnails = Thumbnails(file)
        np.testing.assert_allclose(thumbnails.rows(at), wanted_MP, atol=1e-6)
        assert thumbnails.rows(at[:0]).shape == (0, PIXELS)
        maps = Path("/proc/self/maps")  # of mapped files the kernel counts 64 KiB a thumbnail as memory
        if maps.exists():
            assert file.name not in maps.read_text()


@given(seed=st.integers(0, 50), distance=st.floats(0.1, 1.5))
@settings(max_examples=20)
def test_groups_at_half_the_distance_lie_within_the_others(seed: int, distance: float) -> None:
    rng = np.random.default_rng(seed)
    base_KP, base_hash_K = rng.integers(0, 256, (6, PIXELS)), rng.integers(0, 2**63, 6, dtype=np.uint64)
    of_N = rng.integers(0, 6, 40)
    noise_NP = rng.normal(0, 1, (40, PIXELS)) * rng.uniform(0, 90, (40, 1))
    pixels_NP = np.clip(base_KP[of_N] + noise_NP, 0, 255).astype(np.uint8)
    hash_N = base_hash_K[of_N] ^ (np.uint64(1) << rng.integers(0, 64, 40).astype(np.uint64))
    with tempfile.TemporaryFile() as file:
        file.write(pixels_NP.tobytes())
        file.flush()
        thumbnails = Thumbnails(file)
        half_N, whole_N = near_groups(
            hash_N, np.arange(40, dtype=np.int32), np.ones(40, bool), thumbnails, 10, distance
        )
        x_NP = thumbnails.rows(np.arange(40))
    assert (whole_N[half_N] == whole_N).all()
    for group_N, limit in ((half_N, distance / 2), (whole_N, distance)):
        assert (group_N <= np.arange(40)).all()
        for i in np.flatnonzero(group_N != np.arange(40)):  # linked to some member of the group
            others = np.flatnonzero((group_N == group_N[i]) & (np.arange(40) != i))
            assert np.linalg.norm(x_NP[others] - x_NP[i], axis=1).min() <= limit + 1e-5
