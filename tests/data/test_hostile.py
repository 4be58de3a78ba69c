"""Every kind of bad input: a table of crafted shards, each taken through index, select and write and through the
command line; then problems outside a shard. In words: docs/hostile-input.md."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from flows.cli import app
from sanitize import storage
from sanitize.artifacts import Part, Recipe, make, verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.samples import SampleLimits
from sanitize.data.sources import find_shards, refuse_inside
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.errors import ConfigError, DataError, StorageError
from sanitize.select import SelectConfig, Shards, WriteConfig, select_samples, write_selected
from sanitize.tar.compression import HEAD_BYTES, compression_in, compression_of, unread_suffix
from sanitize.tar.read import unsafe_name
from sanitize.tar.write import TarWriter

pytestmark = pytest.mark.hostile


# --- crafting bytes ---------------------------------------------------------------------------------------------


def header(name: bytes, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    before = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0"
    after = kind + bytes(100) + magic + bytes(247)
    return before + b"%06o\0 " % (sum(before) + 8 * 32 + sum(after)) + after


def item(name: bytes, data: bytes = b"", kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    lines = []
    for key, value in records:
        tail = b" " + key + b"=" + value + b"\n"
        size = len(tail) + len(str(len(tail)))
        lines.append(b"%d" % (size + (len(str(size)) > len(str(len(tail))))) + tail)
    return item(b"PaxHeader", b"".join(lines), b"x")


def long_name(name: bytes) -> bytes:
    return item(b"././@LongLink", name + b"\0", b"L")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, pixels: bytes, *before: bytes, after: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + data + after + chunk(b"IEND", b"")


def encoded(format: str, mode: str = "RGB", size: int = 16, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, format, **options)
    return file.getvalue()


def scans(n: int) -> bytes:
    whole = encoded("JPEG", "L", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * n + whole[-2:]


PNG, END = encoded("PNG", size=6), bytes(1024)
TEXT_BOMB = zlib.compress(bytes(20_000_000), 9)
JPEG = encoded("JPEG", size=64)


def sample(key: str, image: bytes = PNG, label: bytes = b"1", suffix: str = "png") -> bytes:
    return item(f"{key}.{suffix}".encode(), image) + item(f"{key}.cls".encode(), label)


A, B = sample("a"), sample("b", label=b"0")


class Case(NamedTuple):
    """A shard, and everything that is to be known about it.

    `rows`: (key, reason, "" where the sample survives) of every sample, in order. A reason is a part of the whole one.
    """

    shard: bytes
    rows: list[tuple[str, str]]
    damage: str | None = None
    name: str = "x.tar"
    label: str = "cls"


CASES: dict[str, Case] = {}
HERE = "the shard is damaged here: "
AT = len(A + sample("l"))


def between(name: str, middle: bytes, *rows: tuple[str, str], label: str = "cls") -> None:
    """Bad input that costs at most its own sample: the samples before and behind it survive."""
    CASES[name] = Case(A + middle + B + END, [("a", ""), *rows, ("b", "")], label=label)


def at_the_end(name: str, tail: bytes, warning: str, *rows: tuple[str, str]) -> None:
    """An oddity at the end of a shard that costs no sample."""
    CASES[name] = Case(A + tail, [("a", ""), *rows], warning)


def rest_is_lost(name: str, tail: bytes, damage: str, last: str = "l") -> None:
    """Damage that ends a shard. It also costs the sample before it, which may be incomplete."""
    CASES[name] = Case(A + sample("l") + tail, [("a", ""), *[("l", "")] * (last != "l"), (last, HERE)], damage)


# --- the archive ---

rest_is_lost("cut in a header", B[:100], f"truncated in a header at byte {AT}")
rest_is_lost("cut in an image", B[: 512 + 40], f"truncated in a member at byte {AT}")
rest_is_lost("cut in a label", B[:-512], "truncated in a member", "b")
at_the_end(
    "cut between image and label", B[: 512 + len(PNG) + -len(PNG) % 512], "no end-of-archive marker", ("b", "no .cls")
)
at_the_end("cut before the end", b"", "no end-of-archive marker")
at_the_end("one zero block at the end", bytes(512), "a single zero block at the end")
at_the_end("samples behind the end", END + B + END, "another archive behind the end-of-archive marker is not read")
rest_is_lost("garbage between members", b"\xa5" * 512 + B + END, f"bad header checksum at byte {AT}")
rest_is_lost("a zero block between members", bytes(512) + B + END, f"data behind a single zero block at byte {AT}")
EIGHT_EIB, MINUS_ONE = b"\x80" + (2**63).to_bytes(11, "big"), b"\xff" * 12
rest_is_lost("size of 8 EiB", header(b"b.png", EIGHT_EIB) + B, "truncated in a member")
rest_is_lost("negative size", header(b"b.png", MINUS_ONE) + B, "bad size field")
rest_is_lost("negative size in octal", header(b"b.png", b"-0000000001") + B, "bad size field")
rest_is_lost("pax header of 8 EiB", header(b"p", EIGHT_EIB, b"x") + B, "truncated in an extension header")
rest_is_lost("long name of 8 EiB", header(b"p", EIGHT_EIB, b"L") + B, "truncated in an extension header")
rest_is_lost("extension header at the end", pax((b"path", b"b.png")) + END, "extension header without a member")
CASES["nothing at all"] = Case(b"", [], "an empty file of 0 bytes")
CASES["only the end"] = Case(END, [], None)
CASES["no tar at all"] = Case(b"a letter\n" * 200, [], "bad header checksum at byte 0")
STORED = gzip.compress(A + B + END, 0, mtime=0)  # level 0: byte n of the archive is byte n + 15 of the stream
CASES["gzip cut"] = Case(STORED[: 15 + len(A) + 600], [("a", HERE)], "compressed stream is cut", "x.tar.gz")
CASES["gzip cut before its checksum"] = Case(
    STORED[:-8], [("a", ""), ("b", HERE)], "compressed stream is cut", "x.tar.gz"
)
CASES["gzip with a wrong checksum"] = Case(
    STORED[:-8] + bytes(8), [("a", ""), ("b", HERE)], "compressed stream is corrupt", "x.tar.gz"
)
CASES["gzip of nothing"] = Case(b"", [], "an empty file of 0 bytes", "x.tgz")
CASES["gzip of an empty file"] = Case(gzip.compress(b"", mtime=0), [], "no end-of-archive marker", "x.tgz")
BEHIND = "data behind the end"  # of the compressed stream, or of the archive in it
BOTH: list[tuple[str, str]] = [("a", ""), ("b", "")]
for what, name in (("without saying so", "x.tar"), ("in capital letters", "x.TAR"), ("of short name", "x.TGZ")):
    CASES[f"gzip {what}"] = Case(STORED, BOTH, None, name)
PACKED = {
    "xz": lzma.compress(A + B + END),
    "bzip2": bz2.compress(A + B + END),
    "zstd": bytes(pa.compress(A + B + END, "zstd", asbytes=True)),
}
for what, data in PACKED.items():
    for name in ("x.tar", "x.TAR.XZ", "x.tbz", "x.tar.zst", "x.tar.gz"):
        CASES[f"{what} named {name}"] = Case(data, BOTH, None, name)
    CASES[f"{what} padded with zeros"] = Case(data + bytes(700), BOTH)
    CASES[f"{what} with garbage behind it"] = Case(data + b"garbage", BOTH, BEHIND)
    CASES[f"{what} of half an archive, and garbage"] = Case(
        data[: len(data) // 2] + b"\xff" * 600, [], "compressed stream is corrupt"
    )
    CASES[f"{what} cut"] = Case(data[:40], [], "compressed stream is cut")
CASES["gzip that is none"] = Case(A + B + END, BOTH, None, "x.tar.gz")
CASES["gzip of several members"] = Case(gzip.compress(A, mtime=0) + gzip.compress(B + END, mtime=0), BOTH)
CASES["gzip padded with zeros"] = Case(STORED + bytes(700), BOTH)
for what, tail in (
    ("garbage", b"garbage"),
    ("a single byte", b"g"),
    ("zeros and garbage", bytes(40_000) + b"garbage"),
    ("half a header", b"\x1f\x8b\x08"),
    ("a member that is cut", STORED[:300]),
    ("a member of unknown method", b"\x1f\x8b\x09" + bytes(40)),
):
    CASES[f"gzip with {what} behind it"] = Case(STORED + tail, BOTH, BEHIND, "x.tar.gz")
CASES["gzip with another one behind it"] = Case(
    STORED * 2, BOTH, "another archive behind the end-of-archive marker is not read", "x.tar.gz"
)
CASES["gzip with garbage where an archive goes on"] = Case(
    gzip.compress(A, mtime=0) + b"garbage" + gzip.compress(B + END, mtime=0),
    [("a", HERE)],
    "compressed stream is corrupt",
)
CASES["gzip cut in its header"] = Case(STORED[:6], [], "compressed stream is cut", "x.tar.gz")
CASES["gzip of noise"] = Case(b"\x1f\x8b\x08\0" + bytes(6) + b"\xff" * 600, [], "compressed stream is corrupt")
for what, packed in (
    ("lzma", lzma.compress(A + B + END, lzma.FORMAT_ALONE)),
    ("lz4", bytes.fromhex("04224d18") + bytes(600)),
    ("zip", b"PK\x03\x04" + bytes(600)),
):
    for name in ("x.tar", "x.tar.gz", "x.TAR.LZ4"):
        said = "lz4" if name == "x.TAR.LZ4" else what
        CASES[f"{what} named {name}"] = Case(packed, [], f"{said} compressed: not read; repack it", name)
CASES["plain, named as something that is not read"] = Case(A + B + END, [], "lz4 compressed: not read", "x.tar.lz4")
CASES["gzip, named as something that is not read"] = Case(STORED, [], "lzma compressed: not read", "x.tlz")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
CASES["git lfs pointer"] = Case(POINTER, [], "a Git LFS pointer")
CASES["web page"] = Case(b"<!DOCTYPE html>\n<html><body>404" + b" " * 600, [], "a web page")
CASES["tar whose first name looks like bzip2"] = Case(sample("BZh91AY") + A + END, [("BZh91AY", ""), ("a", "")])

# --- members ---

IRREGULAR, REFUSED = "is no regular file: ", "is refused: "
BAD_PAX = item(b"PaxHeader", b"99999999999999999999 path=y.png\n", b"x")
between("pax record of absurd length", BAD_PAX + sample("x"), ("x", REFUSED + "broken extension header"))
between("pax size of 10^30", pax((b"size", b"1" + b"0" * 30)) + sample("x"), ("x", REFUSED + "broken extension header"))
between("pax size below zero", pax((b"size", b"-1")) + sample("x"), ("x", REFUSED + "broken extension header"))
between("pax header of 1 MiB", pax((b"path", b"n" * 2**20)) + sample("x"), ("x", "larger than max_extension_bytes"))
between(
    "pax name of 60 KB",
    pax((b"path", b"n" * 60_000)) + sample("x"),
    ("n" * 4096, "name longer than"),
    ("x", "no image"),
)
between(
    "long name of 64 KiB", long_name(b"n" * 65_535) + sample("x"), ("n" * 4096, "name longer than"), ("x", "no image")
)
between("a thousand long names for one member", long_name(b"x.png") * 1000 + sample("x"), ("x", ""))
between("global pax header that renames all", item(b"g", b"15 path=c.png\n\n", b"g"))
CASES["global pax header that renames all"] = CASES["global pax header that renames all"]._replace(
    damage="a global header that is broken, or renames or resizes members, was ignored"
)
between("sparse file", item(b"x.png", PNG, b"S") + sample("x"), ("x", IRREGULAR + "sparse file"))
SPARSE = pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"%d" % 2**62), (b"GNU.sparse.name", b"x.png"))
between("sparse file of 4 EiB in pax", SPARSE + sample("x"), ("x", IRREGULAR + "sparse file"))
for what, kind in {
    "symbolic link": b"2",
    "hard link": b"1",
    "character device": b"3",
    "block device": b"4",
    "fifo": b"6",
}.items():
    between(what, item(b"x.png", kind=kind) + item(b"x.cls", b"1"), ("x", IRREGULAR + what))
between("unknown type", item(b"x.png", PNG, b"~") + item(b"x.cls", b"1"), ("x", IRREGULAR + "type '~'"))
between(
    "directories",
    item(b"d/", kind=b"5") + item(b"x.png", PNG) + item(b"e/", kind=b"5") + item(b"x.cls", b"1"),
    ("x", ""),
)

between(
    "files of macOS beside others",
    item(b"._x.png", PNG) + item(b"x.png", PNG) + item(b"._x.cls", b"?") + item(b"x.cls", b"1") + item(b".DS_Store"),
    ("x", ""),
)
between("link with the name of a file of macOS", item(b"._x.png", kind=b"2"), ("", IRREGULAR + "symbolic link"))
for name, key, reason in (
    ("../x", "../x", "'..' component"),
    ("d/../../x", "d/../../x", "'..' component"),
    ("..\\x", "", "'..' component"),  # in webdataset, too, the key ends at the first dot
    ("/etc/x", "/etc/x", "absolute path"),
    ("C:x", "C:x", "drive letter"),
    ("x\x1b[31m\x07", "x\\x1b[31m\\x07", "control character"),
    ("x\n", "x\\x0a", "control character"),
    ("x\x9b31m", "x\\x9b31m", "control character"),
    ("[/red]", "[/red]", ""),  # markup of the library that prints our tables
    ("\u202ecod\u202c", "\\x202ecod\\x202c", ""),
    ("x y", "x y", ""),
    ("", "", "nothing before its first dot"),
    ("d/", "d/", "nothing before its first dot"),
):
    between(f"name {name!r}", sample(name), (key, reason))
NUL = pax((b"path", b"x\0/y.png")) + item(b"x.png", PNG)
between("name with NUL in pax", NUL, ("x\\x00/y", "control character"))
between("name that is empty", item(b"", PNG) + sample("x"), ("", "unsafe member name"), ("x", ""))
between("name that is not UTF-8", item(b"caf\xe9.png", PNG) + item(b"caf\xe9.cls", b"1"), ("caf\\xe9", ""))
between("file whose name ends in a slash", item(b"x/", PNG) + sample("x"), ("x/", "nothing before"), ("x", ""))
LONGEST = "n" * 4090  # a member's name may have 4096 bytes; the evidence beside it would have more
between("name as long as can be", long_name(LONGEST.encode() + b".png") + item(b"-", PNG), (LONGEST, "no .cls"))

# --- samples ---

between("key twice, side by side", sample("x") + sample("x", label=b"0"), ("x", "'x.png' occurs twice"))
between("key again later", sample("x") + A + sample("y"), ("x", ""), ("a", "occurs a second time"), ("y", ""))
between("two images", item(b"x.jpg", JPEG) + sample("x"), ("x", "2 image members"))
between("two images of other case", item(b"x.PNG", PNG) + sample("x"), ("x", "'x.png' occurs twice"))
between("no image", item(b"x.cls", b"1"), ("x", "no image member"))
between("no label", item(b"x.png", PNG), ("x", "no .cls member"))
between("two labels", item(b"x.CLS", b"2") + sample("x"), ("x", "'x.cls' occurs twice"))
between("own evidence", item(b"x.sanitize.json", b'{"status": "kept"}') + item(b"x.png", PNG), ("x", "no .cls member"))
between(
    "key like that of a renamed one",
    sample("../x") + item(b"sample-00000001.cls", b"1"),
    ("../x", "unsafe"),
    ("sample-00000001", "no image"),
)
between("101 members", sample("x") + b"".join(item(b"x.%d" % i) for i in range(99)), ("x", "more than max_members 100"))

for text, reason in {
    b"cat": "label 'cat' is not an integer",
    b"-1": "label -1 is not in 0..999",
    b"1000": "label 1000 is not in 0..999",
    b"1" + b"0" * 400: "is not an integer",
    "\u0663".encode(): "is not an integer",
    b"1.0": "label '1.0' is not an integer",
    b"1e0": "is not an integer",
    b"": "label '' is not an integer",
    b"\xef\xbb\xbf1": "is not an integer",
    b"1\0": "label '1\\x00' is not an integer",
    b"[/red]\x1b[2J": "label '[/red]\\x1b[2J' is not an integer",
    b"1 1": "label '1 1' is not an integer",
    b" " * 5_000_000 + b"x": "is not an integer",
}.items():
    between(f"label {text[:20]!r}", sample("x", label=text), ("x", reason))
between("label with newlines", sample("x", label=b"\r\n1 \n"), ("x", ""))


def in_json(name: str, text: bytes, reason: str) -> None:
    one = item(b"x.png", PNG) + item(b"x.json", text)
    other = item(b"a.png", PNG) + item(b"a.json", b'{"y": 1}')
    CASES[f"json {name}"] = Case(other + one + END, [("a", ""), ("x", reason)], label="json:y")


for name, text, reason in (
    ("with the label as text", b'{"y": "1"}', ""),
    ("with a byte order mark", b'\xef\xbb\xbf{"y": 1}', ""),
    ("nested 100,000 deep", b"[" * 100_000, "not valid JSON"),
    ("label of 5,000 digits", b'{"y": ' + b"9" * 5000 + b"}", "JSON"),
    ("label of 400 digits", b'{"y": ' + b"9" * 400 + b"}", "is not an integer"),
    ("label true", b'{"y": true}', "label 'true' is not an integer"),
    ("label null", b'{"y": null}', "label 'null' is not an integer"),
    ("label NaN", b'{"y": NaN}', "label 'NaN' is not an integer"),
    ("label 1.0", b'{"y": 1.0}', "is not an integer"),
    ("label twice", b'{"y": 1, "y": 0}', "field 'y' twice"),
    ("label twice, escaped", b'{"y": 1, "\\u0079": 0}', "field 'y' twice"),
    ("without the label", b'{"z": 1}', "no field 'y'"),
    ("array", b"[1]", "no field 'y'"),
    ("cut", b'{"y": 1', "not valid JSON"),
    ("of a million empty lists", b'{"y": 1, "z": [' + b"[]," * 10**6 + b"0]}", "larger than 1048576 bytes"),
):
    in_json(name, text, reason)

# --- images ---

DAMAGED, HEADER, NO_IMAGE = "image data is damaged", "damaged header", "not a jpeg, png, webp, ppm, bmp"
for name, image, reason in (
    ("of zero bytes", b"", "image is empty"),
    ("jpeg cut in half", JPEG[: len(JPEG) // 2], DAMAGED),
    ("jpeg without its last byte", JPEG[:-1], DAMAGED),
    ("progressive jpeg cut in half", encoded("JPEG", progressive=True)[:600], DAMAGED),
    ("jpeg that stops early, with an end marker", JPEG[: len(JPEG) * 3 // 4] + b"\xff\xd9", ""),  # as everywhere: grey
    ("png cut in half", PNG[: len(PNG) // 2], DAMAGED),
    ("webp cut in half", encoded("WEBP")[:100], HEADER),
    ("ppm cut in half", encoded("PPM")[:400], DAMAGED),
    ("png of 50,000 x 50,000", png(50_000, 50_000, bytes(1000)), "pixels"),
    ("png of 8,000 x 8,000", png(8000, 8000, bytes(1000)), "image claims 8000 x 8000 pixels, more than max_pixels"),
    ("png of 0 x 0", png(0, 0, b""), HEADER),
    ("jpeg of 65,535 x 65,535", bytes.fromhex("ffd8ffc0000b08ffffffff010111") + bytes(100), "pixels"),
    ("small jpeg of a thousand scans", scans(1000), ""),
    ("ppm of 50,000 x 50,000", b"P6 50000 50000 255\n" + bytes(100), "pixels"),
    ("ppm in text", b"P3 400 400 255\n" + b"0 " * 480_000, "ppm image of numbers in text"),
    ("ppm of 7 bits", b"P5 2000 2000 100\n" + bytes(4_000_000), "ppm image of numbers in text, or of a depth"),
    ("ppm behind a megabyte of comments", b"P6 " + b"# \n" * 350_000 + b"1 1 255\n\0\0\0", HEADER),
    ("png with a text bomb", png(8, 8, bytes(72), chunk(b"zTXt", b"k\0\0" + TEXT_BOMB)), ""),
    ("png with an international text bomb", png(8, 8, bytes(72), chunk(b"iTXt", b"k\0\1\0\0\0" + TEXT_BOMB)), ""),
    ("png with a profile bomb", png(8, 8, bytes(72), chunk(b"iCCP", b"k\0\0" + TEXT_BOMB)), ""),
    ("png with a text bomb at the end", png(8, 8, bytes(72), after=chunk(b"zTXt", b"k\0\0" + TEXT_BOMB)), ""),
    ("png with 20 MB behind its pixels", png(8, 8, bytes(20_000_000)), ""),
    ("gif", encoded("GIF"), ""),
    ("gif cut in half", encoded("GIF")[:850], DAMAGED),
    ("animated gif", encoded("GIF", save_all=True, append_images=[Image.new("RGB", (16, 16))]), ""),
    ("bmp", encoded("BMP"), ""),
    ("bmp cut in half", encoded("BMP")[:400], DAMAGED),
    ("tiff", encoded("TIFF"), ""),
    ("tiff cut in half", encoded("TIFF")[:400], "tiff image whose strips"),
    (
        "compressed tiff of several pages",
        encoded("TIFF", save_all=True, append_images=[Image.new("RGB", (16, 16))], compression="tiff_lzw"),
        "",
    ),
    ("ico", encoded("ICO"), NO_IMAGE),
    ("ppm through a conversion of line ends", encoded("PPM").replace(b"\n", b"\r\n"), "a conversion of line ends"),
    ("svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", NO_IMAGE),
    ("cmyk jpeg", encoded("JPEG", "CMYK"), ""),
    ("grey jpeg", encoded("JPEG", "L"), ""),
    ("grey png", encoded("PNG", "L"), ""),
    ("palette png", encoded("PNG", "P"), ""),
    ("16 bit png", encoded("PNG", "I;16") if "I;16" in Image.MODES else encoded("PNG", "I"), ""),
    ("png with alpha", encoded("PNG", "RGBA"), ""),
    (
        "jpeg lying on its side",
        encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
        "",
    ),
    ("animated webp", encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16))]), ""),
    ("jpeg of several pictures", encoded("MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))]), ""),
):
    between(f"image: {name}", sample("x", image), ("x", reason))


# --- from index to shards, and the command ----------------------------------------------------------------------


def zero_scores(dataset: Dataset, out: Path) -> Scores:
    """No sample is suspicious: the firewall removes only unreadable ones here."""

    def write(part: Part) -> None:
        for shard in dataset.shards:
            rows = [row for row in dataset.rows(shard).to_pylist() if row["status"] == "ok"]
            columns = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
            write_rows(part, shard, pa.table(columns | {"score": pa.array([0.0] * len(rows), pa.float32())}))
        classes = {label: {"separation": 0.0} for label in dataset.info["labels"]}
        part.write_json("scorer.json", {"config": {"kind": "none"}, "rule": "fdr", "classes": classes})

    return make(Scores, out, Recipe(stage="zero_scores", inputs={"dataset": dataset.digest}), write)


def selected(source: Path, out: Path, **config: Any) -> tuple[Dataset, Selection]:
    compute = Compute(device="cpu")
    dataset = index_shards(
        IndexConfig(max_bad_fraction=1, max_bad_shards=99, **config), str(source), str(out / "index"), compute
    )
    scores = zero_scores(dataset, out / "scores")
    return dataset, select_samples(SelectConfig(), dataset, [scores], str(out / "selection"), compute)


def written(dataset: Dataset, selection: Selection, out: Path) -> Shards:
    return write_selected(WriteConfig(), dataset, selection, str(out), Compute(device="cpu"))


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def members_of(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    if compression_in(data[:HEAD_BYTES]) == "zstd":
        data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CASES)
def test_every_sample_has_its_outcome(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)  # waiting for the disk would take most of the time
    check_outcome(CASES[name], tmp_path)


def check_outcome(case: Case, tmp_path: Path) -> None:
    """Take a shard through index, select and write, and through the command line; compare with `case`."""
    source = tmp_path / "in"
    source.mkdir()
    (source / case.name).write_bytes(case.shard)
    # Beside it a shard with one sample for each kind of label: an index without any usable sample is refused.
    (source / "other.tar").write_bytes(A + item(b"j.png", PNG) + item(b"j.json", b'{"y": 1}') + END)

    dataset, selection = selected(source, tmp_path, label=case.label)
    rows = dataset.rows(case.name).to_pylist()
    assert [row["key"] for row in rows] == [key for key, _ in case.rows]
    for row, (key, reason) in zip(rows, case.rows, strict=True):
        assert reason in (row["reason"] or ""), (key, row["reason"])
        assert (row["status"] == "ok") == (reason == ""), (key, row["reason"])
        assert (row["reason"] or "").isprintable()
    damage = dataset.info["shards"][case.name]["damage"]
    assert damage is None if case.damage is None else damage.startswith(case.damage)

    shards = written(dataset, selection, tmp_path / "shards")
    n_bad = sum(reason != "" for _, reason in case.rows)
    counts = shards.manifest().counts
    n_all = dataset.manifest().counts["samples"]
    assert counts.get("kept", 0) + counts.get("unreadable", 0) == n_all
    assert counts.get("unreadable", 0) == n_bad + 1
    assert verify(Path(shards.path)) == []

    kept = [sample for sample, row in dataset.samples(case.name) if row["status"] == "ok"]
    clean = shards.file(f"clean/{case.name}")
    if unread_suffix(case.name):  # its name would not say what is in it
        assert not clean.exists()
    else:
        assert members_of(clean) == [m for sample in kept for m in sample.members]
        assert compression_in(clean.read_bytes()[:HEAD_BYTES]) == compression_of(case.name)
    quarantine = shards.file(f"quarantine/{case.name}")
    assert quarantine.exists() == bool(n_bad)
    if n_bad:
        names = [name for name, _ in members_of(quarantine)]
        assert len({name.lower() for name in names}) == len(names)
        assert [name for name in names if unsafe_name(name) or name.endswith("/")] == []
        evidence = [json.loads(data) for name, data in members_of(quarantine) if name.endswith(".sanitize.json")]
        reasons = [record["reasons"][0]["reason"] for record in evidence if "reasons" in record]
        assert reasons == [row["reason"] for row in rows if row["status"] != "ok"]

    result = run("inspect", source, "--label", case.label, "--quiet")
    assert result.exit_code == 1, result.output  # one sample of other.tar is unreadable
    assert result.output.replace("\n", "").isprintable()
    assert ("damaged, 0 refused" in result.output) != bool(unread_suffix(case.name))
    assert (case.name in result.output) == (bool(n_bad) or case.damage is not None)


def test_a_third_of_it_at_once_through_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)
    source = tmp_path / "in"
    source.mkdir()
    cases = [case for case in CASES.values() if case.label == "cls"][::3]
    for i, case in enumerate(cases):
        (source / f"{i:03d}-{case.name}").write_bytes(case.shard)
    pixels = [encoded("PNG", size=6), encoded("PNG", "L", size=6)]
    plenty = b"".join(sample(f"k{i}", pixels[i % 2], b"%d" % (i % 2)) for i in range(40))
    (source / "plenty.tar").write_bytes(plenty + END)
    config = tmp_path / "config.yaml"
    quick = {"architecture": {"kind": "convnet", "widths": [4]}, "optim": {"epochs": 1, "batch_size": 32}}
    settings = {
        "shards": [str(source)],
        "embedder": quick,
        "compute": {"device": "cpu"},
        "index": {"max_bad_fraction": 1, "max_bad_shards": 99},
    }
    config.write_text(yaml.safe_dump(settings))
    result = run("clean", config, "--out", tmp_path / "run", "--direct", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.output.replace("\n", "").isprintable()
    result = run("clean", config, "--out", tmp_path / "run", "--direct", "--quiet", "--json")
    counts = json.loads(result.stdout)["samples"]
    assert counts["samples"] == counts["kept"] + counts["quarantined"] + counts["unreadable"]
    assert counts["samples"] == sum(len(case.rows) for case in cases) + 40
    assert counts["unreadable"] == sum(reason != "" for case in cases for _, reason in case.rows)
    assert run("verify", tmp_path / "run").exit_code == 0


@pytest.mark.parametrize("name", ["no tar at all", "nothing at all", "only the end", "label b'cat'"])
def test_too_much_bad_data_is_exit_code_1(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(CASES[name].shard)
    result = run("clean", "--shards", tmp_path / "in", "--out", tmp_path / "run", "--direct", "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "unreadable" in result.output or "no usable sample" in result.output


def test_markup_in_a_label_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "[bold]x.tar").write_bytes(sample("x", label=b"[/red]") + END)
    result = run("clean", "--shards", tmp_path / "in", "--out", tmp_path / "run", "--direct", "--quiet")
    assert result.exit_code == 1
    assert "label '[/red]' is not an integer" in result.output
    result = run("inspect", tmp_path / "in", "--quiet")
    assert "[bold]x.tar" in result.output


def test_the_same_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("x.tar", "y.tar"):
        (tmp_path / "in" / name).write_bytes(A + END)
    dataset, selection = selected(tmp_path / "in", tmp_path)
    shards = written(dataset, selection, tmp_path / "shards")
    assert [members_of(Path(path)) for path in shards.clean()] == [[("a.png", PNG), ("a.cls", b"1")]] * 2


def test_pickles_are_carried_and_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    data = pickle.dumps(Bomb())
    (tmp_path / "in").mkdir()
    names = ("a.pickle", "a.pkl", "a.pth", "a.pyd", "a.npy")
    (tmp_path / "in" / "x.tar").write_bytes(A + b"".join(item(name.encode(), data) for name in names) + B + END)
    dataset, selection = selected(tmp_path / "in", tmp_path)
    shards = written(dataset, selection, tmp_path / "shards")
    assert dict(members_of(shards.file("clean/x.tar")))["a.pth"] == data
    assert run("inspect", tmp_path / "in", "--quiet").exit_code == 0
    assert not (tmp_path / "executed").exists()


# --- time and memory --------------------------------------------------------------------------------------------

COSTS = """
import re, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sanitize.data.index import IndexConfig, index_shard
from sanitize.data.samples import SampleLimits

