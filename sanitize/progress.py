"""Progress of long work: the library reports it, the caller may show it.

Silent by default. `with shown(): ...` shows every `track` inside, from any thread: on a terminal as a rich bar with a
rate; elsewhere (a log, a pipe) as one plain line for each stage that has ended, and one after each 30 s without a line.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import ProgressColumn as Column
from rich.text import Text


class _Rate(Column):
    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        speed = task.completed / seconds if seconds else None
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="cyan")


SILENCE = 30.0  # seconds without a line in a log, after which a line says how far the work is


@dataclass
class _Stage:
    """Work under one description: the bars that have not ended, and what is done by those that have."""

    unit: str
    began: float
    ended: float = 0.0
    n_done: int = 0
    n_bars: int = 0
    running: "list[Bar]" = field(default_factory=list)
    note: str = ""

    def so_far(self, description: str) -> str:
        """How far the work is."""
        n = self.n_done + sum(bar.n_done for bar in self.running)
        # Groups of shards begin one after another: the sum of all their totals is not known before the last one.
        total = self.running[0].total if self.n_bars == 1 else None
        count = f"{n:,}" if total is None or n > total else f"{n:,} of {total:,}"
        return f"{description}: {count} {self.unit} after {time.monotonic() - self.began:.0f} s{self._noted()}"

    def ended_line(self, description: str) -> str:
        """What was done."""
        return f"{description}: {self.n_done:,} {self.unit} in {self.ended - self.began:.1f} s{self._noted()}"

    def _noted(self) -> str:
        note = self.running[-1].noted if self.running else self.note
        return f", {note}" if note else ""


class _Lines:
    """Lines on stages that have ended, and on those that run where no other line was printed for `silence` seconds.

    The groups of shards of a stage are one line, so a line is printed when the next stage begins.
    """

    def __init__(self, console: Console, silence: float) -> None:
        self._console, self._silence, self._lock = console, silence, threading.Lock()
        self._stages: dict[str, _Stage] = {}
        self._last, self._closed = time.monotonic(), threading.Event()
        # Daemon: a command that is interrupted does not wait for it.
        self._watch = threading.Thread(target=self._break_silence, name="progress", daemon=True)
        self._watch.start()

    def begin(self, bar: "Bar") -> None:
        """A bar begins."""
        with self._lock:
            self._print_ended(bar.description)
            stage = self._stages.setdefault(bar.description, _Stage(bar.unit, time.monotonic()))
            stage.n_bars += 1
            stage.running.append(bar)

    def end(self, bar: "Bar", has_failed: bool) -> None:
        """A bar has ended; what a failed one did does not count."""
        with self._lock:
            stage = self._stages[bar.description]
            stage.running.remove(bar)
            stage.n_bars -= has_failed
            stage.n_done += 0 if has_failed else bar.n_done
            stage.ended, stage.note = time.monotonic(), bar.noted or stage.note

    def close(self) -> None:
        """Print what has ended."""
        self._closed.set()
        self._watch.join()
        with self._lock:
            self._print_ended()

    def _break_silence(self) -> None:
        wait = self._silence
        while not self._closed.wait(wait):
            with self._lock:
                if time.monotonic() - self._last >= self._silence:
                    running = [stage.so_far(text) for text, stage in self._stages.items() if stage.running]
                    if running:
                        self._print("; ".join(running))
                wait = max(self._last + self._silence - time.monotonic(), self._silence / 30)

    def _print_ended(self, but: str | None = None) -> None:
        for description, stage in list(self._stages.items()):
            if stage.running or description == but:
                continue
            del self._stages[description]
            if stage.n_done:  # no line for a stage without work left
                self._print(stage.ended_line(description))

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True, highlight=False)
        self._last = time.monotonic()


_display: Progress | _Lines | None = None


@contextmanager
def shown(console: Console | None = None, silence: float = SILENCE) -> Iterator[None]:
    """Show progress on `console` (default: stderr) inside the block.

    Args:
        console: where to show it.
        silence: in a log, seconds without a line after which a line says how far the work is.
    """
    global _display
    console = console or Console(stderr=True)
    if not _is_terminal(console):
        _display = lines = _Lines(console, silence)
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
        self.description, self.total, self.unit = description, total, unit
        self.noted, self.n_done = "", 0
        self._display, self._lock = _display, threading.Lock()
        if isinstance(self._display, Progress):
            self._task = self._display.add_task(description, total=total, unit=unit)
        elif self._display is not None:
            self._display.begin(self)

    def __call__(self, n: int) -> None:
        """Advance by `n` units."""
        if self._display is None:
            return
        with self._lock:
            self.n_done += n
        if isinstance(self._display, Progress):
            self._display.advance(self._task, n)

    def note(self, text: str) -> None:
        """Show a text behind the description, in place of the previous one."""
        self.noted = text
        if isinstance(self._display, Progress):
            self._display.update(self._task, description=f"{self.description}: {text}")

    def end(self, has_failed: bool) -> None:
        """The work has ended, after fewer units than `total` perhaps."""
        if isinstance(self._display, _Lines):
            self._display.end(self, has_failed)
        elif self._display is not None and not has_failed:
            # No bar for a stage without work left.
            self._display.update(self._task, total=self.n_done, visible=self.n_done > 0)


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
