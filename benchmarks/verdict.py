"""The product's headline table: what `sanitize clean` finds with its defaults, and what it says where it finds nothing.

    python -m benchmarks.verdict --quick [--json FILE]                   one seed of most cells
    python -m benchmarks.verdict [--json FILE]                           all data sets and attacks, 3 seeds
    python -m benchmarks.verdict --data gtsrb --only none "tact 1 %" --seeds 1

A cell is a data set, an attack and a seed: real images are poisoned with the seed and put through the job `clean` as
the command runs it. Columns: accuracy of the suspect model on its training images and on test images, its attack
success rate (ASR; learned from .25 up), recall, false removals (share of the clean samples), verdict, seconds of
`clean` by the clock and by the CPU; ASR of a model trained on what is left, and of one trained on the original images
and labels of the same samples (the clean control). Cover samples, which have the trigger and their true label, count as
neither poisoned nor clean.

Beside it on the embeddings of the same run, with what each method needs of the truth: spectral signatures (the number
of poisoned samples in each class), activation clustering (nothing) and SCAn (a tenth of the clean samples); where ART
1.20 is installed (`pip install --no-deps adversarial-robustness-toolbox==1.20.1`), also its activation defence
(nothing) and its spectral signatures (the poisoning rate).

--quick, for 40 minutes on two idle cores: on Fashion-MNIST, the quickest of the large sets, every attack but three at
higher rates, which other sets have; on CIFAR-10 the attacks that differ most there; on GTSRB those that meet its tracks
and its rare classes; on digits three; on flowers two, which take longest; models trained again for two attacks. One
seed, three on digits, where model seeds differ.

With --json the file is written after each cell, and cells in the file are not run again: a killed benchmark goes on. A
cell of an older version of a stage is run again. `clean` is timed with as many cells beside it as there are workers.
Exits with 1 where a target is missed.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import conclude, print_table, write_rows
from benchmarks.verdict_cells import ATTACKS, CLEAR, DATA, Cell, one_cell, stage_versions, write_data

ONLY_UNTOUCHED = ("gtsrb-small",)
QUICK: dict[str, Sequence[str]] = {
    "fashion": [attack for attack in ATTACKS if attack not in ("badnets 3 %", "badnets 10 %", "blended 3 %")],
    "cifar10": ("none", "badnets 1 %", "blended 3 %", "sig 3 %", "label-consistent 3 %", "adap-blend 1 %"),
    "gtsrb": ("none", "badnets 1 %", "tact 1 %", "two triggers 2 %", "rarest 1 %"),
    "gtsrb-small": ("none",),
    "digits": ("none", "badnets 3 %", "badnets 10 %"),
    "flowers": ("none", "badnets 10 %"),
}
RETRAINED_WHEN_QUICK = ("badnets 1 %", "rarest 1 %")
GOOD = "recall >= .95 at false removals <= .002"
METHODS = ("sanitize", "spectral", "activation_clustering", "scan", "art_activation", "art_spectral")
SLOWEST_FIRST = ("flowers", "cifar10", "gtsrb", "fashion", "gtsrb-small", "digits")


class Target(NamedTuple):
    """A target of the table.

    Attributes:
        name: the target in words.
        n_met, n: cells that meet it, of those it applies to.
        missed: one line for each miss; empty where the target is met or applies to no cell.
    """

    name: str
    n_met: int
    n: int
    missed: list[str]


def check(rows: Sequence[dict[str, Any]], seconds_before: float | None) -> list[Target]:
    """All targets, met or not.

    Args:
        rows: rows of all cells.
        seconds_before: CPU seconds of `clean` on untouched Fashion-MNIST before a change, on this machine; None leaves
            the target of time out.
    """
    finished = [row for row in rows if "recall" in row]
    untouched = [row for row in finished if row["attack"] == "none"]
    attacked = [row for row in finished if row["attack"] != "none"]
    learned = [row for row in attacked if row["learned"]]
    retrained = [row for row in attacked if "asr_after" in row]
    bad = [row for row in learned if not _is_good(row)]
    good = Target(f"learned attacks: {GOOD} in 90 % of the cells", len(learned) - len(bad), len(learned), [])
    if len(bad) > 0.1 * len(learned):
        names = "; ".join(map(_name, bad))
        good.missed.append(f"{good.name}, got {good.n_met} of {good.n}; not in {names}")
    targets = [
        _all("every cell ends", rows, lambda row: "error" not in row, lambda row: f"failed, {row['error']}"),
        _all(
            "untouched data: false removals at most .001",
            untouched,
            lambda row: row["false_removals"] <= 0.001,
            lambda row: f"got {row['false_removals']:.4f}",
        ),
        _all(
            f"untouched data: verdict {CLEAR!r}",
            untouched,
            lambda row: row["verdict"] == CLEAR,
            lambda row: f"got {row['verdict']!r}",
        ),
        good,
        _all(
            "attacked data: no more clean than poisoned samples removed",
            attacked,
            lambda row: 2 * row["removed_clean"] <= row["removed"],
            lambda row: f"{row['removed_clean']} clean and {row['removed'] - row['removed_clean']} poisoned removed",
        ),
        _all(
            "learned attacks: no false all-clear",
            learned,
            lambda row: row["verdict"] != CLEAR,
            lambda row: f"ASR {row['asr']:.3f}, recall {row['recall']:.3f}",
        ),
        _all(
            "ASR after retraining within .05 of the clean control's, where something was found",
            retrained,
            lambda row: abs(row["asr_after"] - row["asr_control"]) <= 0.05,
            lambda row: f"got {row['asr_after']:.3f} and {row['asr_control']:.3f}",
        ),
    ]
    seconds = [row["cpu_seconds"] for row in untouched if row["data"] == "fashion"]
    if seconds_before and seconds:
        name, mean = f"fashion, none: at most 1.5 times {seconds_before:.0f} CPU s", float(np.mean(seconds))
        is_met = mean <= 1.5 * seconds_before
        targets.append(Target(name, int(is_met), 1, [] if is_met else [f"{name}, got {mean:.0f}"]))
    return targets


def _all(
    name: str,
    rows: Sequence[dict[str, Any]],
    is_met: Callable[[dict[str, Any]], bool],
    got: Callable[[dict[str, Any]], str],
) -> Target:
    """A target that every cell must meet."""
    missed = [f"{_name(row)}: {name}: {got(row)}" for row in rows if not is_met(row)]
    return Target(name, len(rows) - len(missed), len(rows), missed)


def _is_good(row: dict[str, Any], method: str = "") -> bool:
    return bool(row[f"{method}recall"] >= 0.95 and row[f"{method}false_removals"] <= 0.002)


def _name(row: dict[str, Any]) -> str:
    return f"{row['data']}, {row['attack']}, seed {row['seed']}"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the tables: the product, the methods beside it, each method in one line, and the time of `clean`."""
    rows = [row for row in rows if "recall" in row]
    cell = ["data", "attack", "seed"]
    names = ["poisoned", "train_acc", "acc", "asr", "recall", "false_removals", "verdict", "seconds", "cpu"]
    shown = [
        row
        | {"false_removals": f"{row['false_removals']:.4f}"}
        | {"seconds": round(row["seconds"]), "cpu": round(row["cpu_seconds"])}
        for row in rows
    ]
    print_table(shown, [*cell, *names, "asr_after", "asr_control"], "verdict: sanitize clean, defaults")
    beside = []
    for row in rows:
        pairs = {method: _pair(row, "" if method == "sanitize" else f"{method}_") for method in METHODS}
        beside.append({name: row[name] for name in cell} | {"learned": row["learned"]} | pairs)
    print_table(beside, [*cell, "learned", *METHODS], "recall / false removals on the same embeddings")
    totals = [_total(rows, method) for method in METHODS]
    print_table(totals, list(totals[0]), "all cells; art: cells that ran where it is installed")
    times = [_times(data, [row for row in rows if row["data"] == data]) for data in DATA]
    print_table([one for one in times if one["cells"]], list(times[0]), "time of clean, default settings")


