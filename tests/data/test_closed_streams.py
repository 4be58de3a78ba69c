"""However the reading of a shard, a table or a source ends: no open stream and no memory of it are left.

Nothing here waits for a garbage collection. One does not find everything: pyarrow hides references.
"""

import gc
import io
import lzma
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shard, index_shards
from sanitize.data.labels import read_table
from sanitize.data.samples import SampleLimits, ShardFile, ShardReader
from sanitize.data.tables import Scores, write_rows
from sanitize.errors import SanitizeError
from sanitize.importing import ImportConfig, import_data
from sanitize.select import SelectConfig, WriteConfig, select_samples, write_selected
from sanitize.tar.compression import CompressedStream
from sanitize.tar.read import TarReader
from tests.tar.test_compression import PACKERS, archive, zstd_block

pytestmark = pytest.mark.hostile

LIMITS = {"max_bad_fraction": 1, "max_bad_shards": 10}
N_SAMPLES = 12


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


MEMBERS = [member for i in range(N_SAMPLES) for member in ((f"{i:03d}.png", png(i)), (f"{i:03d}.cls", b"%d" % (i % 2)))]
CONTENT = archive(MEMBERS)


def with_large_window(how: str) -> bytes:
    """A stream that needs more memory than is given to it; empty where the compression has no such thing."""
    if how == "zstd":
        return b"\x28\xb5\x2f\xfd\0" + bytes([18 << 3]) + zstd_block(CONTENT[:1000], True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 28}]
    return lzma.compress(b"a", filters=filters) if how == "xz" else b""


