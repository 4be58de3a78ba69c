"""Progress of long work: the library reports it, the caller may show it.

Silent by default. `with shown(): ...` draws rich bars with a rate for every `track` inside, from any thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import ProgressColumn as Column
from rich.text import Text

_display: Progress | None = None


class _Rate(Column):
    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        speed = task.completed / seconds if seconds else None
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="cyan")


@contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Draw progress bars on `console` (default: stderr) inside the block."""
    global _display
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, _Rate(), TimeElapsedColumn(), console=console or Console(stderr=True)) as display:
        _display = display
        try:
            yield
        finally:
            _display = None


def hide() -> None:
    """Stop drawing, and restore the terminal."""
    if _display is not None:
        _display.stop()


class Bar:
    """One bar; it is drawn only inside of `shown`."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self._description, self._display = description, _display
        if self._display is not None:
            self.task = self._display.add_task(description, total=total, unit=unit)

    def __call__(self, n: int) -> None:
        """Advance by `n` units."""
        if self._display is not None:
            self._display.advance(self.task, n)

    def note(self, text: str) -> None:
        """Show a text behind the description, in place of the previous one."""
        if self._display is not None:
            self._display.update(self.task, description=f"{self._description}: {text}")


@contextmanager
def track(description: str, total: int | None, unit: str = "samples") -> Iterator[Bar]:
    """A bar of `total` units for the block, which calls it to advance."""
    display, bar = _display, Bar(description, total, unit)
    yield bar
    if display is None:
        return
    task = bar.task
    completed = display.tasks[display.task_ids.index(task)].completed
    display.update(task, total=completed, visible=completed > 0)  # no bar for a stage without work left
