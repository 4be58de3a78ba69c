"""What it takes to score a million embeddings from Parquet: memory and throughput of RobustRealNVP and RCA.

    python -m benchmarks.streaming_scores [--samples N] [--json FILE]

Writes 1,000,000 x 512 float32 embeddings as an artifact, 50 shards of 20,000 rows in ten classes (about 2 GB; deleted
at the end). Each scorer is fitted by `fit_scorer` and scores all of them by `score_shards`, each stage in an
interpreter of its own, with one thread and the scorers' default settings. Peaks are VmHWM, imports and all. Exits with
1 where one exceeds 1.5 GiB. Linux only.
"""

import argparse
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

from benchmarks.memory import status
from benchmarks.report import conclude, print_table
from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.tables import Embeddings, fixed_size_list, write_rows
from sanitize.score import (
    FittedScorer,
    RCAScorerConfig,
    RobustRealNVPScorerConfig,
    ScorerConfig,
    fit_scorer,
    score_shards,
)

N_SAMPLES, PER_SHARD, N_FEATURES, N_CLASSES = 1_000_000, 20_000, 512, 10
MOST_MIB = 1536
COMPUTE = Compute(device="cpu")
SCORERS: list[ScorerConfig] = [RobustRealNVPScorerConfig(), RCAScorerConfig()]


def write_embeddings(out: Path, n_samples: int) -> None:
    """`out/embeddings`: one Gaussian with a decaying spectrum a class."""
    rng = np.random.default_rng(0)
    mean_KD = rng.standard_normal((N_CLASSES, N_FEATURES), np.float32)
    mix_DD = rng.standard_normal((N_FEATURES, N_FEATURES), np.float32) / np.sqrt(1 + np.arange(N_FEATURES))[:, None] / 4

    def write_part(shard: str, part: Part) -> None:
        labels_N = rng.integers(0, N_CLASSES, PER_SHARD)
        z_ND = mean_KD[labels_N] + rng.standard_normal((PER_SHARD, N_FEATURES), np.float32) @ mix_DD
        columns = {"position": np.arange(PER_SHARD), "key": [f"{i:06d}" for i in range(PER_SHARD)], "label": labels_N}
        write_rows(part, shard, pa.table({**columns, "pooled": fixed_size_list(torch.from_numpy(z_ND))}))
        part.counts["samples"] += PER_SHARD

    shards = [f"{i:05d}.tar" for i in range(n_samples // PER_SHARD)]
    recipe = Recipe(stage="made_up_embeddings")
    make(Embeddings, out / "embeddings", recipe, parts=shards, write_part=write_part)


def measure(stage: str, config: ScorerConfig, out: Path) -> dict[str, float]:
    """Peak MiB and seconds of one stage; called in a fresh interpreter."""
    embeddings, imports, start = Embeddings.load(out / "embeddings"), status("VmRSS"), time.perf_counter()
    fitted, scores = (str(out / f"{config.kind}-{name}") for name in ("fitted", "scores"))
    if stage == "fit_scorer":
        fit_scorer(config, embeddings, fitted, COMPUTE)
    else:
        score_shards(config, FittedScorer.load(fitted), embeddings, scores, COMPUTE)
    return {"imports MiB": imports, "peak MiB": status("VmHWM"), "seconds": time.perf_counter() - start}


def main() -> None:
    """Write, fit, score, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=N_SAMPLES, help=f"a multiple of {PER_SHARD:,}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.samples < PER_SHARD or arguments.samples % PER_SHARD:
        parser.error(f"--samples must be a multiple of {PER_SHARD:,}")
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_embeddings(Path(folder), arguments.samples)
        for config in SCORERS:
            for stage in ("fit_scorer", "score_shards"):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_interpreter:
                    measured = fresh_interpreter.submit(measure, stage, config, Path(folder)).result()
                rows.append({"stage": f"{stage} {config.kind}", **measured})
                rows[-1]["samples/s"] = round(arguments.samples / measured["seconds"])
                print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows, list(rows[0]), f"{arguments.samples:,} embeddings of {N_FEATURES} features")
    missed = [
        f"{row['stage']}: {row['peak MiB']:.0f} MiB, more than {MOST_MIB}" for row in rows if row["peak MiB"] > MOST_MIB
    ]
    conclude(missed, arguments.json, start, rows=rows)


if __name__ == "__main__":
    main()
