"""Does memory stay where it is when the data grows tenfold? Peak of each stage of `sanitize clean`, embeddings given.

    python -m benchmarks.memory --quick [--json FILE]

Each stage runs in an interpreter of its own, on 22 and on 220 shards of 1,000 samples, two classes. Embeddings have
128 features, drawn as one Gaussian with a decaying spectrum a class, and a tight second cluster in class 0; images are
tiny, because index and writer hold one shard at a time whatever is in it. The smaller set is just large enough to fill
the sample that the default scorer holds, 10,000 rows of each class: below that, memory has to grow. Ten classes would
hold five times as much, and take five times as long to fill.

Peaks are VmHWM, the most the kernel saw the process hold, imports and all (getrusage would report the parent's). Exits
with 1 where ten times the data takes over 10 % more. Linux only.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.data import write_images
from benchmarks.report import conclude, print_table
from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings, Scores, Selection, fixed_size_list, write_rows
from sanitize.score import FittedScorer, SpectralConfig, ToxicDirectionConfig, fit_scorer, score_shards
from sanitize.select import (
    ContaminationRule,
    SelectConfig,
    SeparationRule,
    WriteConfig,
    select_samples,
    write_selected,
)

N_SHARDS, N_DISTINCT, PER_SHARD = 22, 11, 1000
N_CLASSES, N_FEATURES = 2, 128
MOST_GROWTH = 1.10
COMPUTE = Compute(device="cpu")
INDEX = IndexConfig(n_classes=N_CLASSES, image=ImageConfig(channels=1))
SCORERS = {
    "toxic_direction": (
        ToxicDirectionConfig(embedding="pooled", label_check=None, evidence=None),
        SelectConfig(rule=SeparationRule()),
    ),
    "spectral": (SpectralConfig(embedding="pooled"), SelectConfig(rule=ContaminationRule(rate=0.05))),
}
STAGES = ["index_shards"]
STAGES += [f"{stage} {kind}" for kind in SCORERS for stage in ("fit_scorer", "score_shards", "select_samples")]
STAGES += ["write_selected"]


def run_stage(name: str, out: Path) -> None:
    """One stage on the artifacts that the ones before it left in `out`."""
    stage, _, kind = name.partition(" ")
    if stage == "index_shards":
        index_shards(INDEX, str(out / "in"), str(out / "index"), COMPUTE)
        return
    dataset, compute = Dataset.load(out / "index"), COMPUTE
    if stage == "write_selected":
        selection = Selection.load(out / "toxic_direction/selection")
        write_selected(WriteConfig(), dataset, selection, str(out / "shards"), compute)
        return
    scorer, select = SCORERS[kind]
    fitted, scores, selection = (str(out / kind / name) for name in ("fitted", "scores", "selection"))
    if stage == "fit_scorer":
        fit_scorer(scorer, Embeddings.load(out / "embeddings"), fitted, compute)
    elif stage == "score_shards":
        score_shards(scorer, FittedScorer.load(fitted), Embeddings.load(out / "embeddings"), scores, compute)
    else:
        select_samples(select, dataset, [Scores.load(scores)], selection, compute)


def write_inputs(out: Path, n_shards: int) -> None:
    """Shards in `out/in`: few distinct ones under many names, so that they cost no disk."""
    images_NCHW = torch.randint(0, 256, (N_DISTINCT * PER_SHARD, 1, 8, 8), dtype=torch.uint8)
    shards = write_images(out / "distinct", "x", images_NCHW, torch.arange(len(images_NCHW)) % N_CLASSES, PER_SHARD)
    (out / "in").mkdir()
    for i in range(n_shards):
        (out / "in" / f"{i:05d}.tar").hardlink_to(shards.paths()[i % N_DISTINCT])


def write_embeddings(out: Path) -> None:
    """`out/embeddings`: for each sample of `out/index` a draw from its class."""
    dataset = Dataset.load(out / "index")
    rng = np.random.default_rng(0)
    scale_D = 1 / np.sqrt(1 + np.arange(N_FEATURES))
    mean_KD = rng.standard_normal((N_CLASSES, N_FEATURES), np.float32)
    mix_KDD = rng.standard_normal((N_CLASSES, N_FEATURES, N_FEATURES), np.float32) * scale_D[:, None] / 4
    trigger_D = 2 * rng.standard_normal(N_FEATURES, np.float32)

    def write_part(shard: str, part: Part) -> None:
        table = dataset.rows(shard, ["position", "key", "label"])
        labels_N = table["label"].to_numpy()
        z_ND = np.empty((len(table), N_FEATURES), np.float32)
        for label in range(N_CLASSES):
            rows = labels_N == label
            z_ND[rows] = mean_KD[label] + rng.standard_normal((rows.sum(), N_FEATURES), np.float32) @ mix_KDD[label]
        poison_N = (labels_N == 0) & (rng.random(len(table)) < 0.05)
        z_ND[poison_N] = mean_KD[0] + trigger_D + 0.3 * (z_ND[poison_N] - mean_KD[0])
        table = table.append_column("shard", pa.array([shard] * len(table)))
        write_rows(part, shard, table.append_column("pooled", fixed_size_list(torch.from_numpy(z_ND))))
        part.counts["samples"] += len(table)

    recipe = Recipe(stage="made_up_embeddings", inputs={"dataset": dataset.digest})
    make(Embeddings, out / "embeddings", recipe, parts=dataset.shards, write_part=write_part)


def status(name: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS is what this process holds, VmHWM the most it held."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(stage: str, out: Path) -> dict[str, float]:
    """MiB and seconds of one stage; called in a fresh interpreter."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
    imports, start = status("VmRSS"), time.perf_counter()
    run_stage(stage, out)
    return {"imports": imports, "peak": status("VmHWM"), "seconds": time.perf_counter() - start}


