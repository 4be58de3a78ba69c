"""Tables in docs/ that list what a registry holds. `python docs/tables.py` writes them again.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
`TABLES` has the function that gives its rows.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import sanitize.api  # noqa: F401 (declares all stages and jobs)
from sanitize.jobs import JOBS
from sanitize.stage import STAGES

DOCS = Path(__file__).parent


def stages() -> Iterator[str]:
    """All stages, by package."""
    yield "| package | stage | what it does | returns |"
    yield "|---|---|---|---|"
    for stage in sorted(STAGES.values(), key=lambda stage: (package(stage.function), stage.name)):
        if stage.function.__module__.startswith("sanitize."):  # a test may have declared others
            does = (inspect.getdoc(stage.function) or "").partition("\n")[0].removesuffix(".")
            yield f"| `{package(stage.function)}` | `{stage.name}` | {does} | `{stage.kind.__name__}` |"


def jobs() -> Iterator[str]:
    """All jobs, in the order of their names."""
    yield "| job | what it does | returns | with, beside `folder` and `summary` |"
    yield "|---|---|---|---|"
    for job in sorted(JOBS.values(), key=lambda job: job.name):
        if job.function.__module__.startswith("sanitize."):
            does = (inspect.getdoc(job.function) or "").partition("\n")[0].removesuffix(".")
            has = ", ".join(f"`{name}`" for name in members(job.result))
            yield f"| `sanitize.{job.name}` | {does} | `{job.result.__name__}` | {has} |"


def members(result: type) -> list[str]:
    """Public properties, and methods with `()`, of a result."""
    common = {"config", "folder", "kind", "place", "summary", "open", "after"}
    names = sorted(name for name in dir(result) if not name.startswith("_") and name not in common)
    return [f"{name}()" if inspect.isfunction(getattr(result, name)) else name for name in names]


def package(function: Callable[..., object]) -> str:
    """Package of a function: the first two parts of the name of its module."""
    return ".".join(function.__module__.split(".")[:2])


TABLES: dict[str, Callable[[], Iterator[str]]] = {"jobs": jobs, "stages": stages}


def filled(text: str) -> str:
    """A page with its tables as they should be. Raises KeyError for an unknown name of a table."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)",
        lambda found: f"{found[1]}\n" + "\n".join(TABLES[found[2]]()) + f"\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(filled(page.read_text()))
