"""What does orchestration cost? Clean on 20 groups: direct calls beside threads, processes and Ray.

    python -m benchmarks.orchestration --quick [--json FILE]

Fashion-MNIST, 20 shards (quick: of 300 images, full: of 3,000), 20 groups, so that each sharded stage is 20 tasks and
one. The yardstick is the sum of the stage functions called directly, from `run.json`: no Prefect, no process started.
Beside it stands the wall time of the whole flow with each runner, against a server that runs already, as in a fleet;
two workers each, a local cluster for Ray. What is above the yardstick is the overhead; runners that use several cores
may make it negative. The first sharded stage has the start of workers in it: interpreters, imports, the cluster.

Target: no more than 10 % + 15 s above the yardstick. Exits with 1 where it is missed. Digests must be equal.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What workers need not know is imported where it is used: each process imports this module.
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise, and the others are not as polite
N_GROUPS, N_WORKERS = 20, 2
MOST_SHARE, MOST_SECONDS = 0.10, 15.0
RUNNERS = {
    "threads": {"kind": "threads", "workers": N_WORKERS},
    "processes": {"kind": "processes", "workers": N_WORKERS},
    "ray": {"kind": "ray"},
}


def settings(shards: list[str], runner: dict[str, Any]) -> dict[str, Any]:
    """One clean run on a CPU."""
    return {
        "shards": shards,
        "embedder": {"architecture": {"kind": "convnet", "widths": [16, 32, 64]}, "optim": {"epochs": 3}},
        "compute": {"device": "cpu"},
        "runner": runner,
        "n_groups": N_GROUPS,
    }


@contextmanager
def server() -> Iterator[float]:
    """A Prefect server on loopback; the seconds it took to answer."""
    from prefect.testing.utilities import prefect_test_harness

    began = time.perf_counter()
    with prefect_test_harness(server_startup_timeout=300):
        yield time.perf_counter() - began


def measure(name: str, config: dict[str, Any], out: Path, direct: bool) -> dict[str, Any]:
    """One row: wall seconds, seconds inside stages, and the digests of all artifacts."""
    from flows.start import start
    from sanitize.jobs.clean import CleanConfig

    began = time.perf_counter()
    start(CleanConfig.model_validate(config), out, direct)
    seconds = time.perf_counter() - began
    stages = json.loads((out / "run.json").read_text())["stages"]
    print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return {
        "runner": name,
        "wall s": seconds,
        "in stages s": sum(stage["seconds"] for stage in stages),
        "first stage s": stages[0]["seconds"],
        "digests": [stage["digest"] for stage in stages],
    }


def main() -> None:
    """Measure, print, check."""
    from benchmarks.data import fashion_mnist, write_images
    from benchmarks.report import conclude, print_table, quick_or_full

    args = quick_or_full(__doc__).parse_args()
    start = time.perf_counter()
    per_shard = 300 if args.quick else 3000
    images_NCHW, labels_N = fashion_mnist("train")
    n = N_GROUPS * per_shard
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = write_images(folder / "in", "train", images_NCHW[:n], labels_N[:n], per_shard).paths()
        rows = [measure("direct", settings(shards, RUNNERS["threads"]), folder / "direct", direct=True)]
        with server() as seconds:
            print(f"server: {seconds:.1f} s", file=sys.stderr, flush=True)
            rows += [
                measure(name, settings(shards, runner), folder / name, direct=False) for name, runner in RUNNERS.items()
            ]
    yardstick = rows[0]["in stages s"]
    most = MOST_SHARE * yardstick + MOST_SECONDS
    expected = rows[0]["digests"]
    missed = []
    for row in rows:
        row["overhead s"] = row["wall s"] - yardstick
        row["same digests"] = row.pop("digests") == expected
        if not row["same digests"]:
            missed.append(f"{row['runner']}: other digests than direct calls")
        if row["overhead s"] > most:
            missed.append(f"{row['runner']}: {row['overhead s']:.1f} s above {yardstick:.1f} s; at most {most:.1f} s")
    title = f"clean, {n:,} images, {N_GROUPS} groups; server up in {seconds:.0f} s; at most {most:.1f} s of overhead"
    print_table(rows, ["runner", "wall s", "in stages s", "first stage s", "overhead s", "same digests"], title)
    conclude(missed, args.json, start, rows=rows, server_seconds=seconds)


if __name__ == "__main__":
    main()
