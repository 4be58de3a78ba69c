"""How fast are shards indexed, decoded and written, beside the tools one would use instead?

    python -m benchmarks.throughput --quick [--json FILE]

Generated JPEGs with a .cls label: 50,000 of 32 x 32 in 10 shards, once with plain headers and once as webdataset writes
them (a PAX header before each), and 2,000 of about 200 KB in 4 shards. Each job is done by the stage of the pipeline in
one process, manifests and digests included, and by the others in turn; all read from the page cache; the best of
several runs counts.

    index           `index_shards`, check "headers", against a loop over webdataset's samples
    read + decode   `Dataset.batches`, against webdataset + torchvision.io, the better of 0 workers and one a core
    select-write    `write_selected`, 99 % kept, against webdataset + ShardWriter, tarfile, and `cp` of all

For the floor: `cp` puts nothing on the disk and hashes nothing; beside it stand `cp`, sync and one SHA-256 of the copy,
which is what an output that can be trusted costs on these cores. Exits with 1 where a target is missed.
"""

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.report import conclude, print_table
from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.data.writer import shard_writer
from sanitize.select import ContaminationRule, SelectConfig, WriteConfig, select_samples, write_selected

COMPUTE = Compute(device="cpu")
N_CLASSES, BATCH = 10, 256
DATA = {  # samples, shards, side, noise, JPEG quality, headers
    "small": (50_000, 10, 32, 4, 90, "plain"),
    "small, PAX": (50_000, 10, 32, 4, 90, "webdataset"),
    "large": (2_000, 4, 480, 31, 95, "plain"),
}
N_DISTINCT = 200
REPEAT_BELOW, REPEATS = 4.0, 3  # seconds of a run, and how often it is done then


