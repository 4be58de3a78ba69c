"""`sanitize plan`."""

from typing import Any

from rich.table import Table

from flows.cli.app import console
from flows.cli.command import DEVICE, SHARDS, Option, job_command
from sanitize.plural import counted


@job_command(
    Option("--samples", int, "n_samples", "Number of samples to measure on (default 600)."),
    Option("--task-minutes", float, "task_minutes", "Minutes that one task should take (default 10)."),
    Option(
        "--scale-to",
        float,
        "scale_to",
        "Number of samples of a larger data set in such shards, such as 1e9; its costs are calculated too.",
    ),
    out=None,
    has_flow=False,
    common=(SHARDS, DEVICE),
)
def plan(result: dict[str, Any], out: str) -> None:
    """Estimate the cost of `sanitize clean`: tasks, bytes read and written, memory and time.

    The YAML file is one of `sanitize clean`. All stages run on a sample of the shards, in a temporary folder; the rest
    is arithmetic (docs/scale.md).

    Examples:

        sanitize plan configs/cifar10.yaml

        sanitize plan --shards 'data/train-*.tar' --task-minutes 5 --scale-to 1e9
    """
    data, scaled, minutes = result["data"], result["scaled"], result["task_minutes"]
    console.print(
        f"{counted(data['shards'], 'shard')}, {_bytes(data['bytes'])}, about {counted(data['samples'], 'sample')}; "
        f"measured on {result['measured_on']:,} of them with {result['compute']}",
        highlight=False,
    )
    _table(result, f"{counted(data['samples'], 'sample')}, the time of one worker")
    _groups(result, data["shards"], minutes)
    if scaled is not None:
        _table(scaled, f"{counted(scaled['samples'], 'sample')} in {counted(scaled['shards'], 'shard')}, calculated")
        _groups(scaled, scaled["shards"], minutes)
    sizes = {data["samples"]: result} | ({} if scaled is None else {scaled["samples"]: scaled})
    _memory({counted(n, "sample"): planned["memory"] for n, planned in sizes.items()})


def _groups(planned: dict[str, Any], n_shards: int, minutes: float) -> None:
    """The recommended number of groups, how long a task takes then, and why there are no more or fewer."""
    n, longest = planned["n_groups"], _time(planned["task_seconds"])
    why = f"tasks of at most {minutes:g} minutes (--task-minutes)"
    if n == n_shards and planned["task_seconds"] > 60 * minutes:
        why = f"a group has at least one shard; {minutes:g} minutes (--task-minutes) need smaller shards"
    console.print(
        f"--groups {n}: the shards in {counted(n, 'group')}, one task each in every stage that goes over "
        f"shards; the longest task takes about {longest} ({why})",
        highlight=False,
        soft_wrap=True,
    )


def _memory(by_size: dict[str, dict[str, float]]) -> None:
    """A row for each process or stage that holds much, and a column for each data set."""
    table = Table("memory", *by_size, title_justify="left")
    for name, meaning in {
        "task": "a task: model, batch and libraries, measured",
        "cache": "training: decoded images, at most",
        "select": "select: verdicts of all samples",
        "driver": "the process of the run: list of shards",
    }.items():
        table.add_row(meaning, *(_bytes(memory[name]) for memory in by_size.values()))
    console.print(table)


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