def run_all(n_shards: int) -> dict[str, dict[str, float]]:
    """Stage -> MiB and seconds, on `n_shards` shards."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_inputs(out, n_shards)
        for stage in STAGES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_interpreter:
                measured[stage] = fresh_interpreter.submit(measure, stage, out).result()
            if stage == "index_shards":
                write_embeddings(out)
            numbers = ", ".join(f"{name} {value:.1f}" for name, value in measured[stage].items())
            print(f"{n_shards} shards, {stage}: {numbers}", file=sys.stderr, flush=True)
    return measured


def main() -> None:
    """Measure both sizes, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the default; there is no longer form yet")
    parser.add_argument("--shards", type=int, default=N_SHARDS, help="of the smaller set")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    small, large = (run_all(n_shards) for n_shards in (arguments.shards, 10 * arguments.shards))
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        before, after = small[stage], large[stage]
        rows.append({"stage": stage, "imports": before["imports"], "1x": before["peak"], "10x": after["peak"]})
        rows[-1] |= {"1x seconds": before["seconds"], "10x seconds": after["seconds"]}
    peaks = [max(stage["peak"] for stage in measured.values()) for measured in (small, large)]
    rows.append({"stage": "the whole job", "1x": peaks[0], "10x": peaks[1]})
    for row in rows:
        row |= {"growth": row["10x"] - row["1x"], "ratio": row["10x"] / row["1x"]}
    n = arguments.shards * PER_SHARD
    title = f"peak resident memory, MiB: {n:,} and {10 * n:,} samples in shards of {PER_SHARD:,}"
    print_table(rows, ["stage", "imports", "1x", "10x", "growth", "ratio", "1x seconds", "10x seconds"], title)
    missed = [
        f"{row['stage']}: at most {MOST_GROWTH - 1:.0%} more memory for ten times the data, got {row['ratio'] - 1:.1%}"
        for row in rows
        if row["ratio"] > MOST_GROWTH
    ]
    conclude(missed, arguments.json, start, rows=rows)


if __name__ == "__main__":
    main()
