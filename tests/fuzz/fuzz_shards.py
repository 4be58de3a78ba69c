"""Fuzz the data plane: broken shards go through index, select (nothing is suspicious) and write.

    python -m tests.fuzz.fuzz_shards --seconds 300 --seed 0
    python -m tests.fuzz.fuzz_shards runs/fuzz/0-1234.tar.gz          # a shard that failed, once more

Case n of a seed is always the same shard. Whatever is in it: no exception but "no usable sample", samples in = clean +
quarantined + unreadable, kept members byte for byte as they were, bounded time and memory. Exit code 1 where one of
these does not hold; the shard is kept and named.
"""

import argparse
import bz2
import faulthandler
import gzip
import io
import json
import lzma
import re
import signal
import struct
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, features

from sanitize.artifacts import Part, Recipe, make, verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.samples import SampleLimits
from sanitize.data.tables import Scores, write_rows
from sanitize.errors import DataError
from sanitize.select import SelectConfig, WriteConfig, select_samples, write_selected
from sanitize.tar.compression import HEAD_BYTES, compression_in, decompressed
from sanitize.tar.names import as_path, folded_path, is_portable
from sanitize.tar.read import unsafe_name
from sanitize.tar.write import TarWriter
from tests.fuzz.loop import Case, cases_until

CONFIG = IndexConfig(
    max_bad_fraction=1,
    max_bad_shards=10**6,
    image=ImageConfig(max_pixels=10**6, max_scan_pixels=10**6, max_chunks=2000),
    limits=SampleLimits(max_sample_bytes=2**18, max_members=8, max_listing_bytes=2**20),
)
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # the disk's fsync takes most of the time otherwise
MOST_SECONDS = 10.0
MOST_BYTES = 300 * 2**20  # above what the process held before the first case
Rng = np.random.Generator


# --- making shards ----------------------------------------------------------------------------------------------


def _images() -> list[tuple[str, bytes]]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    made = []
    for suffix, format, mode, options in (
        ("png", "PNG", "RGB", {}),
        ("png", "PNG", "P", {}),
        ("png", "PNG", "RGBA", {}),
        ("png", "PNG", "I;16", {}),
        ("jpg", "JPEG", "RGB", {}),
        ("jpeg", "JPEG", "L", {"progressive": True}),
        ("jpg", "JPEG", "CMYK", {}),
        ("jpg", "MPO", "RGB", {"save_all": True, "append_images": [Image.fromarray(pixels)]}),
        ("webp", "WEBP", "RGB", {"lossless": True}),
        ("webp", "WEBP", "RGB", {"save_all": True, "append_images": [Image.fromarray(pixels)]}),
        ("ppm", "PPM", "RGB", {}),
        ("ppm", "PPM", "1", {}),
        ("bmp", "BMP", "RGB", {}),
        ("bmp", "BMP", "P", {}),
        ("gif", "GIF", "RGB", {"comment": b"c" * 600}),
        ("gif", "GIF", "RGB", {"save_all": True, "append_images": [Image.fromarray(255 - pixels)]}),
        ("tiff", "TIFF", "RGB", {}),
        ("tif", "TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("tif", "TIFF", "L", {"compression": "jpeg"}),
        ("tiff", "TIFF", "RGB", {"save_all": True, "append_images": [Image.fromarray(255 - pixels)]}),
        ("tiff", "TIFF", "RGB", {"big_tiff": True, "icc_profile": bytes(600)}),
        *([("avif", "AVIF", "RGB", {}), ("avif", "AVIF", "RGBA", {})] if features.check("avif") else []),
    ):
        file = io.BytesIO()
        image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
        (image.convert("I;16") if mode == "I;16" else image).save(file, format, **options)
        made.append((suffix, file.getvalue()))
    return made


def _shard(members: list[tuple[str, bytes]]) -> bytes:
    """An archive without its end."""
    file = io.BytesIO()
    writer = TarWriter(file)
    for name, data in members:
        writer.add(name, data)
    return file.getvalue()


IMAGES = _images()
LABELS = (b"0", b"1", b"1\n", b"-1", b"", b"cat", b"1000", b"9" * 30, "\u0663".encode(), b"+1", b"1_0", b"1\x1c")
KEYS = (
    "k",
    "d/k",
    "../k",
    "/k",
    "k\n",
    "k\x1b[2J",
    "C:k",
    "",
    "K",
    "caf\udce9",
    "n" * 150,
    "sample-00000001",
    "[/red]",
    "./k",
    "d//k",
    "d/./k",
    "k.png/k",
    "k.cls",
    "caf\u00e9",
    "cafe\u0301",
    "con",
    "k ",
    "k?",
    "d/" * 70 + "k",
)
# Parts of images of which there may be thousands; behind the start of one, Pillow reads each in Python.
PARTS = (
    b"\xff\xe3\0\2",
    b"\xff\xe1\0\x0aExif\0\0xx",
    b"\xff\xc4\0\2",
    b"\xff\xd0",
    b"\xff",
    b"\0",
    *(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (
            (b"abAb", b""),
            (b"IDAT", b""),
            (b"zTXt", b"\0\0" + zlib.compress(bytes(2**19), 9)),
            (b"iCCP", b"k\0\0" + zlib.compress(bytes(2**19), 9)),
            (b"fcTL", bytes(26)),
        )
    ),
)
GOOD = _shard([("good.png", IMAGES[0][1]), ("good.cls", b"1"), ("good1.png", IMAGES[0][1]), ("good1.cls", b"0")])
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
TYPES = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE)