def show_targets(targets: Sequence[Target], is_whole: bool) -> None:
    """Print how many cells meet each target."""
    outcome = {True: "missed", False: "met"}
    shown = [
        {
            "target": target.name,
            "cells that meet it": f"{target.n_met} of {target.n}",
            "": outcome[bool(target.missed)] if target.n else "not checked",
        }
        for target in targets
    ]
    print_table(shown, list(shown[0]), "targets" if is_whole else "targets, on a part of the cells")


def _times(data: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cpu, clock = ([row[name] for row in rows] or [math.nan] for name in ("cpu_seconds", "seconds"))
    return {
        "data": data,
        "cells": len(rows),
        "images": max((row["n"] for row in rows), default=0),
        "CPU s, median": round(float(np.median(cpu))) if rows else None,
        "CPU s, most": round(max(cpu)) if rows else None,
        "s, median": round(float(np.median(clock))) if rows else None,
    }


def _pair(row: dict[str, Any], prefix: str) -> str | None:
    if f"{prefix}recall" not in row:
        return None
    recall, false_removals = row[f"{prefix}recall"], row[f"{prefix}false_removals"]
    return f"{'-' if math.isnan(recall) else f'{recall:.3f}'} / {false_removals:.4f}"


def _total(rows: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    prefix = "" if method == "sanitize" else f"{method}_"
    rows = [row for row in rows if f"{prefix}recall" in row]
    learned = [row for row in rows if row["learned"]]
    untouched = [row[f"{prefix}false_removals"] for row in rows if row["attack"] == "none"]
    n_good = sum(_is_good(row, prefix) for row in learned)
    return {
        "method": method,
        f"learned, {GOOD}": f"{n_good} of {len(learned)}" if rows else "not run",
        "mean recall, learned": float(np.mean([row[f"{prefix}recall"] for row in learned])) if learned else None,
        "most false removals, untouched": f"{max(untouched):.4f}" if untouched else None,
    }


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """The cells to run, in the order of the table."""
    cells = []
    for data in arguments.data or DATA:
        if arguments.quick:
            attacks, n_seeds = QUICK[data], 3 if data == "digits" else 1
        else:
            attacks, n_seeds = ("none",) if data in ONLY_UNTOUCHED else ATTACKS, 3
        for offset in range(arguments.seeds or n_seeds):
            for attack in attacks:
                retrain = offset == 0 and (not arguments.quick or attack in RETRAINED_WHEN_QUICK)
                cells.append(Cell(data, attack, arguments.first_seed + offset, retrain))
    return [cell for cell in cells if not arguments.only or cell.attack in arguments.only]


def main() -> None:
    """Run all cells, two at a time; print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cells and seeds")
    parser.add_argument("--data", nargs="*", choices=list(DATA), help="some of the data sets")
    parser.add_argument("--only", nargs="*", choices=ATTACKS, help="some of the attacks")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="results of other seeds than those of the tables")
    parser.add_argument("--images", type=int, help="most training images of a data set; targets are not checked")
    parser.add_argument(
        "--seconds-before",
        type=float,
        help="CPU seconds of `clean` on untouched Fashion-MNIST that the target of time refers to",
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="cells at a time")
    parser.add_argument("--json", type=Path, help="results; cells in this file are not run again")
    arguments = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = _finished(arguments.json, arguments.images)
    cells = cells_of(arguments)
    missing = [cell for cell in cells if not any(_is_row_of(row, cell) for row in rows)]
    if len(missing) < len(cells):
        print(f"{len(cells) - len(missing)} of {len(cells)} cells are in {arguments.json}", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool,
    ):
        futures: dict[Future[dict[str, Any]], Cell] = {}
        # The slowest first: a long cell at the end would leave the other core without work.
        for name in sorted({cell.data for cell in missing}, key=SLOWEST_FIRST.index):
            write_data(name, Path(folder), arguments.images)
            print(f"[{time.perf_counter() - start:5.0f} s] {name} is written", file=sys.stderr, flush=True)
            futures |= {pool.submit(one_cell, cell, folder): cell for cell in missing if cell.data == name}
        for number, future in enumerate(as_completed(futures), 1):
            cell, row = futures[future], future.result() | {"images": arguments.images}
            rows = [other for other in rows if _name(other) != _name(row)] + [row]
            outcome = row.get("error") or f"{row['verdict']}, {row['seconds']:.0f} s"
            elapsed = f"[{time.perf_counter() - start:5.0f} s] {number}/{len(missing)}"
            print(f"{elapsed} {cell}: {outcome}", file=sys.stderr, flush=True)
            if arguments.json is not None:
                write_rows(arguments.json, rows)
    order = {_name(cell._asdict()): number for number, cell in enumerate(cells)}
    shown = sorted((row for row in rows if _name(row) in order), key=lambda row: order[_name(row)])
    show(shown)
    targets = check(shown, arguments.seconds_before) if arguments.images is None else []
    if targets:
        show_targets(targets, is_whole=not (arguments.only or arguments.data))
    missed = [line for target in targets for line in target.missed]
    conclude(missed, arguments.json, start, checked=bool(targets), rows=rows)


def end_with_parent() -> None:
    """Let a worker end when the benchmark is killed: it would wait for cells forever."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def _finished(json_file: Path | None, images: int | None) -> list[dict[str, Any]]:
    """Rows of an earlier run with the stages of today; failed cells are run again.

    Raises SystemExit where the file holds cells of another number of images: they would be lost.
    """
    if json_file is None or not json_file.exists():
        return []
    rows = json.loads(json_file.read_text())["rows"]
    if any(row["images"] != images for row in rows):
        raise SystemExit(f"{json_file} holds cells of another number of images (--images); give another --json")
    return [row for row in rows if "recall" in row and row.get("versions") == stage_versions()]


def _is_row_of(row: dict[str, Any], cell: Cell) -> bool:
    """True where the row has all that the cell measures."""
    is_retrained = "asr_after" in row or not (cell.retrain and row["removed"] and row["asr"] is not None)
    return _name(row) == str(cell) and is_retrained


if __name__ == "__main__":
    main()
