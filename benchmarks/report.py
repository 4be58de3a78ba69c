"""How benchmarks print what they measured."""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str], title: str) -> None:
    """Print rows as a table on stdout; floats with three digits, what is missing as a dash."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    Console(width=170).print(table)


def environment() -> str:
    """Hardware, versions and date, as a claim needs them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    date = datetime.datetime.now(datetime.UTC).date()
    return f"{device}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, {date}"


def quick_or_full(doc: str | None, *others: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks of training take; `others` are what it can do besides the two."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true")
    for other in ("full", *others):
        size.add_argument(f"--{other}", action="store_true")
    parser.add_argument("--first-seed", type=int, default=0, help="results of other seeds than those of the tables")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=50_000, help="of --full")
    return parser


def conclude(missed: Sequence[str], json_file: Path | None, start: float, checked: bool = True, **results: Any) -> None:
    """Print what was missed, write it with the results where JSON is asked for, and exit: with 1 where a target was.

    Args:
        missed: one line a target.
        json_file: where to; None nowhere.
        start: time.perf_counter() when the benchmark began.
        checked: False where the part that was run has no targets.
        results: into the JSON.
    """
    seconds = time.perf_counter() - start
    print(f"{environment()}; {seconds:.0f} s")
    print("\n".join(f"MISSED {line}" for line in missed) or ("all targets met" if checked else "targets not checked"))
    if json_file is not None:
        result = results | {"missed": list(missed), "environment": environment(), "seconds": seconds}
        json_file.write_text(json.dumps(result, indent=1))
    sys.exit(1 if missed else 0)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_rows(json_file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of an unfinished benchmark, then rename: one that is killed here leaves the rows of before."""
    beside = json_file.with_suffix(".partial")
    beside.write_text(json.dumps({"rows": rows}, indent=1))
    beside.replace(json_file)
