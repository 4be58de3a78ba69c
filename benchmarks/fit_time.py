"""How long does it take to fit RCA, beside PyOD's autoencoder? RCA trains two networks, so 2 is par.

    python -m benchmarks.fit_time [--json FILE]     2 minutes on one core

Same rows, layers, dropout, batch size and number of gradient steps (PyOD drops the last, smaller batch of an epoch, so
it gets the number of epochs that comes nearest), without batch normalisation, which RCA does not have. CPU seconds of
one thread; the two take turns, three times; medians. PyOD's `fit` also scores the rows it was fitted on; that is
measured and subtracted. Exits with 1 where RCA takes more than 2.2 times as long.
"""

import argparse
import importlib.util
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.odds import Split, split
from benchmarks.report import conclude, print_table
from sanitize.score.rca import RCAConfig, n_steps

TABLES = ("vowels", "pendigits", "shuttle")
REPEATS = 3
MOST = 2.2


def rca_seconds(config: RCAConfig, table: Split, seed: int) -> float:
    """Time of `fit`."""
    start = time.process_time()
    config.build().fit(table.train_ND, seed=seed)
    return time.process_time() - start


def pyod_seconds(config: RCAConfig, table: Split, epochs: int, seed: int) -> float:
    """Time of `fit`, less the time to score the same rows."""
    from pyod.models.auto_encoder import AutoEncoder

    model = AutoEncoder(
        hidden_neuron_list=[*config.widths, config.n_codes],
        dropout_rate=config.dropout,
        batch_norm=False,
        batch_size=config.batch_size,
        epoch_num=epochs,
        lr=config.learning_rate,
        optimizer_params={},
        random_state=seed,
        device="cpu",
        verbose=0,
    )
    start = time.process_time()
    model.fit(table.train_ND)
    fitted = time.process_time()
    model.decision_function(table.train_ND)
    return 2 * fitted - start - time.process_time()


def compare(name: str) -> dict[str, Any]:
    """Median seconds of both on one table."""
    table = split(name, 0)
    n_rows = len(table.train_ND)
    config = RCAConfig(contamination=table.anomaly_ratio)
    steps = math.prod(n_steps(config, n_rows))
    epochs = max(1, round(steps / (n_rows // config.batch_size)))
    pairs = [(rca_seconds(config, table, seed), pyod_seconds(config, table, epochs, seed)) for seed in range(REPEATS)]
    ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return {
        "table": name,
        "rows": n_rows,
        "steps RCA": steps,
        "steps PyOD": epochs * (n_rows // config.batch_size),
        "RCA s": ours,
        "PyOD s": theirs,
        "ratio": ours / theirs,
    }


def main() -> None:
    """Compare on the three tables, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not importlib.util.find_spec("pyod"):
        raise SystemExit("pyod is missing: pip install 'sanitize[baselines]'")
    start = time.perf_counter()
    torch.set_num_threads(1)
    rows = [compare(name) for name in TABLES]
    missed = [f"{row['table']}: RCA takes {row['ratio']:.2f} x as long" for row in rows if row["ratio"] > MOST]
    print_table(rows, list(rows[0]), f"fit time, medians of {REPEATS}, one thread")
    conclude(missed, arguments.json, start, rows=rows)


if __name__ == "__main__":
    main()
