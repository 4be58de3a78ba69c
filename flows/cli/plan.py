"""`sanitize plan`."""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.app import AsJson, Device, Quiet, Set, Shards, bars, console, errors, print_json
from flows.cli.command import DEVICE, SHARDS, chosen
from sanitize.settings import make_config, read_yaml


def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML file of `sanitize clean`; see configs/.")] = None,
    shards: Shards = None,
    samples: Annotated[int, typer.Option(help="Number of samples to measure on.")] = 600,
    task_minutes: Annotated[float, typer.Option(help="Minutes that one task should take.")] = 10,
    scale_to: Annotated[float, typer.Option(help="Number of samples of a larger data set, calculated too.")] = 1e9,
    set_: Set = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Estimate the cost of `sanitize clean`: tasks, bytes read and written, memory and time.

    All stages run on a sample of the shards, in a temporary folder; the rest is arithmetic (docs/scale.md).

    Examples:

        sanitize plan configs/cifar10.yaml

        sanitize plan --shards 'data/train-*.tar' --task-minutes 5 --json
    """
    from sanitize.jobs.clean import CleanConfig
    from sanitize.jobs.plan import PlanConfig
    from sanitize.jobs.plan import plan as measure

    with errors():
        settings = read_yaml(config) if config else {}
        options = chosen((SHARDS, DEVICE), {"shards": shards, "device": device})
        run_config = make_config(CleanConfig, settings, options, set_ or (), {"shards": "--shards"})
        how = PlanConfig(n_samples=samples, task_minutes=task_minutes, scale_to=int(scale_to))
        with bars(quiet), tempfile.TemporaryDirectory(prefix=f"sanitize-{os.getpid()}-") as scratch:
            result = measure(run_config, how, Path(scratch))
    if as_json:
        print_json(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    data, scaled = result["data"], result["scaled"]
    console.print(
        f"{data['shards']:,} shards, {_bytes(data['bytes'])}, about {data['samples']:,} samples; measured on "
        f"{result['measured_on']:,} of them with {result['compute']}",
        highlight=False,
    )
    _table(result, f"{data['samples']:,} samples, the time of one worker")
    _table(scaled, f"{scaled['samples']:,} samples in {scaled['shards']:,} shards, on paper")
    console.print(f"n_groups: {result['n_groups']} ({scaled['n_groups']:,}) makes a task minutes of work")
    small, large = result["memory"], scaled["memory"]
    for name, meaning in {
        "task": "a task: model, batch and libraries, measured",
        "cache": "training: decoded images, at most",
        "select": "select: verdicts of all samples",
        "driver": "driver: its list of the shards",
    }.items():
        console.print(f"{_bytes(small[name]):>10} ({_bytes(large[name])}) {meaning}", highlight=False)


def _table(planned: dict[str, Any], title: str) -> None:
    table = Table("stage", title=title, title_justify="left")
    for name in ("tasks", "a task", "time", "read", "written"):
        table.add_column(name, justify="right")
    for row in planned["stages"]:
        cells = (f"{row['tasks']:,}", _time(row["task_seconds"]), _time(row["seconds"]))
        table.add_row(row["folder"], *cells, _bytes(row["read"]), _bytes(row["written"]))
    table.add_row("all", "", "", _time(planned["seconds"]), style="bold")
    console.print(table)


def _bytes(n: float | None) -> str:
    if n is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"