def peak():  # not ru_maxrss, which is that of the parent at first
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

for path in sys.argv[2:]:
    before, start = peak(), time.process_time()
    limits = SampleLimits(max_listing_bytes=2**24 if "long keys" in path else 2**26)
    rows, summary = index_shard(path, IndexConfig(limits=limits))
    seconds, grown = time.process_time() - start, peak() - before
    name = path.rpartition("/")[2].removesuffix(".tar.gz")
    print(name, "|", len(rows), "|", summary["damage"], f"({seconds:.1f} s, {grown:.0f} MiB)")
    assert grown < 250, (path, grown, "MiB")
    assert seconds < 15, (path, seconds, "s")
"""
GIBIBYTE = gzip.compress(bytes(2**24), 1) * 64  # a gzip stream may be made of several
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a member": (lambda: gzip.compress(header(b"x.png", 2**30)) + GIBIBYTE, "1 | no end-of-archive marker"),
    "badly named": (lambda: empty(f"../{i}.png" for i in range(100_000)), "100000 | no end-of-archive marker"),
    "long keys": (lambda: empty(f"{i}" + "n" * 4000 for i in range(5_000)), "3715 | more names than max_listing_bytes"),
    "one key": (lambda: empty(f"x.{i}" for i in range(100_000)), "1 | no end-of-archive marker"),
    "zeros": (lambda: GIBIBYTE, "0 | more than max_trailing_bytes"),
}


def empty(names: Iterable[str]) -> bytes:
    """Empty members of these names, compressed."""
    file = io.BytesIO()
    writer = TarWriter(file)
    for name in names:
        writer.add(name, b"")
    return gzip.compress(file.getvalue(), 1)


def test_bombs_cost_little_time_and_memory(tmp_path: Path) -> None:
    for name, (craft, _) in BOMBS.items():
        (tmp_path / f"{name}.tar.gz").write_bytes(craft())
    command = [sys.executable, "-W", "ignore", "-c", COSTS, str(Path.cwd()), *map(str, sorted(tmp_path.iterdir()))]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    for line, (name, (_, outcome)) in zip(result.stdout.splitlines(), BOMBS.items(), strict=True):
        assert line.startswith(f"{name} | {outcome}")


# --- shards that are no shards, or not where they were ----------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three shards of two samples, each with half a megabyte that does not compress."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).bytes(500_000)
        (folder / f"{i}.tar").write_bytes(A + item(b"a.bin", noise) + sample("x", b"") + B + END)
    return folder


def test_a_shard_that_changed_after_the_index_is_named(three: Path, tmp_path: Path) -> None:
    dataset, selection = selected(three, tmp_path)
    good = (three / "1.tar").read_bytes()
    flipped = bytearray(good)
    flipped[len(A) + 1000] ^= 1
    for bad in (bytes(flipped), good[:1000], b"", good + bytes(512), A + END):
        (three / "1.tar").write_bytes(bad)
        with pytest.raises(DataError, match=r"1\.tar has changed since it was indexed"):
            written(dataset, selection, tmp_path / "shards")
        assert not (tmp_path / "shards").exists()
        assert not list(tmp_path.rglob("clean/*1.tar")), "half a shard was left"
    (three / "1.tar").write_bytes(good)
    assert verify(Path(written(dataset, selection, tmp_path / "shards").path)) == []


def test_a_shard_that_is_gone_is_named_and_the_run_goes_on_when_it_is_back(three: Path, tmp_path: Path) -> None:
    dataset, selection = selected(three, tmp_path)
    whole = written(dataset, selection, tmp_path / "whole")
    (three / "1.tar").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"cannot open .*1\.tar"):
        written(dataset, selection, tmp_path / "shards")
    first = next(tmp_path.rglob(".shards.partial/files/clean/0.tar"))
    before = first.stat().st_ino
    (tmp_path / "away").rename(three / "1.tar")
    shards = written(dataset, selection, tmp_path / "shards")
    assert shards.file("clean/0.tar").stat().st_ino == before, "a finished shard was written again"
    assert shards.digest == whole.digest


def test_the_command_says_which_shard_is_gone_or_changed_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("x.tar", "y.tar"):
        body = b"".join(sample(f"{i}", label=b"%d" % (i % 2)) for i in range(20))
        (source / name).write_bytes(body + END)
    quick = {"architecture": {"kind": "convnet", "widths": [4]}, "optim": {"epochs": 1, "batch_size": 16}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"shards": [str(source)], "embedder": quick, "compute": {"device": "cpu"}}))
    command = ("clean", config, "--out", tmp_path / "run", "--direct", "--quiet")
    assert run(*command).exit_code == 0
    digest = Shards.load(tmp_path / "run/50-shards").digest
    for folder in ("50-shards", "90-report"):
        shutil.rmtree(tmp_path / "run" / folder)

    (source / "y.tar").rename(tmp_path / "away")
    result = run(*command)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "y.tar" in result.output
    (source / "y.tar").write_bytes(b"something else")
    result = run(*command)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "y.tar has changed" in result.output
    (tmp_path / "away").rename(source / "y.tar")
    assert run(*command).exit_code == 0
    assert Shards.load(tmp_path / "run/50-shards").digest == digest


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "broken.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    for name in ("fifo", "broken", "zero"):
        for source in (tmp_path / f"{name}.tar", f"file://{tmp_path}/{name}.tar", f"{tmp_path}/{name}.t*"):
            result = run("inspect", source, "--quiet")
            assert result.exit_code in (1, 2), result.output
            assert name in result.output
            assert "Traceback" not in result.output


def test_a_folder_named_like_a_shard_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "x.tar").mkdir(parents=True)
    result = run("inspect", tmp_path / "in", "--quiet")
    assert (result.exit_code, "x.tar: it is a folder" in result.output) == (1, True), result.output
    (tmp_path / "in" / "x.tar" / "y.tar").write_bytes(A + B + END)
    dataset, selection = selected(tmp_path / "in", tmp_path)
    assert len(members_of(Path(written(dataset, selection, tmp_path / "shards").clean()[0]))) == 4


def test_a_folder_without_shards_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for command in (
        ("inspect", tmp_path / "in"),
        ("clean", "--shards", tmp_path / "in", "--out", tmp_path / "o", "--direct"),
    ):
        result = run(*command, "--quiet")
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
        assert "no shards at" in result.output


@pytest.mark.parametrize("name", [b"a\nb.tar", b"a\x1b[2J.tar", b"caf\xe9.tar"])
def test_shard_names_that_no_terminal_or_table_can_hold_are_refused(name: bytes, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(A + END)
    result = run("inspect", tmp_path, "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert "rename it" in result.output
    assert result.output.strip().isprintable()


def test_names_as_long_as_can_be_are_written(tmp_path: Path) -> None:
    name = "/".join(["d" * 220] * 3) + "/" + "é" * 108 + ".tar"
    for path in (tmp_path / "in" / name, tmp_path / "in" / "x.tar"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(A + B + sample("c", b"") + END)
    dataset, selection = selected(tmp_path / "in", tmp_path)
    shards = written(dataset, selection, tmp_path / "shards")
    assert shards.file(f"clean/{name}").exists()
    assert shards.file(f"quarantine/{name}").exists()


def test_shard_names_that_lead_out_of_the_run_folder_are_refused() -> None:
    """In a bucket, '..' is an ordinary name."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store["/hostile/a.tar"] = fs.store["/hostile/../../etc/b.tar"] = fsspec.implementations.memory.MemoryFile()
    try:
        with pytest.raises(ConfigError, match=r"'\.\.' in its name"):
            find_shards(["memory://hostile/a.tar", "memory://hostile/../../etc/b.tar"])
    finally:
        fs.store.clear()


