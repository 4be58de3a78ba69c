"""Formats of images: pixels are Pillow's, limits hold before it decodes, a conversion of line ends shows."""

import gc
import io
import struct
import time
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from sanitize.data.avif import BadAvif, decoded_pixels
from sanitize.data.decode import FORMATS, BadImage, ImageConfig, decode, image_format
from sanitize.data.image_costs import gif_parts
from sanitize.data.tiff import BadTiff, only_pixels

NOISE = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
NEGATIVE = Image.fromarray(255 - NOISE)
HAS_AVIF = features.check("avif")


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (17, 13), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).resize(size).convert(mode).save(file, format, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.load()
    return np.array(image.convert("RGB"))


def pixels(data: bytes, **config: Any) -> np.ndarray:
    return decode(data, ImageConfig(**config)).permute(1, 2, 0).numpy()


def refused(data: bytes, **config: Any) -> str:
    with pytest.raises(BadImage) as error:
        pixels(data, **config)
    return str(error.value)


WHOLE: dict[str, tuple[str, bytes]] = {
    **{f"bmp {mode}": ("bmp", encoded("BMP", mode)) for mode in ("RGB", "L", "P", "1")},
    **{f"gif {mode}": ("gif", encoded("GIF", mode)) for mode in ("RGB", "L", "P", "1")},
    "animated gif": ("gif", encoded("GIF", save_all=True, append_images=[NEGATIVE])),
    "gif with a comment": ("gif", encoded("GIF", comment=b"c" * 2000)),
    **{f"tiff {mode}": ("tiff", encoded("TIFF", mode)) for mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr")},
    **{
        f"tiff {how}": ("tiff", encoded("TIFF", compression=how))
        for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    },
    "tiff of faxes": ("tiff", encoded("TIFF", "1", compression="group4")),
    "tiff of pages": ("tiff", encoded("TIFF", save_all=True, append_images=[NEGATIVE])),
    "big tiff": ("tiff", encoded("TIFF", big_tiff=True)),
    "tiff with a profile": ("tiff", encoded("TIFF", icc_profile=bytes(5000), description="d" * 5000)),
}
if HAS_AVIF:
    WHOLE |= {f"avif {mode}": ("avif", encoded("AVIF", mode)) for mode in ("RGB", "L")}
    WHOLE["avif sequence"] = ("avif", encoded("AVIF", save_all=True, append_images=[NEGATIVE] * 2))


@pytest.mark.parametrize("name", WHOLE)
def test_the_pixels_are_those_of_pillow(name: str) -> None:
    format, data = WHOLE[name]
    assert image_format(data) == format
    assert np.array_equal(pixels(data), by_pillow(data))
    if name in ("bmp RGB", "tiff RGB", "tiff tiff_lzw", "tiff of pages", "big tiff", "tiff with a profile"):
        assert np.array_equal(pixels(data), NOISE)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_of_a_tiff_are_scaled_in_both_byte_orders(order: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(order), (8, 1))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "TIFF")
    assert file.getvalue()[:2] == (b"II" if order == "<u2" else b"MM")
    assert np.array_equal(pixels(file.getvalue())[0, :, 0], ramp[0] // 256)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_unknown_range_are_refused(mode: str) -> None:
    assert "whose range of values is unknown" in refused(encoded("TIFF", mode))


def test_alpha_is_dropped_and_cmyk_is_converted() -> None:
    rgba = Image.fromarray(np.dstack([NOISE, NOISE[..., :1]]))
    file = io.BytesIO()
    rgba.save(file, "TIFF")
    assert np.array_equal(pixels(file.getvalue()), NOISE)
    red = Image.new("RGB", (8, 8), (220, 20, 20)).convert("CMYK")
    file = io.BytesIO()
    red.save(file, "TIFF")
    assert np.abs(pixels(file.getvalue())[0, 0].astype(int) - (220, 20, 20)).max() < 3


@pytest.mark.parametrize("format", FORMATS)
def test_formats_that_are_left_out_are_unreadable_by_content(format: str) -> None:
    if format == "avif" and not HAS_AVIF:
        pytest.skip("this Pillow has no AVIF")
    data = encoded(format.upper())
    assert image_format(data) == format
    assert refused(data, formats=[name for name in FORMATS if name != format]) == (
        f"{format} image, and index.image.formats leaves {format} out"
    )
    assert pixels(data, formats=[format]).shape == (13, 17, 3)


def test_a_large_profile_or_text_costs_no_png() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 2 * 2**20, dtype=np.uint8).tobytes()
    with_profile = encoded("PNG", icc_profile=noise)
    assert b"iCCP" in with_profile
    assert np.array_equal(pixels(with_profile), NOISE)
    assert np.array_equal(pixels(encoded("PNG", icc_profile=b"profile")), NOISE)


# --- conversion of line ends ------------------------------------------------------------------------------------


@given(
    st.sampled_from([b"\n", b" ", b"\n# made by hand\n"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_a_ppm_through_which_a_conversion_of_line_ends_went_is_unreadable(
    gap: bytes, width: int, height: int, channels: int, seed: int
) -> None:
    raster = np.random.default_rng(seed).integers(0, 256, width * height * channels, dtype=np.uint8).tobytes()
    head = (b"P6" if channels == 3 else b"P5") + gap + b"%d %d" % (width, height) + gap + b"255\n"
    whole = head + raster
    expected = np.frombuffer(raster, np.uint8).reshape(height, width, channels)
    assert (pixels(whole) == expected).all()
    assert "a conversion of line ends" in refused(whole.replace(b"\n", b"\r\n"))
    fewer = whole.replace(b"\r\n", b"\n")
    if fewer != whole:
        assert refused(fewer)
    for behind in (b"\n", whole, b"\n" + whole):  # netpbm's tools write several images one behind the other
        assert (pixels(whole + behind) == expected).all()
    assert "a conversion of line ends" in refused(whole + b"x")


@pytest.mark.parametrize(("mode", "width"), [("1", 17), ("1", 16), ("L", 5), ("I", 5)])
def test_the_length_of_other_rasters_is_known(mode: str, width: int) -> None:
    data = encoded("PPM", mode, (width, 3))
    assert pixels(data).shape == (3, width, 3)
    assert "a conversion of line ends" in refused(data + b"x")


# --- hostile ----------------------------------------------------------------------------------------------------

Tag = tuple[int, int, int, bytes]  # tag, type, number of values, values or offset


def short(tag: int, value: int) -> Tag:
    return tag, 3, 1, struct.pack("<HH", value, 0)


def long(tag: int, value: int) -> Tag:
    return tag, 4, 1, struct.pack("<I", value)


def tiff(*tags: Tag, before: bytes = b"", behind: bytes = b"", following: int = 0) -> bytes:
    """A TIFF with one directory, behind the bytes `before`, which begin at offset 8."""
    at = 8 + len(before)
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", at) + before + directory + behind


def grey(width: int = 4, height: int = 4, compression: int = 1) -> list[Tag]:
    return [long(256, width), long(257, height), short(258, 8), short(259, compression), short(262, 1), short(277, 1)]


STRIP = [long(273, 8), long(278, 4), long(279, 16)]
FAR = [(tag, 7, 2**20, struct.pack("<I", 8)) for tag in range(40_000, 40_050)]
TIFFS: dict[str, tuple[bytes, str]] = {
    "as it should be": (tiff(*grey(), *STRIP, before=bytes(16)), ""),
    "fifty tags that are the whole file": (tiff(*grey(), *STRIP, *FAR, before=bytes(2**20)), ""),
    "a directory that is followed by itself": (tiff(*grey(), *STRIP, before=bytes(16), following=24), ""),
    "a directory that is followed by nothing there is": (tiff(*grey(), *STRIP, before=bytes(16), following=10**9), ""),
    "sub-directories that are the directory": (
        tiff(*grey(), *STRIP, long(330, 24), long(34665, 24), long(34853, 24), before=bytes(16)),
        "",
    ),
    "more tags than are there": (b"II*\0\x08\0\0\0\xff\xff" + bytes(100), "damaged directory"),
    "big tiff of 2^60 tags": (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + bytes(100), "more tags than"),
    "a size of 60,000 x 60,000": (tiff(*grey(60_000, 60_000), *STRIP, before=bytes(16)), "more than max_pixels"),
    "a tile of 60,000 x 60,000": (
        tiff(*grey(4, 4, 5), long(322, 60_000), long(323, 60_000), long(324, 8), long(325, 16), before=bytes(16)),
        "tiles of a tiff image claim",
    ),
    "tiles of nothing": (
        tiff(*grey(), long(322, 0), long(323, 0), long(324, 8), long(325, 16), before=bytes(16)),
        "without a size",
    ),
    "a million strips": (
        tiff(*grey(), (273, 4, 10**6, struct.pack("<I", 8)), long(278, 4), before=bytes(4 * 10**6)),
        "more strips or tiles than max_chunks",
    ),
    "strips that are the whole file each": (
        tiff(
            *grey(4, 100, 5),
            (273, 4, 100, struct.pack("<I", 8)),
            long(278, 1),
            (279, 4, 100, struct.pack("<I", 408)),
            before=struct.pack("<100I", *[8] * 100) + struct.pack("<100I", *[1200] * 100) + bytes(400),
        ),
        "claim more bytes than the file has",
    ),
    "lzw without sizes": (tiff(*grey(4, 4, 5), *STRIP[:2], before=bytes(16)), "without the sizes"),
    "a strip that reaches behind the end": (
        tiff(*grey(), long(273, 10**6), *STRIP[1:], before=bytes(16)),
        "more bytes than the file has",
    ),
    "lzma": (tiff(*grey(4, 4, 34925), *STRIP, before=bytes(16)), "compression 34925, which is not read"),
    "old jpeg": (tiff(*grey(4, 4, 6), *STRIP, before=bytes(16)), "compression 6, which is not read"),
    "jpeg of 10,000 scans": (
        tiff(
            *grey(4000, 4000, 7),
            long(273, 8),
            long(278, 4000),
            long(279, 20_000),
            before=b"\xff\xda" * 10_000,
        ),
        "go over more pixels than max_scan_pixels",
    ),
    "tags of more bytes than the file": (
        tiff(
            *grey(), (320, 1, 2**20, struct.pack("<I", 0)), (347, 7, 2**20, struct.pack("<I", 0)), before=bytes(2**20)
        ),
        "",
    ),
    "a tag of 4 GiB": (tiff(*grey(), *STRIP, (320, 3, 2**31, struct.pack("<I", 0))), "behind the end of the file"),
}


@pytest.mark.hostile
@pytest.mark.parametrize("name", TIFFS)
def test_a_hostile_tiff_costs_nothing(name: str) -> None:
    data, reason = TIFFS[name]
    start = time.process_time()
    if name == "tags of more bytes than the file":
        with pytest.raises(BadTiff, match="more bytes of tags than the file has"):
            only_pixels(data, 100, 10**6, 10**6)
    elif reason:
        assert reason in refused(data)
    else:
        assert (pixels(data) == 0).all()
    assert time.process_time() - start < 2


def gif(before: bytes) -> bytes:
    """A GIF with these bytes before its first image."""
    whole = encoded("GIF")
    return whole[:13] + before + whole[13:] if not whole[10] & 128 else _behind_palette(whole, before)


def _behind_palette(whole: bytes, before: bytes) -> bytes:
    at = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:at] + before + whole[at:]


@pytest.mark.hostile
@pytest.mark.parametrize(
    "before",
    [
        b"!\xfe" + b"\xff" * 256 * 200_000 + b"\0",
        b"!\xff" + b"\1a" * 200_000 + b"\0",
        b"!\xf9\0" * 200_000,
        b"x" * 200_000,
        bytes(200_000),
    ],
    ids=["comment", "application", "controls", "junk", "zeros"],
)
def test_what_comes_before_the_pixels_of_a_gif_is_counted(before: bytes) -> None:
    start = time.process_time()
    assert "more blocks before its pixels than max_chunks" in refused(gif(before))
    assert time.process_time() - start < 1


@pytest.mark.hostile
def test_frames_of_a_gif_behind_the_first_and_a_large_canvas() -> None:
    frames = [NEGATIVE, Image.fromarray(NOISE)] * 500
    many = encoded("GIF", save_all=True, append_images=frames)
    assert np.array_equal(pixels(many), by_pillow(many))
    whole = bytearray(encoded("GIF"))
    whole[6:10] = b"\xff" * 4
    assert "more than" in refused(bytes(whole))
    assert gif_parts(b"GIF89a", 10) == 0


@pytest.mark.hostile
def test_run_lengths_of_a_bmp_are_refused() -> None:
    whole = bytearray(encoded("BMP", "P"))
    whole[30:34] = struct.pack("<I", 1)
    assert refused(bytes(whole)) == "bmp image of run lengths"


# --- avif -------------------------------------------------------------------------------------------------------


def av1(width: int, height: int, n_frames: int) -> bytes:
    """A stream with the short sequence header of a still picture, and frames without content."""
    bits = f"{0b000:03b}11{0:05b}{15:04b}{15:04b}{width - 1:016b}{height - 1:016b}"
    header = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))
    return bytes([1 << 3 | 2, len(header)]) + header + bytes([6 << 3 | 2, 1, 0]) * n_frames


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def avif(stream: bytes, kind: bytes = b"av01", brand: bytes = b"avif", twice: bytes = b"") -> bytes:
    """A file with one item."""
    head = box(b"ftyp", brand + bytes(4))
    iinf = box(b"iinf", bytes(4) + b"\0\1" + box(b"infe", b"\2\0\0\0" + b"\0\1\0\0" + kind + b"\0"))
    place = len(head) + 12 + 30 + len(iinf) + 8 + len(twice)
    iloc = box(b"iloc", bytes(4) + b"\x44\0" + b"\0\1" + b"\0\1\0\0\0\1" + struct.pack(">II", place, len(stream)))
    assert len(iloc) == 30
    return head + box(b"meta", bytes(4) + iloc + iinf) + twice + box(b"mdat", stream)


@pytest.mark.hostile
def test_every_frame_of_an_avif_counts_with_the_size_of_its_stream() -> None:
    for n in (1, 2, 100):
        assert decoded_pixels(avif(av1(640, 480, n)), 1000) == n * 640 * 480
    assert "frames of an avif image" in refused(avif(av1(65_536, 65_536, 1)))
    assert "frames of an avif image" in refused(avif(av1(2000, 2000, 100)))
    start = time.process_time()
    assert "more boxes, extents and units" in refused(avif(av1(1, 1, 200_000)))
    assert time.process_time() - start < 1
    for data, reason in (
        (avif(av1(8, 8, 1), twice=box(b"meta", bytes(4))), "several boxes meta"),
        (avif(av1(8, 8, 1), kind=b"grid"), "without a frame"),
        (avif(bytes(70_000), kind=b"Exif"), "more than 64 KiB of Exif"),
        (avif(av1(8, 8, 1))[:-3], "damaged header"),
    ):
        with pytest.raises(BadAvif, match=reason):
            decoded_pixels(data, 1000)


def sequence(*tracks: bytes, at: int | None = None, twice: bytes = b"", wide: bool = False) -> bytes:
    """A file with tracks of one sample each, and no items."""
    head, place, traks = box(b"ftyp", b"avis" + bytes(4)), 24, b""
    for stream in tracks:
        offset = struct.pack(">Q" if wide else ">I", place if at is None else at)
        sizes = box(b"stsz", bytes(4) + struct.pack(">III", 0, 2, len(stream)) + struct.pack(">I", 10**9))
        table = sizes + box(b"co64" if wide else b"stco", bytes(4) + struct.pack(">I", 1) + offset) + twice
        traks += box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", table))))
        place += len(stream)
    return head + box(b"mdat", b"".join(tracks)) + box(b"moov", traks)


@pytest.mark.hostile
@pytest.mark.parametrize("wide", [False, True])
def test_of_a_sequence_the_first_picture_of_every_track_counts(wide: bool) -> None:
    assert decoded_pixels(sequence(av1(640, 480, 1), wide=wide), 1000) == 640 * 480
    assert decoded_pixels(sequence(av1(640, 480, 3), av1(64, 48, 1), wide=wide), 1000) == 3 * 640 * 480 + 64 * 48
    assert "frames of an avif image" in refused(sequence(av1(8, 8, 1), av1(65_536, 65_536, 1), wide=wide))
    assert "more boxes, extents and units" in refused(sequence(av1(1, 1, 200_000), wide=wide))
    huge = avif(av1(2000, 2000, 100), brand=b"avis", twice=box(b"moov", b""))  # decoders differ in which one they take
    assert "frames of an avif image" in refused(huge)


@pytest.mark.hostile
def test_sequences_that_are_not_understood_are_refused() -> None:
    one = av1(8, 8, 1)
    for data, reason in (
        (sequence(), "without a frame"),
        (sequence(one, b""), "whose first picture is not found"),
        (sequence(one, at=2**32 - 1), "whose first picture is not found"),
        (sequence(one, twice=box(b"co64", bytes(16))), "damaged header"),
        (sequence(one, twice=box(b"stco", bytes(12))), "several boxes stco"),
        (sequence(one)[:-3], "damaged header"),
        (avif(one, twice=box(b"moov", box(b"trak", b""))), "damaged header"),
        (avif(one, twice=box(b"moov", b"") * 2), "several boxes moov"),
    ):
        with pytest.raises(BadAvif, match=reason):
            decoded_pixels(data, 1000)


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no AVIF")
@pytest.mark.parametrize(("mode", "planes"), [("RGB", 1), ("L", 1), ("RGBA", 2)])
def test_frames_of_a_sequence_behind_the_first_are_not_counted(mode: str, planes: int) -> None:
    image = Image.fromarray(np.dstack([NOISE, NOISE[..., :1]])).resize((320, 240)).convert(mode)
    file = io.BytesIO()
    image.save(file, "AVIF", save_all=True, append_images=[image.rotate(90 * i) for i in range(4)])
    assert decoded_pixels(file.getvalue(), 1000) == planes * 320 * 240
    limit = 8 * planes * 320 * 240
    assert np.array_equal(pixels(file.getvalue(), max_scan_pixels=limit), by_pillow(file.getvalue()))
    assert refused(file.getvalue(), max_scan_pixels=limit - 1)


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no AVIF")
@pytest.mark.parametrize(("mode", "planes"), [("RGB", 1), ("L", 1), ("RGBA", 2)])
def test_the_frames_of_an_ordinary_avif_are_counted_exactly(mode: str, planes: int) -> None:
    image = Image.fromarray(np.dstack([NOISE, NOISE[..., :1]])).resize((320, 240)).convert(mode)
    file = io.BytesIO()
    image.save(file, "AVIF")
    assert decoded_pixels(file.getvalue(), 1000) == planes * 320 * 240
    limit = 8 * planes * 320 * 240
    assert pixels(file.getvalue(), max_scan_pixels=limit).shape == (240, 320, 3)
    assert refused(file.getvalue(), max_scan_pixels=limit - 1)


@pytest.mark.hostile
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damage_costs_an_image_or_gives_the_pixels_of_pillow(name: str, data: st.DataObject) -> None:
    whole = bytearray(WHOLE[name][1])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(whole), 400) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(1, len(whole)))]
    damaged, start = bytes(whole), time.process_time()
    try:
        found = pixels(damaged, max_pixels=10**6, max_scan_pixels=10**7)
    except BadImage:
        found = None
    assert time.process_time() - start < 3
    assert found is None or np.array_equal(found, by_pillow(damaged))


DAMAGED = {f"{name}, cut": whole[: len(whole) // 4] for name, (_, whole) in WHOLE.items()}
DAMAGED |= {f"{name}, start": whole[:20] + b"\xff" * 9 for name, (_, whole) in WHOLE.items()}
DAMAGED |= {name: data for name, (data, reason) in TIFFS.items() if reason}


@pytest.mark.hostile
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", DAMAGED)
def test_the_error_of_a_damaged_image_is_freed_at_once(name: str) -> None:
    """An error that refers to itself keeps the frames of its traceback, and what they hold, until a collection."""
    errors: list[weakref.ref[BaseException]] = []
    gc.disable()
    try:
        try:
            decode(DAMAGED[name], ImageConfig())
        except BadImage as raised:
            error: BaseException | None = raised
            while error is not None and len(errors) < 9:
                if isinstance(error, BadImage | BadTiff | BadAvif):  # Python's own cannot be watched
                    errors.append(weakref.ref(error))
                error = error.__cause__
            error = None
        assert [error() for error in errors if error() is not None] == []
    finally:
        gc.enable()
