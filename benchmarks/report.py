"""How benchmarks print what they measured."""

import datetime
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str], title: str) -> None:
    """Print rows as a table on stdout; floats with three digits, what is missing as a dash."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    Console(width=140).print(table)


def environment() -> str:
    """Hardware, versions and date, as a claim needs them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    date = datetime.datetime.now(datetime.UTC).date()
    return f"{device}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, {date}"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
