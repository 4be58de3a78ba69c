"""Shared by all commands: common options, the terminal, errors and results."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import interrupts
from sanitize.errors import ConfigError, RequestError, SanitizeError
from sanitize.plural import counted
from sanitize.settings import WrongSettings, problems_of


class App(typer.Typer):
    """The command line; called as a program, it handles signals."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command that the arguments name, and exit."""
        with interrupts.handled():
            return super().__call__(*args, **kwargs)


app = App(
    help="The firewall for training data: poisoned shards in, clean shards, quarantine and evidence out.\n\n"
    "Start with `sanitize demo`, or with your own images: "
    "`sanitize import photos/ --out data`, then `sanitize clean --shards data --out runs/first`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Terminal(Console):
    """A console that shows text from data literally, in tables too: no markup, no control characters.

    Style comes from `style=`, from `Text`, or from `markup=True` for lines that hold nothing but numbers.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(markup=False, emoji=False, **more)

    def render_str(self, text: str, **more: Any) -> Text:
        """Rich calls this for every string that it shows."""
        from sanitize.tar.names import printable

        return super().render_str("\n".join(map(printable, text.split("\n"))), **more)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from sanitize.tar.names import printable

        return "\n".join(map(printable, super().format(record).split("\n")))


console = Terminal(stderr=True)

SHARDS_HELP = (
    "Directory, glob or brace range of .tar shards, compressed or not (quote it: 'train-{000000..000009}.tar'). "
    "May be given several times."
)
Shards = Annotated[list[str] | None, typer.Option("--shards", help=SHARDS_HELP)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Any setting, by its path in the YAML file (a.b.c=VALUE, list entries by number); the value is YAML. Goes "
        "over the file and the other options. May be given several times.",
    ),
]
Direct = Annotated[
    bool,
    typer.Option(
        "--direct", help="Call the stages directly, without Prefect and the start of its server. Same result."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; nothing else goes there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice (default 0).")]
ConfigFile = Annotated[Path | None, typer.Argument(help="YAML file with any of the settings; see configs/.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any of the settings; see configs/.")
]
Out = Annotated[str, typer.Option(help="Run folder, a path or a URL. Given again, a run that was killed goes on.")]
Store = Annotated[str, typer.Option("--store", help="Folder or s3:// URL of reference, ledger, batches and feed.")]
RunFolder = Annotated[str, typer.Argument(metavar="run", help="A run folder, as given to --out: a path or a URL.")]


@contextmanager
def errors() -> Iterator[None]:
    """Print errors that a user can mend in one line each, and exit with 2 (settings, names, requests) or 1."""
    try:
        yield
    except RequestError as error:
        say("failed:", "red", str(error))
        raise typer.Exit(2) from None
    except (ValidationError, ConfigError) as error:
        for problem in _problems(error):
            say("config:", "red", problem)
        raise typer.Exit(2) from None
    except (SanitizeError, OSError) as error:
        say("failed:", "red", str(error))
        raise typer.Exit(1) from None


def _problems(error: ValidationError | ConfigError) -> Sequence[str]:
    if isinstance(error, WrongSettings):
        return error.problems
    return problems_of(error) if isinstance(error, ValidationError) else [str(error)]


def say(what: str, style: str, about: str) -> None:
    """One line on stderr; `about` may come from data and is shown literally."""
    console.print(Text(what, style), as_text(about), soft_wrap=True)


def as_text(text: str) -> Text:
    """Text from data on one line, without control characters."""
    from sanitize.tar.names import printable

    return Text(printable(" ".join(text.splitlines())))


@contextmanager
def bars(quiet: bool) -> Iterator[None]:
    """Progress on stderr, unless `quiet`."""
    from sanitize.progress import hide, shown

    with nullcontext() if quiet else shown(console), interrupts.before_end(lambda _signum: hide()):
        yield


def print_json(value: Any) -> None:
    """Print the result as JSON, the only output on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, Prefect's log too.")] = False,
) -> None:
    """Common options."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    if verbose:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable("%(asctime)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])


def print_places(places: dict[str, Any]) -> None:
    """Name and place of each result, one line each."""
    for name, place in places.items():
        console.print(f"{name.replace('_', ' '):>12}: {place}", highlight=False, soft_wrap=True)


def print_leaks(n: int | None, out: str) -> None:
    """Number of training samples whose picture is also in the test shards, if any."""
    if n:
        say(
            "warning",
            "yellow",
            f"{counted(n, 'training sample')} {'shows' if n == 1 else 'show'} a picture of the test shards: "
            f"{out}/06-test-leaks/index.html shows {'it' if n == 1 else 'them'}",
        )


def print_certificates(certificates: list[dict[str, Any]]) -> None:
    """Certified accuracy by radius, and the statement of each certificate."""
    from sanitize.certification.certificates import excerpt

    for certificate in certificates:
        unit, title = certificate["radius_unit"], f"{certificate['kind']}, {counted(certificate['samples'], 'sample')}"
        table = Table(unit, "certified accuracy", title=title)
        for radius, share in excerpt(certificate["certified_accuracy"]):
            table.add_row(f"{radius:g}", f"{share:.1%}")
        console.print(table)
        console.print(certificate["scope"]["statement"], highlight=False)
        if "largest_radius" in certificate:
            largest = f"{certificate['largest_radius']:.4g} {unit}"
            console.print(f"largest possible radius with these settings: {largest}", highlight=False)


def check_there(run: str) -> None:
    """Raise RequestError if there is no run folder."""
    from sanitize.storage import exists

    if not exists(run):
        raise RequestError(f"there is no run folder {run}")