def damaged(how: str) -> dict[str, bytes]:
    """Shards by the kind of their damage."""
    pack = PACKERS[how]
    whole, broken_archive = pack(CONTENT), pack(CONTENT[:5120] + b"\xff" + CONTENT[5121:])
    flips = random.Random(0).sample(range(len(whole) // 50, len(whole)), 8)
    return {
        "whole": whole,
        "cut": whole[: 2 * len(whole) // 3],
        "cut early": whole[:40],
        **{f"flipped at {at}": whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :] for at in flips},
        "another archive": pack(CONTENT[: len(CONTENT) // 2]),
        "broken archive": broken_archive,
        "data behind": whole + b"garbage",
        "another stream, cut": whole + whole[:90],
        "padding": pack(CONTENT[:5120]) + bytes(2 << 20) + whole,
        "large window": with_large_window(how) + whole,
        "large window behind": pack(CONTENT[:5120]) + with_large_window(how) + whole,
    }


READERS = (CompressedStream, ShardFile, TarReader)


def leaves_nothing(what: str, read: Callable[[], Any]) -> None:
    """Call `read` and drop the error that ends it; then no reader of archives is left, and no memory of Arrow."""
    gc.disable()
    gc.freeze()  # from now on, `get_objects` lists new objects alone
    try:
        before = pa.default_memory_pool().bytes_allocated()
        with suppress(SanitizeError):
            read()
        assert [type(one).__name__ for one in gc.get_objects() if issubclass(type(one), READERS)] == [], what
        end = time.monotonic() + 5
        while pa.default_memory_pool().bytes_allocated() > before:  # a thread of Arrow frees its part a little later
            assert time.monotonic() < end, what
            time.sleep(0.001)
    finally:
        gc.unfreeze()
        gc.enable()


def nothing_suspicious(dataset: Dataset, out: Path) -> Scores:
    def write(part: Part) -> None:
        for shard in dataset.shards:
            rows = dataset.rows(shard, ["position", "key", "label"])
            write_rows(part, shard, rows.append_column("score", pa.array([0.0] * len(rows), pa.float32())))
        classes = {label: {"separation": 0.0} for label in dataset.info["labels"]}
        part.write_json("scorer.json", {"config": {"kind": "none"}, "rule": "fdr", "classes": classes})

    return make(Scores, str(out), Recipe(stage="nothing_suspicious", inputs={"d": dataset.digest}), write)


def abandoned(path: str) -> None:
    samples = iter(ShardReader(path))
    next(samples, None)


INDEXING: dict[str, Callable[[str], Any]] = {
    "decode": lambda path: index_shard(path, IndexConfig(**LIMITS)),
    "headers": lambda path: index_shard(path, IndexConfig(check="headers", **LIMITS)),
    "few names": lambda path: index_shard(path, IndexConfig(limits=SampleLimits(max_listing_bytes=2000), **LIMITS)),
    "no class names": lambda path: index_shard(path, IndexConfig(label="png", classes="names", **LIMITS)),
    "inspect": lambda path: CliRunner().invoke(app, ["inspect", path]),
    "first sample": abandoned,
}


@pytest.mark.parametrize("how", PACKERS)
@pytest.mark.parametrize("reader", INDEXING)
def test_an_index_of_damaged_shards_leaves_nothing_open(tmp_path: Path, how: str, reader: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(CONTENT)
    INDEXING[reader](str(path))  # imports, once
    for kind, data in damaged(how).items():
        path.write_bytes(data)
        leaves_nothing(f"{how}, {kind}", lambda: INDEXING[reader](str(path)))


@pytest.mark.parametrize("how", PACKERS)
def test_a_shard_that_is_damaged_after_it_was_indexed_leaves_nothing_open(
    tmp_path: Path, how: str, compute: Compute
) -> None:
    path, numbers = tmp_path / "x.tar", count()
    path.write_bytes(PACKERS[how](CONTENT))
    dataset = index_shards(IndexConfig(), str(path), str(tmp_path / "index"), compute)
    scores = nothing_suspicious(dataset, tmp_path / "scores")
    selection = select_samples(SelectConfig(), dataset, [scores], str(tmp_path / "selection"), compute)

    def written() -> None:
        write_selected(WriteConfig(), dataset, selection, str(tmp_path / str(next(numbers))), compute)

    def first_batch() -> None:
        batches = dataset.batches(2)
        next(batches)

    readers: dict[str, Callable[[], Any]] = {
        "samples": lambda: sum(1 for _ in dataset.samples("x.tar")),
        "batches": lambda: sum(1 for _ in dataset.batches(5)),
        "first batch": first_batch,
        "write": written,
    }
    for name, read in readers.items():
        read()
        for kind, data in damaged(how).items():
            path.write_bytes(data)
            leaves_nothing(f"{how}, {kind}, {name}", read)
        path.write_bytes(PACKERS[how](CONTENT))


@pytest.mark.parametrize("how", ["", *PACKERS])
def test_an_image_that_cannot_be_decoded_leaves_nothing_open(tmp_path: Path, how: str, compute: Compute) -> None:
    members = [(name, data[:60] if name == "002.png" else data) for name, data in MEMBERS]
    path = tmp_path / "x.tar"
    path.write_bytes(PACKERS[how](archive(members)) if how else archive(members))
    config = IndexConfig.model_validate({"check": "digest", "image": {"size": [16, 16]}})
    dataset = index_shards(config, str(path), str(tmp_path / "index"), compute)
    for _ in range(3):
        leaves_nothing(how, lambda: sum(1 for _ in dataset.batches(2)))


def tables() -> dict[str, bytes]:
    file, keys = io.BytesIO(), [f"{i:03d}" for i in range(3000)]
    pq.write_table(pa.table({"key": keys, "class": keys, "image": [png(0)] * 3000}), file, row_group_size=100)
    whole = file.getvalue()
    flips = random.Random(0).sample(range(len(whole)), 40)
    return {
        "whole": whole,
        "cut": whole[:9000],
        "no such column": whole.replace(b"class", b"clasp"),
        **{f"flipped at {at}": whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :] for at in flips},
    }


def test_damaged_tables_and_sources_of_imports_leave_nothing_open(tmp_path: Path, compute: Compute) -> None:
    path, out = tmp_path / "x.parquet", tmp_path / "out"

    def imported() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settings = ImportConfig(max_refused_fraction=1, image_column="image", label_column="class")
        import_data(settings, str(path), str(out), compute)

    for read in (lambda: read_table(str(path), "class", "labels"), imported):
        path.write_bytes(tables()["whole"])
        with suppress(SanitizeError):
            read()
        for kind, data in tables().items():
            path.write_bytes(data)
            leaves_nothing(kind, read)