def test_folders_and_shards_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read every file, so the refusal is simulated."""
    (tmp_path / "x.tar").write_bytes(A + END)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "the file")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", denied)
        result = run("inspect", tmp_path, "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "x.tar" in result.output
    assert "Permission denied" in result.output
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        result = run("inspect", tmp_path, "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "cannot list" in result.output


def test_a_disk_that_fails_while_reading_is_a_data_error(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sanitize.data.samples.open_read", lambda _url: Failing())
    with pytest.raises(DataError, match=r"cannot read .*0\.tar: .*Input/output error"):
        selected(three, tmp_path)


# --- where results go -------------------------------------------------------------------------------------------


def test_results_inside_the_input_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.tar").write_bytes(A + B + END)
    monkeypatch.chdir(tmp_path)
    for source, out in (
        ("d", "d/run"),
        ("d", "d"),
        (".", "run"),
        ("d/**/*.tar", "d/e/run"),
        (f"file://{tmp_path}", "run"),
    ):
        for command in ("clean", "poison"):
            more = ["--direct"] if command == "clean" else []
            result = run(command, "--shards", source, "--out", out, "--quiet", *more)
            assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
            assert "lies inside" in result.output
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "x.tar"]
    for source in ("d/*.tar", "d/x.tar", "d/x{a,b}.tar"):
        refuse_inside([source], Path("d/run"))
    refuse_inside(["d"], Path("run"))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(A + B + END)
    (tmp_path / "file").write_bytes(b"")
    result = run("clean", "--shards", tmp_path / "in", "--out", tmp_path / "file", "--direct", "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    result = run("clean", "--shards", tmp_path / "in", "--out", "/proc/nowhere", "--direct", "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "/proc/nowhere" in result.output


@pytest.mark.parametrize("n", [0, 600, 10_000, 700_000, 1_200_000])
def test_a_disk_that_is_full_leaves_nothing_half_written(
    n: int, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream in which byte n is the first that does not fit."""
    dataset, selection = selected(three, tmp_path)
    whole = written(dataset, selection, tmp_path / "whole")
    room = n

    class Disk(io.BufferedWriter):
        def write(self, data: Any) -> int:
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def full_open(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        return Disk(io.FileIO(self, "w")) if mode == "wb" else open(self, mode, *args, **more)  # noqa: PTH123

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_open)
        with pytest.raises(
            StorageError, match=r"no space left to write .* more than [\d,]+ bytes, [\d,]+ bytes are free"
        ):
            written(dataset, selection, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    assert not list(tmp_path.rglob(".tmp-*"))
    assert written(dataset, selection, tmp_path / "shards").digest == whole.digest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs can only be mounted by root, and only where the kernel lets it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(three: Path, tmp_path: Path, small_disk: Path) -> None:
    dataset, selection = selected(three, tmp_path)
    with pytest.raises(StorageError, match="Make room"):
        written(dataset, selection, small_disk / "shards")
    assert not (small_disk / "shards").exists()
    assert not list(small_disk.rglob(".tmp-*"))
    finished = sorted(small_disk.rglob("clean/*.tar"))
    assert finished, "no shard fitted"
    before = finished[0].stat().st_ino
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    shards = written(dataset, selection, small_disk / "shards")
    assert shards.file(f"clean/{finished[0].name}").stat().st_ino == before
    assert verify(Path(shards.path)) == []


def test_a_full_disk_is_exit_code_1_and_one_line(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(A + B + END)
    (small_disk / "filler").write_bytes(bytes(1_200 * 1024 - 8192))
    result = run("clean", "--shards", tmp_path / "in", "--out", small_disk / "run", "--direct", "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "o space left" in result.output


def test_the_limits_are_part_of_the_recipe(tmp_path: Path) -> None:
    """Other limits may give other rows, so a folder made with them is not reused."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(A + B + END)
    digests = {
        selected(tmp_path / "in", tmp_path / f"{n}", limits=SampleLimits(max_members=n))[0].digest for n in (2, 3)
    }
    assert len(digests) == 2


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(A + B + END)
    with storage.exclusive(tmp_path / "run"):
        result = run("clean", "--shards", tmp_path / "in", "--out", tmp_path / "run", "--direct", "--quiet")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "another process is writing" in result.output


@pytest.mark.parametrize(
    "url", ["pipe:touch executed", "PIPE:touch executed", "{pipe,x}:touch executed", "ssh://h/x.tar"]
)
def test_urls_that_run_programs_are_exit_code_2(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("inspect", url), ("clean", "--shards", url, "--out", "run", "--direct")):
        result = run(*command, "--quiet")
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
        assert "is refused" in result.output
    assert not (tmp_path / "executed").exists()