def jpeg(rng: np.random.Generator, side: int, noise: float, quality: int) -> bytes:
    """A smooth picture with some noise on it."""
    low = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(low) + rng.normal(0, noise, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def generate(out: Path, n: int, n_shards: int, side: int, noise: float, quality: int, headers: str) -> None:
    """The shards of one set."""
    rng = np.random.default_rng(0)
    images = [jpeg(rng, side, noise, quality) for _ in range(N_DISTINCT)]

    def samples(shard: int) -> Iterator[tuple[str, bytes, int]]:
        for i in range(shard * n // n_shards, (shard + 1) * n // n_shards):
            yield f"{i:08d}", images[i % N_DISTINCT], i % N_CLASSES

    if headers == "webdataset":
        out.mkdir(parents=True)
        for shard in range(n_shards):
            with webdataset.TarWriter(str(out / f"{shard:04d}.tar")) as writer:
                for key, image, label in samples(shard):
                    writer.write({"__key__": key, "jpg": image, "cls": label})
        return

    def write(part: Part) -> None:
        for shard in range(n_shards):
            with shard_writer(part, f"{shard:04d}.tar") as tar:
                for key, image, label in samples(shard):
                    tar.add(f"{key}.jpg", image)
                    tar.add(f"{key}.cls", str(label).encode())

    make(Dataset, out, Recipe(stage="generate"), write)


def timed(run: Callable[[Path], Any], scratch: Path) -> float:
    """Seconds of the best run; `run` is given a folder that does not exist yet."""
    best = np.inf
    for _ in range(REPEATS):
        shutil.rmtree(scratch, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        run(scratch)
        best = min(best, time.perf_counter() - start)
        if best > REPEAT_BELOW:
            break
    return best


class Job:
    """One set of shards, and everything that is done with it; each method is given a folder for its output."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths = [str(path) for path in sorted((folder / "in").glob("*.tar"))]
        self.index_config = IndexConfig(check="headers", n_classes=N_CLASSES, image=ImageConfig(size=(side, side)))
        self.dataset = index_shards(self.index_config, self.paths, str(folder / "index"), COMPUTE)
        self.selection = select_one_percent(self.dataset, folder)
        self.removed = {
            (shard, key)
            for shard in self.dataset.shards
            for key, keep in zip(*self.selection.rows(shard, ["key", "keep"]).to_pydict().values(), strict=True)
            if not keep
        }

    def index(self, out: Path) -> None:
        """Labels and offsets; no payload is read."""
        index_shards(self.index_config, self.paths, str(out), COMPUTE)

    def index_digest(self, out: Path) -> None:
        """All bytes hashed, each image too."""
        index_shards(self.index_config.model_copy(update={"check": "digest"}), self.paths, str(out), COMPUTE)

    def index_decode(self, out: Path) -> None:
        """Each image decoded as well."""
        index_shards(self.index_config.model_copy(update={"check": "decode"}), self.paths, str(out), COMPUTE)

    def webdataset_read(self, _out: Path) -> None:
        """All samples, not decoded."""
        n = sum(1 for _ in webdataset.WebDataset(self.paths, shardshuffle=False))
        assert n == self.dataset.n_samples

    def decode(self, _out: Path) -> None:
        """All images, in batches."""
        n = sum(len(batch.images_BCHW) for batch in self.dataset.batches(BATCH))
        assert n == self.dataset.n_samples

    def webdataset_decode(self, n_workers: int) -> None:
        """The same, in the calling process or in workers."""
        samples = webdataset.WebDataset(self.paths, shardshuffle=False, empty_check=False)
        batches = samples.map(decoded).batched(BATCH, collation_fn=stacked)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=n_workers)
        n = sum(len(images_BCHW) for images_BCHW, _ in loader)
        assert n == self.dataset.n_samples

    def write(self, out: Path) -> None:
        """Clean and quarantine shards."""
        written = write_selected(WriteConfig(), self.dataset, self.selection, str(out), COMPUTE)
        assert written.manifest().counts["quarantined"] == len(self.removed) > 0

    def webdataset_write(self, out: Path) -> None:
        """Clean shards."""
        out.mkdir()
        for path in self.paths:
            name = Path(path).name
            with webdataset.TarWriter(str(out / name)) as writer:
                for sample in webdataset.WebDataset(path, shardshuffle=False):
                    if (name, sample["__key__"]) not in self.removed:
                        writer.write(sample)

    def tarfile_write(self, out: Path) -> None:
        """Clean shards."""
        out.mkdir()
        for path in self.paths:
            name = Path(path).name
            with tarfile.open(path, "r|") as source, tarfile.open(out / name, "w") as target:
                for member in source:
                    payload = source.extractfile(member)
                    if (name, member.name.partition(".")[0]) not in self.removed:
                        target.addfile(member, payload)

    def cp(self, out: Path) -> None:
        """All shards as they are."""
        out.mkdir()
        subprocess.run(["cp", *self.paths, str(out)], check=True)

    def cp_sync_hash(self, out: Path) -> None:
        """All shards as they are, on the disk, with a digest each."""
        self.cp(out)
        subprocess.run(["sync", *map(str, out.iterdir())], check=True)
        for path in out.iterdir():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")


def select_one_percent(dataset: Dataset, folder: Path) -> Selection:
    """One sample in a hundred, at random, goes to quarantine."""
    rng = np.random.default_rng(0)

    def write_part(shard: str, part: Part) -> None:
        table = dataset.rows(shard, ["position", "key", "label"])
        write_rows(part, shard, table.append_column("score", pa.array(rng.random(len(table), np.float32))))

    def finish(part: Part, _builder: object) -> None:
        part.write_json("scorer.json", {"config": {"kind": "random"}, "classes": {}})

    recipe = Recipe(stage="random_scores")
    scores = make(Scores, folder / "scores", recipe, parts=dataset.shards, write_part=write_part, finish=finish)
    config = SelectConfig(rule=ContaminationRule(rate=0.01, factor=1))
    return select_samples(config, dataset, [scores], str(folder / "selection"), COMPUTE)


def decoded(sample: dict[str, Any]) -> tuple[Tensor, int]:
    """What a user of webdataset and torchvision writes."""
    data = torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8)
    return decode_jpeg(data, ImageReadMode.RGB), int(sample["cls"])


def stacked(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch of them."""
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    """One row a job and tool."""
    generate(folder / "in", *DATA[name])
    job = Job(folder, DATA[name][2])
    n_bytes = sum(Path(path).stat().st_size for path in job.paths)
    n_cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []

    def row(task: str, tool: str, run: Callable[[Path], Any]) -> None:
        seconds = timed(run, folder / "out")
        rows.append({"data": name, "job": task, "tool": tool, "seconds": seconds})
        rows[-1] |= {"samples/s": round(job.dataset.n_samples / seconds), "MB/s": round(n_bytes / seconds / 1e6)}
        print(f"{name}: {task}, {tool}: {seconds:.2f} s", file=sys.stderr, flush=True)

    row("index", "sanitize, headers", job.index)
    row("index", "sanitize, digest", job.index_digest)
    row("index", "sanitize, decode", job.index_decode)
    row("index", "webdataset", job.webdataset_read)
    row("read + decode", "sanitize", job.decode)
    for n_workers in (0, n_cores):
        row(
            "read + decode",
            f"webdataset + torchvision, {n_workers} workers",
            lambda _, n=n_workers: job.webdataset_decode(n),
        )  # type: ignore[misc]
    row("select-write", "sanitize", job.write)
    row("select-write", "webdataset", job.webdataset_write)
    row("select-write", "tarfile", job.tarfile_write)
    row("select-write", "cp", job.cp)
    row("select-write", "cp, sync, SHA-256", job.cp_sync_hash)
    return rows


def check(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The ratios that have targets, and the lines for those that were missed."""

    def seconds(data: str, job: str, tool: str) -> float:
        return min(
            row["seconds"] for row in rows if (row["data"], row["job"]) == (data, job) and row["tool"].startswith(tool)
        )

    ratios = []
    for data in DATA:
        ours, theirs = seconds(data, "index", "sanitize, headers"), seconds(data, "index", "webdataset")
        ratios.append(
            {
                "data": data,
                "what": "index, times as fast as webdataset reads",
                "ratio": theirs / ours,
                "target": ">= 10",
            }
        )
        ours, theirs = (seconds(data, "read + decode", tool) for tool in ("sanitize", "webdataset"))
        ratios.append({"data": data, "what": "read + decode, times as fast", "ratio": theirs / ours, "target": ">= 2"})
        ours = seconds(data, "select-write", "sanitize")
        if data == "large":
            ratio = ours / seconds(data, "select-write", "cp")
            ratios.append({"data": data, "what": "select-write, times as long as cp", "ratio": ratio, "target": "<= 2"})
            ratio = ours / seconds(data, "select-write", "cp, sync, SHA-256")
            ratios.append({"data": data, "what": "select-write, times as long as cp, sync, SHA-256", "ratio": ratio})
        else:
            ratio = seconds(data, "select-write", "webdataset") / ours
            ratios.append({"data": data, "what": "select-write, times as fast", "ratio": ratio, "target": ">= 10"})
    missed = []
    for of in ratios:
        sign, _, bound = of.get("target", "").partition(" ")
        if bound and not (of["ratio"] >= float(bound) if sign == ">=" else of["ratio"] <= float(bound)):
            missed.append(f"{of['data']}: {of['what']}: {of['ratio']:.2f}, target {of['target']}")
    return ratios, missed


def main() -> None:
    """Measure all sets, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the default; there is no longer form yet")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows = []
    for name in DATA:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            rows += measure(name, Path(folder))
    print_table(rows, ["data", "job", "tool", "seconds", "samples/s", "MB/s"], "throughput")
    ratios, missed = check(rows)
    print_table(ratios, ["data", "what", "ratio", "target"], "targets")
    conclude(missed, arguments.json, start, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