def make_case(seed: int, n: int) -> tuple[str, bytes]:
    """Name and bytes of case `n`."""
    rng = np.random.default_rng((seed, n))
    data = _archive(rng)
    if rng.random() < 0.7:
        data = _damaged_headers(rng, data) if rng.random() < 0.4 else _damaged(rng, data)
    data = GOOD + data  # most cases shall get as far as the shards
    if rng.random() < 0.5:
        return NAMES[rng.integers(len(NAMES))] if rng.random() < 0.1 else "x.tar", data
    name, pack = PACKERS[rng.integers(len(PACKERS))]
    half = int(rng.integers(len(data))) if rng.random() < 0.2 else 0  # of two members
    more = rng.random() < 0.1
    data = (pack(rng, data[:half]) if half else b"") + pack(rng, data[half:])
    data = _with_more_than_content(rng, data, pack(rng, b"")) if more else data
    data = _damaged(rng, data) if rng.random() < 0.4 else data
    data += rng.bytes(int(rng.integers(1, 600))) if rng.random() < 0.2 else b""
    return NAMES[rng.integers(len(NAMES))] if rng.random() < 0.2 else name, data


def _gzip(rng: Rng, data: bytes) -> bytes:
    return gzip.compress(data, int(rng.integers(0, 7)), mtime=0)


def _xz(rng: Rng, data: bytes) -> bytes:
    check = (lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256)[rng.integers(4)]
    return lzma.compress(data, check=check, preset=int(rng.integers(0, 7)))


def _bzip2(rng: Rng, data: bytes) -> bytes:
    return bz2.compress(data, int(rng.integers(1, 10)))


def _zstd(rng: Rng, data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


PACKERS = (("x.tar.gz", _gzip), ("x.tar.xz", _xz), ("x.tar.bz2", _bzip2), ("x.tar.zst", _zstd))
NAMES = ("x.tar", "x.TGZ", "x.tar.xz", "x.tbz", "x.tar.zst")


def _archive(rng: Rng) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[rng.integers(3)], errors="surrogateescape") as tar:
        for i in range(int(rng.integers(1, 7))):
            odd = rng.random() < 0.25
            key = KEYS[rng.integers(len(KEYS))] if odd else f"{rng.integers(4) if rng.random() < 0.2 else i:03d}"
            for name, data in _members(rng, key):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if rng.random() < 0.03:
                    info.type, info.linkname, info.size = TYPES[rng.integers(len(TYPES))], "/etc/passwd", 0
                try:
                    tar.addfile(info, io.BytesIO(data))
                except (ValueError, UnicodeEncodeError):  # this format cannot hold this name
                    continue
    return file.getvalue()


def _members(rng: Rng, key: str) -> list[tuple[str, bytes]]:
    suffix, image = IMAGES[rng.integers(len(IMAGES))]
    image = _multiplied(rng, image) if rng.random() < 0.1 else image
    image = _damaged(rng, image) if rng.random() < 0.3 else image
    label = LABELS[rng.integers(len(LABELS))] if rng.random() < 0.2 else b"%d" % rng.integers(2)
    members = [(f"{key}.{suffix}", image), (f"{key}.cls", label)]
    for _ in range(int(rng.integers(10)) if rng.random() < 0.1 else 0):
        name = ("pth", "json", "sanitize.json", "png", "cls", "txt")[rng.integers(6)]
        members.insert(int(rng.integers(len(members) + 1)), (f"{key}.{name}", rng.bytes(int(rng.integers(700)))))
    if rng.random() < 0.1:
        members.pop(int(rng.integers(len(members))))
    return members


