"""Small input that takes long, and names of one file: more rows of the table in test_hostile.py."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanitize import storage
from sanitize.tar.names import folded_path, is_portable
from tests.data.test_hostile import (
    END,
    HERE,
    JPEG,
    PNG,
    A,
    B,
    Case,
    check_outcome,
    chunk,
    encoded,
    header,
    item,
    long_name,
    members_of,
    pax,
    png,
    sample,
    selected,
    written,
)

pytestmark = pytest.mark.hostile
CASES: dict[str, Case] = {}


def between(name: str, middle: bytes, *rows: tuple[str, str], label: str = "cls") -> None:
    """Bad input that costs at most its own sample: the samples before and behind it survive."""
    CASES[name] = Case(A + middle + B + END, [("a", ""), *rows, ("b", "")], label=label)


# --- images -----------------------------------------------------------------------------------------------------

MANY = 70_000  # more than max_chunks


def segment(marker: int, body: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def flat_jpeg(side: int, n_scans: int, mode: str = "L") -> bytes:
    """One colour, progressive; its last scan `n_scans` times more."""
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * n_scans + whole[-2:]


def behind_start(middle: bytes) -> bytes:
    """A JPEG with something behind its first marker."""
    return JPEG[:2] + middle + JPEG[2:]


def webp(width: int, height: int, n_frames: int) -> bytes:
    """Animated, of that canvas, with frames of one pixel."""

    def part(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    def u24(*numbers: int) -> bytes:
        return b"".join(struct.pack("<I", number)[:3] for number in numbers)

    frame = part(b"ANMF", u24(0, 0, 0, 0, 10) + b"\0" + encoded("WEBP", size=1, lossless=True)[12:])
    head = part(b"VP8X", b"\2\0\0\0" + u24(width - 1, height - 1)) + part(b"ANIM", bytes(6))
    body = b"WEBP" + head + frame * n_frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def no_key(name: bytes, start: bytes, text: bytes = bytes(2**20 - 1)) -> bytes:
    """1 MiB of text in 1 KiB, which Pillow decompresses and does not count."""
    return chunk(name, start + zlib.compress(text, 9))


def empty_dynamic_blocks(n: int) -> bytes:
    """A deflate stream: n blocks of eleven bytes, each with Huffman tables of its own and without content."""
    bits = [0, 0, 1, *[0] * 10, 0, 1, 1, 1]  # not the last; dynamic; 257 literals, 1 distance; 18 code lengths
    for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1):
        bits += [int(symbol in (18, 1)), 0, 0]
    bits += [1, *[1] * 7, 1, *[(107 >> i) & 1 for i in range(7)], 0, 0, 0]  # 138 + 118 zeros, two codes, end of block
    return np.packbits(np.tile(np.array(bits, np.uint8), n // 8 * 8), bitorder="little").tobytes()


def png_of(stream: bytes) -> bytes:
    """An image of 8 x 8 with this zlib stream."""
    return png(8, 8, b"").replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", stream))


ROWS = bytes(72)
SCANS, SEGMENTS = "the scans of a jpeg image go over more pixels", "jpeg image of more segments than max_chunks"
CHUNKS, DAMAGED = "png image of more chunks than max_chunks", "damaged"
ONCE_MORE = zlib.compress(ROWS)[2:]
FRAMES = b"".join(chunk(b"fcTL", struct.pack(">IIIIIHHBB", i, 8, 8, 0, 0, 1, 1, 0, 0)) for i in range(MANY))
IMAGES: dict[str, tuple[bytes, str]] = {
    "jpeg of 480 scans over 49 megapixels": (flat_jpeg(7000, 480), SCANS),
    "jpeg of 480 scans over 49 megapixels in colour": (flat_jpeg(7000, 480, "RGB"), SCANS),
    "jpeg of 480 scans, and one byte behind its end": (flat_jpeg(7000, 480) + b"\0", SCANS),
    "jpeg of 20,000 scans over few pixels": (flat_jpeg(16, 20_000), ""),
    "jpeg of many application segments": (behind_start(segment(0xE3) * MANY), SEGMENTS),
    "jpeg of many comments": (behind_start(segment(0xFE) * MANY), SEGMENTS),
    "jpeg of many Huffman tables": (behind_start(segment(0xC4) * MANY), SEGMENTS),
    "jpeg of many quantisation tables": (behind_start(segment(0xDB) * MANY), SEGMENTS),
    "jpeg of many parts of a profile": (behind_start(segment(0xE2, b"ICC_PROFILE\0\0\1") * MANY), SEGMENTS),
    "jpeg of many restart markers": (behind_start(b"\xff\xd0" * MANY), SEGMENTS),
    "jpeg with fill bytes": (behind_start(b"\xff" * MANY), SEGMENTS),
    "jpeg with fill bytes that lead to nothing": (behind_start(b"\xff" * 10**6 + b"\0"), SEGMENTS),
    "jpeg with junk between segments": (behind_start(bytes(MANY)), SEGMENTS),
    "jpeg of 100 Exif segments": (behind_start(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 100), SEGMENTS),
    "jpeg of 10 Exif segments": (behind_start(segment(0xE1, b"Exif\0\0" + bytes(600)) * 10), ""),
    "jpeg without a scan": (JPEG[: JPEG.index(b"\xff\xda")], "image data is damaged"),
    "jpeg with a scan of no component it has": (
        JPEG.replace(b"\xff\xda\0\x0c\3\1", b"\xff\xda\0\x0c\3\x77"),
        "damaged",
    ),
    "png of 3.5 million empty chunks": (png(8, 8, ROWS, chunk(b"abAb", b"") * 3_500_000), CHUNKS),
    "png of many empty chunks behind its pixels": (png(8, 8, ROWS, after=chunk(b"abAb", b"") * MANY), CHUNKS),
    "png of many empty chunks of pixels": (png(8, 8, ROWS, chunk(b"IDAT", b"") * MANY), CHUNKS),
    "png of 5,000 empty chunks of pixels": (png(8, 8, ROWS, chunk(b"IDAT", b"") * 5000), ""),
    "png of 100 texts without a key": (png(8, 8, ROWS, no_key(b"zTXt", b"\0\0") * 100), CHUNKS),
    "png of 100 texts that are no UTF-8": (
        png(8, 8, ROWS, no_key(b"iTXt", b"k\0\1\0\0\0", b"\xff" * 2**20) * 100),
        CHUNKS,
    ),
    "png of 100 profiles": (png(8, 8, ROWS, no_key(b"iCCP", b"k\0\0") * 100), CHUNKS),
    "png of many frames": (png(8, 8, ROWS, chunk(b"acTL", struct.pack(">II", MANY, 0)) + FRAMES), CHUNKS),
    "png of 7 million rows of a pixel": (png(1, 7_000_000, bytes(14_000_000)), "more than max_pixels"),
    "png of 100,000 empty blocks": (png_of(b"\x78\x9c" + b"\0\0\0\xff\xff" * 100_000 + ONCE_MORE), ""),
    "png of 100,000 empty Huffman blocks": (png_of(b"\x78\x9c" + empty_dynamic_blocks(100_000) + ONCE_MORE), ""),
    "png with a chunk of 2 GiB": (PNG[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + PNG[33:], DAMAGED),
    "webp of 20,000 frames": (webp(1, 1, 20_000), ""),
    "webp of one pixel on a large canvas": (webp(8000, 8000, 1), "more than max_pixels"),
    "ppm of 10^11 columns": (b"P6 99999999999 1 255\n" + bytes(100), DAMAGED),
}
for name, (image, reason) in IMAGES.items():
    between(f"image: {name}", sample("x", image), ("x", reason))

# --- names ------------------------------------------------------------------------------------------------------

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
SAME = "names the same file as an earlier key"


def long_sample(key: str) -> bytes:
    return b"".join(
        long_name(f"{key}.{suffix}".encode()) + item(b"-", data) for suffix, data in (("png", PNG), ("cls", b"1"))
    )


between("key with ./ beside the one without", sample("x") + sample("./x"), ("x", ""), ("./x", SAME))
between("key with ./ before the one without", sample("./x") + sample("x"), ("./x", ""), ("x", SAME))
between("keys with ./", sample("./x") + sample("./y"), ("./x", ""), ("./y", ""))
between("key with // beside the one with /", sample("d/x") + sample("d//x"), ("d/x", ""), ("d//x", SAME))
between("key with /./", sample("d/x") + sample("d/./x"), ("d/x", ""), ("d/./x", SAME))
between("key in two Unicode forms", sample(NFC) + sample(NFD), (NFC, ""), (NFD, SAME))
between("key in Unicode form NFD", sample(NFD), (NFD, ""))
between("folder in two Unicode forms", sample(NFC + "/x") + sample(NFD + "/x"), (NFC + "/x", ""), (NFD + "/x", SAME))
between("keys that differ in case", sample("x") + sample("X"), ("x", ""), ("X", ""))
between(
    "folder with the name of a member",
    sample("x") + sample("x.png/y"),
    ("x", ""),
    ("x.png/y", "lies in a folder that has the name of an earlier member"),
)
between(
    "member with the name of a folder",
    sample("x.png/y") + sample("x"),
    ("x.png/y", ""),
    ("x", "has a member with the name of a folder"),
)
between("folder with the name of a key", sample("x") + sample("x/y"), ("x", ""), ("x/y", ""))
DEEP = "d/" * 100 + "x"
between("100 folders", long_sample(DEEP), (DEEP, "lies more than 64 folders deep"))
between("thousands of slashes", long_sample("d" + "/" * 4000 + "x"), ("d" + "/" * 4000 + "x", ""))
ACCENTS = "a" + "\u0301" * 1000 + "\u0327" * 900  # to be sorted by Unicode's rules, which takes n * n steps
between("2,000 accents on a letter", long_sample(ACCENTS), (ACCENTS, ""))
for key in ("con", "d/aux", "nul", "COM1", "x ", "d./x", "what?", "d\\x"):
    between(f"key for which Windows has another use: {key!r}", sample(key), (key, ""))
between("component of 300 bytes", long_sample("n" * 300), ("n" * 300, ""))

# --- the archive ------------------------------------------------------------------------------------------------

AT = len(A)
ENDLESS = "more extension headers before a member than max_headers_bytes"
CASES["3 MiB of global headers"] = Case(
    A + item(b"g", kind=b"g") * 6144 + B + END, [("a", HERE)], f"{ENDLESS} at byte {AT}"
)
CASES["3 MiB of long names"] = Case(A + long_name(b"x.png") * 3072 + B + END, [("a", HERE)], f"{ENDLESS} at byte {AT}")
SPARSE = bytearray(header(b"x.png", 0, b"S"))
SPARSE[482] = 1
SPARSE[148:156] = b"%06o\0 " % (sum(SPARSE[:148]) + sum(SPARSE[156:]) + 256)
MAP = bytes(504) + b"\1" + bytes(7)
CASES["sparse map of 3 MiB"] = Case(A + bytes(SPARSE) + MAP * 6144 + B + END, [("a", HERE)], f"{ENDLESS} at byte {AT}")
RECORDS = item(b"PaxHeader", b"5 a=\n" * 13_000, b"x")
between("pax header of 13,000 records", RECORDS + sample("x"), ("x", "broken extension header"))
between(
    "1,000 directories between two members",
    item(b"x.png", PNG) + item(b"d/", kind=b"5") * 1000 + item(b"x.cls", b"1"),
    ("x", ""),
)
between("pax time of 400 digits", pax((b"mtime", b"9" * 400)) + sample("x"), ("x", ""))

# --- compressed ---

CONTENT = A + B + END
WHOLE = gzip.compress(CONTENT, 0, mtime=0)
EMPTY = gzip.compress(b"", mtime=0)
BARREN, SMALL = (
    "compressed stream of little but headers, padding or empty blocks",
    "compressed stream of too many small",
)


def field(flag: int, value: bytes) -> bytes:
    """A compressed archive with another field in its header."""
    return WHOLE[:3] + bytes([flag]) + WHOLE[4:10] + value + WHOLE[10:]


def compressed(name: str, data: bytes, damage: str | None, *rows: tuple[str, str]) -> None:
    CASES[f"gzip: {name}"] = Case(data, list(rows), damage, "x.tar.gz")


BOTH = (("a", ""), ("b", ""))
compressed("name of 500 KB", field(8, b"n" * 500_000 + b"\0"), None, *BOTH)
compressed("name of 20 MB", field(8, b"n" * 20_000_000 + b"\0"), BARREN)
compressed("comment of 20 MB", field(16, b"n" * 20_000_000 + b"\0"), BARREN)
compressed("extra field of 64 KiB", field(4, b"\xff\xff" + bytes(65_535)), None, *BOTH)
compressed("9,000 empty members", EMPTY * 9000 + WHOLE, None, *BOTH)
compressed("500,000 empty members", EMPTY * 500_000 + WHOLE, SMALL)
compressed("a member for each byte", b"".join(gzip.compress(bytes([b]), 0, mtime=0) for b in CONTENT), None, *BOTH)
compressed("200,000 members of 40 bytes", gzip.compress(bytes(40), 0, mtime=0) * 200_000, "data behind the end")
compressed("500,000 empty members behind the content", WHOLE + EMPTY * 500_000, "data behind the end", *BOTH)
compressed("20 MB of padding", WHOLE + bytes(20_000_000), "data behind the end", *BOTH)
compressed(
    "20 MB of padding between members",
    gzip.compress(A + sample("c"), mtime=0) + bytes(20_000_000) + WHOLE,
    BARREN,
    ("a", ""),
    ("c", HERE),
)
compressed(
    "64 KiB of padding between members", gzip.compress(A, mtime=0) + bytes(65_536) + gzip.compress(B + END), None, *BOTH
)
compressed("4 million empty blocks", WHOLE[:10] + b"\0\0\0\xff\xff" * 4_000_000 + WHOLE[10:], BARREN)
compressed("300,000 empty Huffman blocks", WHOLE[:10] + empty_dynamic_blocks(300_000) + WHOLE[10:], BARREN)

# --- labels -----------------------------------------------------------------------------------------------------

for text, reason in {
    b"1_0": "label '1_0' is not an integer",
    b"0x1": "is not an integer",
    "\uff11".encode(): "is not an integer",
    b"\xa01": "is not an integer",
    b"1\x1c": "is not an integer",
    b"--1": "is not an integer",
    b"+1": "",
    b"01": "",
    b"1" * 10**6: "is not an integer",
}.items():
    between(f"label {text[:20]!r}", sample("x", label=text), ("x", reason))


def in_json(name: str, text: bytes, reason: str) -> None:
    other = item(b"a.png", PNG) + item(b"a.json", b'{"y": 1}')
    rows = [("a", ""), ("x", reason)]
    CASES[f"json {name}"] = Case(other + item(b"x.png", PNG) + item(b"x.json", text) + END, rows, label="json:y")


in_json("label of a million digits behind the point", b'{"y": 0.' + b"1" * 10**6 + b"}", "is not an integer")
in_json("label of 1e999999", b'{"y": 1e999999}', "label 'Infinity' is not an integer")
in_json("label that is a list in 400 lists", b'{"y": ' + b"[" * 400 + b"]" * 400 + b"}", "is not an integer")
in_json("label of half a character", b'{"y": "\\ud800"}', "is not an integer")
in_json("of 300,000 empty objects", b'{"y": 1, "z": [' + b"{}," * 300_000 + b"0]}", "")
in_json("of 80,000 fields", b"{" + b"".join(b'"%d":1,' % i for i in range(80_000)) + b'"y": 1}', "")
in_json("of one field 100,000 times", b"{" + b'"z":1,' * 100_000 + b'"y": 1}', "")


@pytest.mark.parametrize("name", CASES)
def test_every_sample_has_its_outcome(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda _: None)
    check_outcome(CASES[name], tmp_path)


def test_two_spellings_of_a_key_are_two_files_in_quarantine(tmp_path: Path) -> None:
    """All samples are unreadable, so all go to quarantine, under names that differ on any file system."""
    keys = ["x", "./x", "X", "d/x", "d//x", NFC, NFD, "con", "x.png/y", "y.", "y ", "q?", "e", "e.sanitize.json/f"]
    source = tmp_path / "in"
    source.mkdir()
    middle = b"".join(item(f"{key}.png".encode(), b"no image") + item(f"{key}.cls".encode(), b"1") for key in keys)
    (source / "x.tar").write_bytes(A + middle + B + END)
    dataset, selection = selected(source, tmp_path)
    shards = written(dataset, selection, tmp_path / "shards")
    quarantine = members_of(shards.file("quarantine/x.tar"))
    names = [name for name, _ in quarantine]
    assert len({folded_path(name) for name in names}) == len(names)
    assert all(map(is_portable, names))
    for name, data in quarantine:
        path = tmp_path / "extracted" / name.casefold()  # as a file system that ignores case would
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), name
        path.write_bytes(data)
    evidence = [json.loads(data) for name, data in quarantine if name.endswith(".sanitize.json")]
    assert [record["key"] for record in evidence] == [row["key"] for row in dataset.rows("x.tar").to_pylist()[1:-1]]
    assert [record["key"] for record in evidence if "renamed" in record] == [
        *("./x", "X", "d//x", NFD, "con", "x.png/y", "y ", "q?", "e.sanitize.json/f")
    ]


# --- time and memory --------------------------------------------------------------------------------------------

COSTS = """
import re, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sanitize.data.index import IndexConfig, index_shard

