"""Decoder for untrusted images: bytes become a uint8 tensor of a known size, or a reason for the refusal.

Conversions (C = 3; with C = 1 the result is the luminance):
  8-bit greyscale, RGB, CMYK, palette   converted to RGB
  alpha channel                         dropped, colours as stored
  16 bits a channel                     scaled to 8 bits
  animated, several pages               the first
  EXIF orientation                      not applied: trainers read pixels as they are stored (Pillow applies it to TIFF)
  ICC profile                           not applied
Images of another size than the data set's are resized (bilinear, antialiased): after a crop around the centre to its
proportions, or as a whole (`ImageConfig.crop`).

libjpeg-turbo (simplejpeg) reads ordinary JPEGs: the pixels equal Pillow's, at a tenth of the cost for small images,
because Pillow's parser is written in Python. Pillow reads all other images. torchvision's decoders are deprecated, and
in its PNG decoder a flipped bit can cause a segmentation fault (0.29: within the first two of 3,000 damaged files); one
hostile image must not end a run.

The cost of an image is limited before it is decoded (see image_costs).

A truncated image is bad: Pillow refuses images that decoders of trainers may fill with grey. Only a JPEG whose scan
stops early and whose end marker is present becomes grey from that point on, as in other decoders.
"""

import io
import re
import warnings
from typing import Literal, get_args

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFile, features
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from sanitize.data.avif import BadAvif, decoded_pixels
from sanitize.data.image_costs import COSTLY, gif_parts, jpeg_header, jpeg_scan_samples, png_parts, png_without_text
from sanitize.data.tiff import BadTiff, only_pixels

Format = Literal["jpeg", "png", "webp", "ppm", "bmp", "gif", "tiff", "avif"]
FORMATS: tuple[Format, ...] = get_args(Format)
# webdataset and torchvision take these for images, too; the content tells the format.
IMAGE_SUFFIXES = frozenset({*FORMATS, "jpg", "jpe", "jfif", "tif", "pbm", "pgm", "pnm"})
# Pillow warns of bombs at its own limit. Filtered for the whole process: filters per call are not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_MAGIC: dict[Format, re.Pattern[bytes]] = {
    "jpeg": re.compile(_JPEG),
    "png": re.compile(re.escape(_PNG)),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "ppm": re.compile(rb"P[1-6][\s#]"),
    "bmp": re.compile(rb"BM"),
    "gif": re.compile(rb"GIF8[79]a"),
    "tiff": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "avif": re.compile(rb".{4}ftyp(?:avi[fs]|.{4}.{4}(?:.{4}){0,15}?avi[fs])", re.DOTALL),
}
_MAGIC_BYTES = 128
NO_IMAGE = f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
# Modes of Pillow whose pixels have a known range.
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}
_AV1_COST = 8  # a pixel of an AV1 frame takes as long as so many samples of a JPEG's scans
_LEAST_SIDE = 8  # JPEG has blocks of 8 x 8; a PNG row of one pixel costs as much as one of 8
_BEHIND_RASTER = re.compile(rb"\s*(?:P[1-7]\s|\Z)")
_MAX_PPM_HEADER = 1024  # Pillow reads comments byte by byte


class BadImage(ValueError):
    """The bytes are no image that is decoded; the message is the reason, for a verdict row."""