def _multiplied(rng: Rng, image: bytes) -> bytes:
    """A part of it, or of another, thousands of times; the last scan of a JPEG."""
    n = int(rng.integers(1, 3000))
    scan = image.rfind(b"\xff\xda")
    if scan > 0 and rng.random() < 0.3:
        return image[:-2] + image[scan:-2] * min(n, 100_000 // len(image[scan:-2]) + 1) + image[-2:]
    part = PARTS[rng.integers(len(PARTS))]
    at = 33 if image.startswith(b"\x89PNG") else 2
    return image[:at] + part * min(n, 200_000 // len(part)) + image[at:]


def _with_more_than_content(rng: Rng, data: bytes, empty: bytes) -> bytes:
    """A stream with empty members or padding; one of gzip also with a long name or empty blocks."""
    n = int(10 ** rng.uniform(0, 6.2))
    if not data.startswith(b"\x1f\x8b"):
        skipped = b"\x50\x2a\x4d\x18" + struct.pack("<I", n)  # a frame of zstd
        return (empty * min(n, 3000) + data, data + bytes(n) + empty + data, skipped + bytes(n) + data)[rng.integers(3)]
    return (
        data[:3] + b"\x08" + data[4:10] + b"n" * n + b"\0" + data[10:],
        empty * min(n, 3000) + data,
        data + bytes(n),
        data + bytes(n) + empty + data,
        data[:10] + b"\0\0\0\xff\xff" * (n // 5) + data[10:],
    )[rng.integers(5)]


def _damaged(rng: Rng, data: bytes) -> bytes:
    """A few of: other bytes, a cut, something left out, something twice, something put in between."""
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            return data
        unit = 512 if rng.random() < 0.3 else 1
        start = int(rng.integers(len(data))) // unit * unit
        stop = min(len(data), start + unit * int(rng.integers(1, 9)))
        piece = data[start:stop]
        new = (
            bytes(b ^ (1 << int(rng.integers(8))) for b in piece),
            rng.bytes(len(piece)),
            bytes(len(piece)),
            b"\xff" * len(piece),
            b"",
            piece * int(rng.integers(2, 5)),
            piece + rng.bytes(unit),
        )
        choice = int(rng.integers(len(new) + 1))
        data = data[:start] + (b"" if choice == len(new) else new[choice] + data[stop:])
    return data


def _damaged_headers(rng: Rng, data: bytes) -> bytes:
    """Other fields in headers, with checksums that are right: what random bytes would never hit."""
    blocks = bytearray(data)
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(int(rng.integers(1, 4)) if heads else 0):
        at = heads[rng.integers(len(heads))]
        start, stop = ((0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (345, 500))[
            rng.integers(8)
        ]
        width = stop - start
        new = (
            rng.bytes(width),
            b"%o" % rng.integers(2**40),
            b"\x80" + int(rng.integers(2**62)).to_bytes(11, "big"),
            b"\xff" * width,
            b"-1",
            b"xXgLKSDMV1234567"[(i := int(rng.integers(16))) : i + 1],
            b"..//..//etc/x.png",
            b"",
        )[rng.integers(8)]
        blocks[at + start : at + stop] = new[:width].ljust(width, b"\0")
        blocks[at + 148 : at + 156] = b" " * 8
        blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    return bytes(blocks)


# --- what must hold ---------------------------------------------------------------------------------------------


def check(path: Path, out: Path, compute: Compute) -> str:
    """Carry one shard through; what became of it in a word. AssertionError where something does not hold."""
    try:
        dataset = index_shards(CONFIG, str(path), str(out / "index"), compute)
    except DataError as error:
        if not str(error).startswith("no usable sample"):
            raise
        return "unusable"
    selection = select_samples(SelectConfig(), dataset, [_nothing_suspicious(dataset, out)], str(out / "s"), compute)
    shards = write_selected(WriteConfig(gzip_level=1), dataset, selection, str(out / "shards"), compute)

    counts = Counter(shards.manifest().counts)
    assert counts["kept"] == dataset.n_samples
    assert counts["kept"] + counts["quarantined"] + counts["unreadable"] == dataset.manifest().counts["samples"]
    assert verify(Path(shards.path)) == []
    raw = _plain(path)
    kept = [member for s, row in dataset.samples(path.name) if row["status"] == "ok" for member in s.members]
    assert all(data in raw for _, data in kept), "a kept member is not in the shard"
    assert _members_of(shards.file(f"clean/{path.name}")) == kept, "kept members are not as they were"
    assert not any(unsafe_name(name) for name, _ in kept), "an unsafe name among the clean"
    files = {as_path(name) for name, _ in kept}
    folders = {"/".join(parts[:n]) for parts in (file.split("/") for file in files) for n in range(1, len(parts))}
    assert len(files) == len(kept), "two names of one file among the clean"
    assert not files & folders, "a file among the clean has the name of a folder"
    if counts["unreadable"]:
        quarantine = _members_of(shards.file(f"quarantine/{path.name}"))
        names = [name for name, _ in quarantine]
        assert len(set(map(folded_path, names))) == len(names), "two of a name in quarantine"
        assert all(map(is_portable, names)), "a name in quarantine that some file system cannot hold"
        assert not any(unsafe_name(name) for name in names), "an unsafe name in quarantine"
        records = [json.loads(d) for name, d in quarantine if name.endswith(".sanitize.json") and b'"reasons"' in d]
        assert len(records) == counts["unreadable"], "a sample without evidence"
    return "damaged" if dataset.info["shards"][path.name]["damage"] else "whole"


def _nothing_suspicious(dataset: Dataset, out: Path) -> Scores:
    def write(part: Part) -> None:
        for shard in dataset.shards:
            rows = [row for row in dataset.rows(shard).to_pylist() if row["status"] == "ok"]
            columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
            write_rows(part, shard, pa.table(columns | {"score": pa.array([0.0] * len(rows), pa.float32())}))
        classes = {label: {"separation": 0.0} for label in dataset.info["labels"]}
        part.write_json("scorer.json", {"config": {"kind": "none"}, "rule": "fdr", "classes": classes})

    return make(Scores, out / "scores", Recipe(stage="nothing_suspicious", inputs={"d": dataset.digest}), write)


def _plain(path: Path) -> bytes:
    """The archive, as far as it can be decompressed; all members of gzip, of others what our own stream gives."""
    data, plain = path.read_bytes(), bytearray()
    compression = compression_in(data[:HEAD_BYTES])
    if compression != "gzip":
        stream = decompressed(io.BytesIO(data), compression) if compression else io.BytesIO(data)
        with suppress(EOFError, zlib.error):
            while piece := stream.read(1 << 16):
                plain += piece
        return bytes(plain)
    while data:
        stream = zlib.decompressobj(31)
        for i in range(len(data)):
            try:
                plain += stream.decompress(data[i : i + 1])  # byte by byte: what comes before an error counts
            except zlib.error:
                return bytes(plain)
            if stream.eof:
                break
        data = data[i + 1 :].lstrip(b"\0")
    return bytes(plain)


def _members_of(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    if compression_in(data[:HEAD_BYTES]) == "zstd":  # tarfile reads it from Python 3.14 on
        data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


# --- the loop ---------------------------------------------------------------------------------------------------


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """An exception after that time of the processor; where C code does not let it through, or the process waits, the
    end of the process after three times as much by the clock, with a traceback."""

    def late(*_: Any) -> None:
        raise AssertionError(f"took more than {seconds} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def peak_bytes() -> int:
    """Most memory this process ever held."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run_one(path: Path, most_bytes: int, compute: Compute) -> str:
    """Check one shard in a folder of its own, within the limits."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as out, at_most(MOST_SECONDS):
        outcome = check(path, Path(out), compute)
    assert peak_bytes() < most_bytes, f"memory rose to {peak_bytes() / 2**20:.0f} MiB"
    return outcome


def fuzz(seconds: float, seed: int, keep: Path) -> int:
    """Cases until the time is up; the exit code."""
    compute = Compute(device="cpu", threads=1)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        first = Path(folder) / "first.tar"
        first.write_bytes(GOOD + bytes(1024))
        check(first, Path(folder) / "first", compute)  # imports take their time, once

        def case(n: int) -> Case:
            name, data = make_case(seed, n)
            path = Path(folder) / name
            path.write_bytes(data)
            return path, lambda most_bytes: run_one(path, most_bytes, compute)

        outcomes, summary = cases_until(seconds, seed, keep, 20, case, peak_bytes, MOST_BYTES)
    if outcomes:
        print(f"{summary}: {', '.join(f'{count} {name}' for name, count in outcomes.most_common())}; nothing failed")
    return 0 if outcomes else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", nargs="?", type=Path, help="a shard that failed, to be tried once more")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where a shard that fails is kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.shard is None:
        return fuzz(options.seconds, options.seed, options.keep)
    print(run_one(options.shard, 2**62, Compute(device="cpu", threads=1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