def peak():  # not ru_maxrss, which is that of the parent at first
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

index_shard(sys.argv[2], IndexConfig())
for path in sys.argv[2:]:
    before, start = peak(), time.process_time()
    index_shard(path, IndexConfig())
    print(f"{time.process_time() - start:.2f}", f"{peak() - before:.0f}", path.rpartition("/")[2], sep="|")
"""
MOST_SECONDS, MOST_MIB = 10, 400  # measured: .2 s and 66 MiB (42 MB of empty chunks); without budgets 43 s


def test_no_kind_takes_long(tmp_path: Path) -> None:
    """All shards of this file, one after another in a process of its own. The worst are printed (`pytest -s`)."""
    paths = []
    for i, case in enumerate(CASES.values()):
        paths.append(tmp_path / f"{i:03d}-{case.name}")
        paths[-1].write_bytes(case.shard)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COSTS, str(Path.cwd()), *map(str, paths)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    names = dict(zip((path.name for path in paths), CASES, strict=True))
    costs = [line.split("|") for line in result.stdout.splitlines()]
    assert len(costs) == len(CASES)
    for column, most, unit in ((0, MOST_SECONDS, "s"), (1, MOST_MIB, "MiB")):
        worst = max(costs, key=lambda cost: float(cost[column]))
        print(f"worst of {len(costs)}: {worst[column]} {unit}, {names[worst[2]]}")
        assert float(worst[column]) < most, names[worst[2]]
