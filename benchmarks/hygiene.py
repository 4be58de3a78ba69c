"""What do the facts for `check_hygiene` cost the index, and how much memory does the stage take?

    python -m benchmarks.hygiene --quick [--json FILE]

Time: `index_shards` (check "decode") without and with `image_facts`, and `check_hygiene`, one after another, on the
first shard of CIFAR-10, GTSRB and the captions and on all flowers. CPU seconds of one thread, the least of several
rounds. Target: with facts at most 1.3 times as long as without.

Memory: peak of `check_hygiene` in a fresh interpreter on a made-up index, and on one of twice the samples; the
difference a sample. No two samples are alike. Target: 70 bytes. `--samples 0` leaves this out. Linux only.
"""

import argparse
import io
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.data import SHARED
from benchmarks.memory import status
from benchmarks.report import conclude, print_table
from sanitize.artifacts import ArtifactBuilder, Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data import image_facts
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import write_rows
from sanitize.hygiene.stage import HygieneConfig, check_hygiene

COMPUTE = Compute(device="cpu")
DATA = {  # shards, label
    "CIFAR-10": ("cifar10/train-000000.tar.gz", "cls"),
    "GTSRB": ("gtsrb/train-000000.tar.gz", "cls"),
    "captions": ("captions/captions-000000.tar", None),
    "flowers": ("flowers/flowers-*.tar", "json:label"),
}
MOST_TIME, MOST_BYTES = 1.3, 70
PER_SHARD = 2_000  # the stage reads one shard at a time, which should not hide what it holds


def seconds(name: str, n_rounds: int) -> dict[str, Any]:
    """Least CPU seconds of the index without and with facts, and of the stage."""
    pattern, label = DATA[name]
    shards = sorted(map(str, SHARED.glob(pattern)))
    if not shards:
        raise SystemExit(f"{SHARED / pattern} is missing: this benchmark needs the shared data folder")
    least = dict.fromkeys(("decode", "with facts", "check_hygiene"), np.inf)
    for _ in range(n_rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            index_shards(IndexConfig(label=label), shards, f"{folder}/plain", COMPUTE)
            middle = time.process_time()
            dataset = index_shards(IndexConfig(label=label, image_facts=True), shards, f"{folder}/facts", COMPUTE)
            end = time.process_time()
            check_hygiene(HygieneConfig(), dataset, f"{folder}/hygiene", COMPUTE)
            took = (middle - start, end - middle, time.process_time() - end)
            least = {what: min(before, now) for (what, before), now in zip(least.items(), took, strict=True)}
    ratio = least["with facts"] / least["decode"]
    whole = ratio + least["check_hygiene"] / least["decode"]
    return {"data": name, "images": dataset.n_samples, **least, "ratio": ratio, "ratio with check_hygiene": whole}


def made_up_index(out: Path, n_samples: int) -> Dataset:
    """An index with facts whose images are noise."""
    names = [f"{i:05d}.tar" for i in range(n_samples // PER_SHARD)]
    rng = np.random.default_rng(0)

    def write_part(shard: str, part: Part) -> None:
        n = PER_SHARD
        digests = [rng.bytes(32).hex() for _ in range(n)]
        side_N, position_N = np.full(n, 32, np.int32), np.arange(n)
        rows = {"position": position_N, "key": digests, "status": ["ok"] * n, "label": position_N % 10}
        write_rows(part, shard, pa.table(rows | {"height": side_N, "width": side_N, "sha256": digests}))
        facts = {field.name: pa.nulls(n, field.type) for field in image_facts.SCHEMA}
        zeros = ("red", "green", "blue", "low", "flat_top", "flat_bottom", "fill")
        facts |= {name: pa.array(np.zeros(n), image_facts.SCHEMA.field(name).type) for name in zeros}
        values = {"high": 200, "contrast": 50, "entropy": 5, "smoothness": 0.5, "colour": 99}
        facts |= {k: pa.array(np.full(n, v), image_facts.SCHEMA.field(k).type) for k, v in values.items()}
        facts["position"] = pa.array(position_N)
        facts["hash"] = pa.array(rng.integers(2**64, size=n, dtype=np.uint64))
        facts["thumbnail"] = pa.array([rng.bytes(256) for _ in range(n)], pa.binary(256))
        sink = io.BytesIO()
        pq.write_table(pa.table(facts, schema=image_facts.SCHEMA), sink, use_dictionary=False)
        part.write(image_facts.facts_name(shard), sink.getvalue())

    def finish(part: Part, _builder: ArtifactBuilder) -> None:
        counts = {"counts": {"samples": PER_SHARD, "unreadable": 0}}
        info = {"check": "decode", "n_classes": 10, "labels": dict.fromkeys(map(str, range(10)), n_samples // 10)}
        info |= {"image_size": [32, 32], "image": {}, "limits": {}, "shards": dict.fromkeys(names, counts)}
        part.write_json("dataset.json", info)

    return make(Dataset, out, Recipe(stage="made_up_index"), parts=names, write_part=write_part, finish=finish)


def peak(folder: Path) -> dict[str, float]:
    """MiB and CPU seconds of `check_hygiene` on the index in `folder`; called in a fresh interpreter."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
    imports, start = status("VmRSS"), time.process_time()
    check_hygiene(HygieneConfig(), Dataset.load(folder), str(folder.with_suffix(".hygiene")), COMPUTE)
    return {"imports": imports, "peak": status("VmHWM"), "seconds": time.process_time() - start}


def memory(n_samples: int) -> list[dict[str, Any]]:
    """Peaks of the stage on that many samples and on twice as many."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for n in (n_samples, 2 * n_samples):
            folder = Path(name) / str(n)
            made_up_index(folder, n)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_interpreter:
                rows.append({"samples": n, **fresh_interpreter.submit(peak, folder).result()})
    rows[1]["bytes a sample"] = (rows[1]["peak"] - rows[0]["peak"]) * 2**20 / n_samples
    return rows


def main() -> None:
    """Measure, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the default; there is no longer form yet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--samples", type=int, default=200_000, help="of the smaller made-up index")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    times = [seconds(name, arguments.rounds) for name in arguments.data]
    print_table(times, list(times[0]), f"CPU seconds, the least of {arguments.rounds} rounds")
    missed = [
        f"{row['data']}: with facts the index takes {row['ratio']:.2f} times as long, target {MOST_TIME}"
        for row in times
        if row["ratio"] > MOST_TIME
    ]
    peaks = memory(arguments.samples) if arguments.samples else []
    if peaks:
        print_table(peaks, list(peaks[1]), "check_hygiene: peak resident memory in MiB, CPU seconds")
        n_bytes = peaks[1]["bytes a sample"]
        missed += [f"{n_bytes:.0f} bytes a sample, target {MOST_BYTES}"] * (n_bytes > MOST_BYTES)
    conclude(missed, arguments.json, start, times=times, memory=peaks)


if __name__ == "__main__":
    main()