class ImageConfig(BaseModel):
    """Settings of decoding.

    Attributes:
        size: height and width in pixels, or None to take the most common size of the data set.
        max_side: largest side in pixels if `size` is None; a larger data set is scaled down to it (`common_size`). None
            keeps the most common size.
        crop: True crops images of other proportions around the centre; False stretches them, so that a trigger at the
            border stays visible.
        channels: 3 (RGB) or 1 (luminance).
        member: suffix of the image that is read where a sample has several (`left.jpg`, also as `left.png`), or `first`
            in the order of the shard. None takes the only image, if it has a plain suffix (`jpg`) or is the only one.
            `all` reads every picture of a sample (`clean` alone); the worst one decides on the sample.
        formats: formats that are read, by content and not by suffix; images of others are unreadable.
        max_pixels: number of pixels in the header above which an image is not decoded (decompression bombs). A side
            below 8 counts as 8.
        max_scan_pixels: number of pixels in all scans of a JPEG, each component of a scan counted separately. An
            ordinary progressive JPEG scans each pixel 8 times (with colour at full resolution 14 times). A pixel of
            each frame of an AVIF counts as 8. The default takes about 1 s.
        max_chunks: number of chunks of a PNG, of segments before the first scan of a JPEG and bytes between them, of
            blocks before the pixels of a GIF, of tags or strips of a TIFF, of boxes of an AVIF. A compressed text or
            profile and a segment of Exif data count as 1,000. The default takes about .3 s.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[int, int] | None = None
    max_side: int | None = Field(default=None, ge=8)
    crop: bool = True
    channels: Literal[1, 3] = 3
    member: str | None = Field(default=None, pattern=r"^[^:/]{1,200}$")
    formats: tuple[Format, ...] = FORMATS
    max_pixels: int = Field(default=50_000_000, gt=0)
    max_scan_pixels: int = Field(default=400_000_000, gt=0)
    max_chunks: int = Field(default=2**16, gt=0)

    @field_validator("member")
    @classmethod
    def _is_suffix(cls, member: str | None) -> str | None:
        if member is not None and member.startswith("."):
            raise ValueError(f"write the suffix without its first dot: {member.lstrip('.') or 'left.jpg'}")
        return member


def image_header(data: bytes, config: ImageConfig) -> ImageFile.ImageFile:
    """Parse the header only. Raises BadImage if it is missing, costs too much, or has a format that is not read."""
    if not data:
        raise BadImage("image is empty")
    kind = image_format(data)
    if kind is None:
        raise BadImage(NO_IMAGE)
    if kind not in config.formats:
        raise BadImage(f"{kind} image, and index.image.formats leaves {kind} out")
    _check_parts(data, config)
    data = _prepared(data, kind, config)
    name = kind.upper()
    try:
        if kind == "ppm":
            Image.open(io.BytesIO(data[:_MAX_PPM_HEADER]), formats=(name,))
        image = Image.open(io.BytesIO(data), formats=("JPEG", "MPO") if kind == "jpeg" else (name,))
    except Image.DecompressionBombError as error:
        raise BadImage(f"image claims more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from error
    except Exception as error:
        if kind == "avif" and not features.check("avif"):
            raise BadImage("avif image, which this version of Pillow does not read: install 11.3 or later") from error
        raise BadImage(f"{kind} image with a damaged header, or of a kind that is not read") from error
    if not _fits(image.height, image.width, config):
        raise BadImage(f"image claims {image.width} x {image.height} pixels, more than max_pixels {config.max_pixels}")
    if image.mode not in _MODES and not (kind in ("png", "ppm") and image.mode == "I"):  # 16 bits in 32
        raise BadImage(f"{kind} image of mode {image.mode}, whose range of values is unknown")
    if kind in ("ppm", "bmp") and image.tile[0][0] != "raw":  # Pillow decodes these in Python, 4 us a byte
        wrong = {"ppm": "numbers in text, or of a depth other than 1, 8 or 16 bits", "bmp": "run lengths"}
        raise BadImage(f"{kind} image of {wrong[kind]}")
    if kind == "ppm":
        _check_raster(data, image)
    if image.format in ("JPEG", "MPO"):
        _check_scans(data, image.height, image.width, config)
    return image


def image_format(data: bytes) -> Format | None:
    """Format by the first bytes; None for those that are not read."""
    head = data[:_MAGIC_BYTES]
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), None)


def _prepared(data: bytes, kind: Format, config: ImageConfig) -> bytes:
    """The bytes for Pillow, without parts that pixels do not need. Raises BadImage."""
    if kind == "png":
        return png_without_text(data)
    try:
        if kind == "tiff":
            return only_pixels(data, config.max_chunks, config.max_pixels, config.max_scan_pixels)
        if kind == "avif":
            n = decoded_pixels(data, config.max_chunks)
            if _AV1_COST * n > config.max_scan_pixels:
                raise BadImage(
                    f"the frames of an avif image have more than an eighth of max_scan_pixels {config.max_scan_pixels}"
                )
    except (BadTiff, BadAvif) as error:
        raise BadImage(str(error)) from error
    return data


def _check_raster(data: bytes, image: ImageFile.ImageFile) -> None:
    """Raise BadImage where a PPM has bytes behind its pixels: the only sign of a conversion of line ends, which puts a
    byte before each newline in header and pixels. Another image, or blanks, may follow."""
    tile = image.tile[0]
    raw = tile[3] if isinstance(tile[3], str) else str((tile[3] or ("",))[0])
    row = {b"P4": -(-image.width // 8), b"P5": image.width * (2 if "16" in raw else 1)}.get(data[:2], 3 * image.width)
    rest = data[tile[2] + row * image.height :]
    is_converted = data[tile[2] - 1 : tile[2] + 1] == b"\r\n"
    if rest and (is_converted or not _BEHIND_RASTER.match(rest)):
        raise BadImage("ppm image with more bytes than its header says: a conversion of line ends has moved its pixels")


def _fits(height: int, width: int, config: ImageConfig) -> bool:
    padded = max(height, _LEAST_SIDE) * max(width, _LEAST_SIDE)
    return height * width <= config.max_pixels and padded <= max(config.max_pixels, _LEAST_SIDE**2)


def _check_parts(data: bytes, config: ImageConfig) -> None:
    """Raise BadImage where the header has more parts than `max_chunks`; most images are too small for that."""
    limit = config.max_chunks
    if data.startswith(_JPEG):
        costly = data.count(b"Exif\0\0")
        if len(data) + COSTLY * costly > limit and jpeg_header(data, limit).parts > limit:
            raise BadImage(f"jpeg image of more segments than max_chunks {limit}")
    elif data.startswith(_PNG) and png_parts(data, limit) > limit:
        raise BadImage(f"png image of more chunks than max_chunks {limit}")
    elif data.startswith(b"GIF8") and gif_parts(data, limit) > limit:
        raise BadImage(f"gif image of more blocks before its pixels than max_chunks {limit}")


def _check_scans(data: bytes, height: int, width: int, config: ImageConfig) -> None:
    """Raise BadImage where all scans of a JPEG have more pixels than `max_scan_pixels`."""
    limit = config.max_scan_pixels
    # At most four components, padded to 32 pixels; the marker may also be in a thumbnail, or in a video behind it.
    if data.count(b"\xff\xda") * 4 * (height + -height % 32) * (width + -width % 32) <= limit:
        return
    header = jpeg_header(data, config.max_chunks)
    if jpeg_scan_samples(data, header, limit, config.max_chunks) > limit:
        raise BadImage(f"the scans of a jpeg image go over more pixels than max_scan_pixels {limit}")


def decode(data: bytes, config: ImageConfig, size: tuple[int, int] | None = None) -> Tensor:
    """Decode one image.

    Args:
        data: encoded image.
        config: channels and limits.
        size: (H, W) of the result; None keeps the size of the image.

    Returns:
        uint8 tensor (C, H, W).

    Raises:
        BadImage: the image is not decoded; the message is the reason.
    """
    return torch.from_numpy(decode_pixels(data, config, size)).permute(2, 0, 1).contiguous()


def decode_pixels(data: bytes, config: ImageConfig, size: tuple[int, int] | None = None) -> np.ndarray:
    """The same as an array (H, W, C), the layout of decoders."""
    pixels_HWC = _ordinary_jpeg(data, config)
    if pixels_HWC is None:
        header = image_header(data, config)
        try:
            pixels_HWC = _by_pillow(header, config.channels)
        except Exception as error:
            raise BadImage("image data is damaged") from error
    if size in (None, pixels_HWC.shape[:2]):
        return pixels_HWC
    return fit(torch.from_numpy(pixels_HWC).permute(2, 0, 1), size, config.crop).permute(1, 2, 0).numpy()


def _ordinary_jpeg(data: bytes, config: ImageConfig) -> np.ndarray | None:
    """Pixels of an ordinary JPEG within the limits; None for images that Pillow reads.

    Pillow's luminance differs by a rounding from a JPEG's own, so colour images with C = 1 are left to Pillow.
    """
    if not (data.startswith(_JPEG) and "jpeg" in config.formats and data.endswith(b"\xff\xd9")):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        known = colours == "Gray" or (colours in ("RGB", "YCbCr") and config.channels == 3)
        if not known or not _fits(height, width, config):
            return None
        _check_parts(data, config)
        _check_scans(data, height, width, config)
        return simplejpeg.decode_jpeg(data, "RGB" if config.channels == 3 else "GRAY")
    except BadImage:
        raise
    except (ValueError, KeyError):  # damage; KeyError: an unknown subsampling
        return None


def _by_pillow(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I"):
        image = image if image.mode in ("I", "I;16") else image.convert("I")
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.merge("RGB", image.split()[:3])
    image = image.convert("RGB" if channels == 3 else "L")
    return np.array(image).reshape(image.height, image.width, channels)


def fit(image_CHW: Tensor, size: tuple[int, int], crop: bool = True) -> Tensor:
    """Crop the centre to the proportions of `size` (H, W), then resize; an image of that size is returned unchanged.

    Neither way takes more memory than the image or the result: an image of 1 x 1,000,000 pixels, scaled to cover the
    result before it is cropped, or made taller before it is made narrower, would be a bomb.

    Args:
        image_CHW: image, uint8 or float.
        size: height and width of the result.
        crop: False stretches the whole image instead.
    """
    if tuple(image_CHW.shape[1:]) == size:
        return image_CHW
    height, width = image_CHW.shape[1:]
    if not crop:
        smaller_CHW = resized(image_CHW, (min(size[0], height), min(size[1], width)))
        return smaller_CHW if tuple(smaller_CHW.shape[1:]) == size else resized(smaller_CHW, size)
    scale = max(size[0] / height, size[1] / width)
    covered = [max(1, min(height, round(size[0] / scale))), max(1, min(width, round(size[1] / scale)))]
    top, left = round((height - covered[0]) / 2), round((width - covered[1]) / 2)
    return resized(image_CHW[:, top : top + covered[0], left : left + covered[1]], size)


def resized(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image resized to `size` (H, W): bilinear, antialiased.

    Equal to torchvision's `resize`, whose import takes three seconds.
    """
    return nn.functional.interpolate(image_CHW[None], size, mode="bilinear", antialias=True)[0]


def encode_png(image_CHW: Tensor) -> bytes:
    """Lossless PNG of a uint8 image (C, H, W) with C = 1 or 3."""
    pixels = image_CHW.cpu().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(file, "PNG")
    return file.getvalue()
