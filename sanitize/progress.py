"""Progress of long work: the library reports it, the caller may show it.

Silent by default. `with shown(): ...` shows every `track` inside, from any thread: on a terminal as a rich bar with a
rate; elsewhere (a log, a pipe) as one plain line for each stage that has ended.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import ProgressColumn as Column
from rich.text import Text


class _Rate(Column):
    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        speed = task.completed / seconds if seconds else None
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="cyan")


@dataclass
class _Stage:
    """Work under one description: what has ended, and how many bars have not."""

    unit: str
    began: float
    ended: float = 0.0
    n_done: int = 0
    n_running: int = 0
    note: str = ""


class _Lines:
    """Lines on stages that have ended.

    The groups of shards of a stage are one line, so a line is printed when the next stage begins.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._lock = console, threading.Lock()
        self._stages: dict[str, _Stage] = {}

    def begin(self, description: str, unit: str) -> None:
        """A bar begins."""
        with self._lock:
            self._print_ended(description)
            self._stages.setdefault(description, _Stage(unit, time.monotonic())).n_running += 1

    def end(self, description: str, n_done: int, note: str) -> None:
        """A bar has ended; `n_done` is 0 where it has failed."""
        with self._lock:
            stage = self._stages[description]
            stage.n_running -= 1
            stage.n_done += n_done
            stage.ended, stage.note = time.monotonic(), note or stage.note

    def close(self) -> None:
        """Print what has ended."""
        with self._lock:
            self._print_ended()

    def _print_ended(self, but: str | None = None) -> None:
        for description, stage in list(self._stages.items()):
            if stage.n_running or description == but:
                continue
            del self._stages[description]
            note = f", {stage.note}" if stage.note else ""
            line = f"{description}: {stage.n_done:,} {stage.unit} in {stage.ended - stage.began:.1f} s{note}"
            if stage.n_done:  # no line for a stage without work left
                self._console.print(Text(line), soft_wrap=True, highlight=False)


_display: Progress | _Lines | None = None


@contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Show progress on `console` (default: stderr) inside the block."""
    global _display
    console = console or Console(stderr=True)
    if not _is_terminal(console):
        _display = lines = _Lines(console)
        try:
            yield
        finally:
            _display = None
            lines.close()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, _Rate(), TimeElapsedColumn(), console=console) as display:
        _display = display
        try:
            yield
        finally:
            _display = None


def _is_terminal(console: Console) -> bool:
    """True where a line can be drawn over. FORCE_COLOR makes no terminal of a log, though rich takes it for one."""
    return console.is_jupyter or (console.is_interactive and console.file.isatty())


def hide() -> None:
    """Stop drawing, and restore the terminal."""
    if isinstance(_display, Progress):
        _display.stop()


class Bar:
    """One bar; it is shown only inside of `shown`."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self._description, self._display = description, _display
        self._note, self._n_done, self._lock = "", 0, threading.Lock()
        if isinstance(self._display, Progress):
            self._task = self._display.add_task(description, total=total, unit=unit)
        elif self._display is not None:
            self._display.begin(description, unit)

    def __call__(self, n: int) -> None:
        """Advance by `n` units."""
        if self._display is None:
            return
        with self._lock:
            self._n_done += n
        if isinstance(self._display, Progress):
            self._display.advance(self._task, n)

    def note(self, text: str) -> None:
        """Show a text behind the description, in place of the previous one."""
        self._note = text
        if isinstance(self._display, Progress):
            self._display.update(self._task, description=f"{self._description}: {text}")

    def end(self, has_failed: bool) -> None:
        """The work has ended, after fewer units than `total` perhaps."""
        if isinstance(self._display, _Lines):
            self._display.end(self._description, 0 if has_failed else self._n_done, self._note)
        elif self._display is not None and not has_failed:
            # No bar for a stage without work left.
            self._display.update(self._task, total=self._n_done, visible=self._n_done > 0)


@contextmanager
def track(description: str, total: int | None, unit: str = "samples") -> Iterator[Bar]:
    """A bar of `total` units for the block, which calls it to advance."""
    bar = Bar(description, total, unit)
    has_failed = True
    try:
        yield bar
        has_failed = False
    finally:
        bar.end(has_failed)
