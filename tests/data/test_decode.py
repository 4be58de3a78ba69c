import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from sanitize.data.decode import NO_IMAGE, BadImage, ImageConfig, decode, encode_png, fit, image_header, resized

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (13, 17), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(values_HWC: np.ndarray) -> bytes:
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values_HWC.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    return png(values_HWC.shape[1], values_HWC.shape[0], 16, colour, rows)


def pixels(data: bytes, channels: int = 3) -> np.ndarray:
    image_CHW = decode(data, ImageConfig(channels=channels))  # type: ignore[arg-type]
    assert image_CHW.dtype == torch.uint8
    assert image_CHW.shape[0] == channels
    return image_CHW.permute(1, 2, 0).numpy() if channels == 3 else image_CHW[0].numpy()


def grey3(values_HW: np.ndarray) -> np.ndarray:
    return np.repeat(values_HW[..., None], 3, 2)


DEEP = RNG.integers(0, 65536, (5, 7, 4))
RGBA = np.dstack([RGB, ALPHA])
LOSSLESS: dict[str, tuple[bytes, np.ndarray]] = {
    "L png": (encoded(Image.fromarray(GREY), "PNG"), grey3(GREY)),
    "L pgm": (encoded(Image.fromarray(GREY), "PPM"), grey3(GREY)),
    "RGB png": (encoded(Image.fromarray(RGB), "PNG"), RGB),
    "RGB png with a transparent colour": (
        encoded(Image.fromarray(RGB), "PNG", transparency=tuple(RGB[0, 0].tolist())),
        RGB,
    ),
    "L png with a transparent grey": (encoded(Image.fromarray(GREY), "PNG", transparency=int(GREY[0, 0])), grey3(GREY)),
    "RGB ppm": (encoded(Image.fromarray(RGB), "PPM"), RGB),
    "RGB webp": (encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "RGBA png": (encoded(Image.fromarray(RGBA), "PNG"), RGB),
    "RGBA webp": (encoded(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), RGB),
    "LA png": (encoded(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG"), grey3(GREY)),
    "1 bit png": (encoded(Image.fromarray(GREY > 127), "PNG"), grey3(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "1 bit pbm": (encoded(Image.fromarray(GREY > 127), "PPM"), grey3(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "16 bit L png": (png16(DEEP[..., :1]), grey3((DEEP[..., 0] >> 8).astype(np.uint8))),
    "16 bit LA png": (png16(DEEP[..., :2]), grey3((DEEP[..., 0] >> 8).astype(np.uint8))),
    "16 bit RGB png": (png16(DEEP[..., :3]), (DEEP[..., :3] >> 8).astype(np.uint8)),
    "16 bit RGBA png": (png16(DEEP), (DEEP[..., :3] >> 8).astype(np.uint8)),
    "16 bit pgm": (
        b"P5 7 5 65535\n" + DEEP[..., 0].astype(">u2").tobytes(),
        grey3((DEEP[..., 0] >> 8).astype(np.uint8)),
    ),
    "animated webp": (
        encoded(Image.fromarray(RGB), "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        RGB,
    ),
    "animated png": (
        encoded(Image.fromarray(RGB), "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        RGB,
    ),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_images_become_exactly_the_documented_pixels(name: str) -> None:
    data, wanted_HWC = LOSSLESS[name]
    np.testing.assert_array_equal(pixels(data), wanted_HWC)


@pytest.mark.parametrize("name", LOSSLESS)
def test_with_one_channel_the_result_is_the_luminance(name: str) -> None:
    data, wanted_HWC = LOSSLESS[name]
    wanted_HW = np.asarray(Image.fromarray(wanted_HWC).convert("L")).astype(int)
    assert abs(pixels(data, 1).astype(int) - wanted_HW).max() <= 1  # libpng and Pillow round differently


@pytest.mark.parametrize("transparency", [None, b"\x00\x80\xff"])
def test_a_palette_image_becomes_its_colours(transparency: bytes | None) -> None:
    image = Image.fromarray(RGB).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(pixels(encoded(image, "PNG", **options)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_what_pillow_makes_of_it(mode: str, progressive: bool) -> None:
    smooth = Image.fromarray(RGB).resize((64, 48)).convert(mode)
    data = encoded(smooth, "JPEG", quality=90, progressive=progressive)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert abs(pixels(data).astype(int) - theirs).max() <= 2
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert abs(pixels(data, 1).astype(int) - theirs).max() <= 3


def by_pillow(data: bytes) -> np.ndarray | None:
    """(H, W, 3), or None where Pillow finds it damaged."""
    try:
        return np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


PHOTO = Image.fromarray(RGB).resize((37, 29), Image.Resampling.BICUBIC)
JPEGS = [
    encoded(PHOTO, "JPEG", quality=q, subsampling=s, progressive=p) for q in (30, 95) for s in (0, 1, 2) for p in (0, 1)
]
JPEGS += [encoded(PHOTO.convert("L"), "JPEG"), encoded(PHOTO, "JPEG", restart_marker_blocks=2)]


@pytest.mark.parametrize("data", JPEGS)
def test_an_ordinary_jpeg_has_the_pixels_of_pillow_to_the_bit(data: bytes) -> None:
    np.testing.assert_array_equal(pixels(data), by_pillow(data))


@pytest.mark.hostile
@settings(max_examples=400)
@given(st.sampled_from(JPEGS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_jpeg_is_bad_where_pillow_says_so_and_else_has_its_pixels(
    data: bytes, damage: list[tuple[float, int]]
) -> None:
    damaged = bytearray(data)
    for place, byte in damage:
        damaged[2 + int(place**2 * (len(data) - 3))] = byte  # the square: more often in the header
    wanted = by_pillow(bytes(damaged))
    if wanted is None:
        with pytest.raises(BadImage):
            decode(bytes(damaged), ImageConfig())
    else:
        np.testing.assert_array_equal(pixels(bytes(damaged)), wanted)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_exif_orientation_is_not_applied(format: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image = Image.fromarray(RGB).convert(mode)
    with_exif, without = encoded(image, format, exif=exif), encoded(image, format)
    assert with_exif != without
    np.testing.assert_array_equal(pixels(with_exif), pixels(without))
    assert pixels(with_exif).shape == (13, 17, 3)


def test_encode_png_loses_nothing() -> None:
    for image_CHW in (torch.from_numpy(RGB).permute(2, 0, 1), torch.from_numpy(GREY)[None]):
        again = decode(encode_png(image_CHW), ImageConfig(channels=len(image_CHW)))  # type: ignore[arg-type]
        assert torch.equal(again, image_CHW)


# --- hostile ----------------------------------------------------------------------------------------------------

LARGE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
WHOLE: dict[str, bytes] = {
    "jpeg": encoded(LARGE, "JPEG"),
    "progressive jpeg": encoded(LARGE, "JPEG", progressive=True),
    "grey jpeg": encoded(LARGE.convert("L"), "JPEG"),
    "cmyk jpeg": encoded(LARGE.convert("CMYK"), "JPEG"),
    "png": encoded(LARGE, "PNG"),
    "rgba png": encoded(LARGE.convert("RGBA"), "PNG"),
    "webp": encoded(LARGE, "WEBP"),
    "ppm": encoded(LARGE, "PPM"),
}


@pytest.mark.hostile
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", WHOLE)
def test_an_image_that_is_cut_is_bad_and_never_half_grey(name: str, share: float) -> None:
    data = WHOLE[name]
    decode(data, ImageConfig())
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * share)], ImageConfig())


@pytest.mark.hostile
@pytest.mark.parametrize("name", ["png", "rgba png"])
def test_a_png_with_a_flipped_bit_is_bad(name: str) -> None:
    data = bytearray(WHOLE[name])
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImage):
        decode(bytes(data), ImageConfig())


@pytest.mark.hostile
@pytest.mark.parametrize("data", [b"", b"\0", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"P6 0 5 255\n"])
def test_what_is_no_image_is_bad(data: bytes) -> None:
    with pytest.raises(BadImage) as error:
        decode(data, ImageConfig())
    said = str(error.value)
    assert said.startswith(NO_IMAGE) or "with a damaged header" in said if data else said == "image is empty"


@pytest.mark.hostile
@pytest.mark.parametrize("format", ["ICO", "PDF", "EPS", "TGA", "JPEG2000"])
def test_other_formats_are_refused_whatever_their_suffix(format: str) -> None:
    try:
        data = encoded(LARGE, format)
    except (KeyError, OSError) as error:
        pytest.skip(f"Pillow here cannot write {format}: {error}")
    with pytest.raises(BadImage, match=NO_IMAGE):
        decode(data, ImageConfig())


@pytest.mark.parametrize("max_pixels", [13 * 17 - 1, 13 * 17])
@pytest.mark.parametrize("name", ["RGB png", "RGB ppm", "RGB webp", "animated webp"])
def test_max_pixels_is_the_largest_that_is_decoded(name: str, max_pixels: int) -> None:
    data = LOSSLESS[name][0]
    if max_pixels == 13 * 17:
        assert decode(data, ImageConfig(max_pixels=max_pixels)).shape == (3, 13, 17)
        return
    with pytest.raises(BadImage, match=r"claims 17 x 13 pixels, more than max_pixels 220"):
        decode(data, ImageConfig(max_pixels=max_pixels))


BOMBS = """
import resource, struct, sys, zlib
import torch
from sanitize.data.decode import BadImage, ImageConfig, decode

def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

def png(width, height, rows):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\\x89PNG\\r\\n\\x1a\\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

decode(png(8, 8, bytes(9 * 8)), ImageConfig(), (32, 32))  # what torch allocates once
start = peak()
claims = png(50_000, 50_000, bytes(1000))
jpeg = bytes.fromhex("ffd8ffc0000b08c350c350010111") + bytes(100)
for data in (claims, b"P6 50000 50000 255\\n" + bytes(100), jpeg):
    try:
        decode(data, ImageConfig())
        sys.exit("a bomb was decoded")
    except BadImage:
        pass
assert peak() - start < 20, peak() - start
# One pixel high and a million wide: within max_pixels, but scaled to cover 64 x 64 it would have 4 billion.
image = decode(png(1_000_000, 1, bytes(1_000_001)), ImageConfig(), (64, 64))
assert image.shape == (3, 64, 64), image.shape
assert peak() - start < 100, peak() - start
"""


@pytest.mark.hostile
def test_bombs_cost_next_to_no_memory() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOMBS],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr


def test_the_header_is_read_without_the_pixels() -> None:
    header = image_header(WHOLE["jpeg"][:800], ImageConfig(max_pixels=10_000))
    assert (header.format, header.size) == ("JPEG", (64, 64))


# --- fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (2, 1), (5, 9), (31, 3), (40, 40)])
@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (3, 50), (50, 3), (7, 8), (64, 48)])
def test_any_image_is_brought_to_any_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    fitted = fit(torch.full((3, *shape), 77, dtype=torch.uint8), size)
    assert fitted.shape == (3, *size)
    assert fitted.dtype == torch.uint8
    assert (fitted == 77).all()


@given(st.tuples(*[st.integers(1, 90)] * 2), st.tuples(*[st.integers(1, 60)] * 2), st.sampled_from([1, 3]))
@settings(deadline=None)
def test_resizing_is_what_torchvision_does(shape: tuple[int, int], size: tuple[int, int], channels: int) -> None:
    image_CHW = torch.randint(256, (*shape, channels), dtype=torch.uint8).permute(2, 0, 1)
    theirs_CHW = v2.functional.resize(image_CHW, list(size), antialias=True)
    # Exactly, but on processors where torchvision takes the way over float32.
    assert (resized(image_CHW, size).int() - theirs_CHW.int()).abs().max() <= 1


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = torch.from_numpy(RGB).permute(2, 0, 1)
    assert torch.equal(fit(image, (13, 17)), image)


@pytest.mark.parametrize("factor", [1, 2])
def test_the_centre_is_kept_and_the_longer_side_is_cut(factor: int) -> None:
    """Three thirds, red, green and blue: a square from the middle is green."""
    image = torch.zeros(3, 8, 24, dtype=torch.uint8)
    for channel in range(3):
        image[channel, :, 8 * channel : 8 * channel + 8] = 200
    fitted = fit(image, (8 // factor, 8 // factor))
    inside = fitted[:, :, 1:-1]
    assert (inside[1] == 200).all()
    assert (inside[[0, 2]] == 0).all()


def test_a_resized_photograph_is_about_the_mean_of_what_it_covers(make_png: Callable[..., bytes]) -> None:
    image = decode(make_png(0, (64, 64)), ImageConfig())
    blocks = image.float().unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4))
    fitted = fit(image, (8, 8)).float()
    assert (fitted - blocks).abs().mean() < 12  # noise of sd 74: an unfiltered resize is off by about 60
    assert torch.equal(fit(image, (8, 8)), decode(make_png(0, (64, 64)), ImageConfig(), (8, 8)))
