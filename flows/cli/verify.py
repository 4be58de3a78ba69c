"""`sanitize verify`."""

from typing import Annotated

import typer

from flows.cli.app import AsJson, check_there, console, errors, print_json, say
from sanitize.plural import counted


def verify(
    path: Annotated[str, typer.Argument(help="A run folder, a store, or an artifact in one: a path or a URL.")],
    sources: Annotated[
        bool, typer.Option(help="For a store: also hash the shards that its batches were made from.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Hash every file again and list differences from its manifest. Exit code 1 if there are any.

    For a store: the feed, the ledger, all batches, all versions of the reference, and the shards they were made from. A
    source shard that is gone or has changed is noted, and does not count as a difference.

    Examples:

        sanitize verify runs/first

        sanitize verify runs/store

        sanitize verify runs/store/batches/3f2a5b0c1d2e3f40
    """
    from sanitize.jobs.verify_store import verify_path

    with errors():
        check_there(path)
        found = verify_path(path, sources)
    if as_json:
        print_json({"files": found.n_files, "problems": found.problems, "notes": found.notes})
    else:
        for problem in found.problems:
            say("differs", "red", problem)
        for note in found.notes:
            say("note", "yellow", note)
        console.print(f"{counted(found.n_files, 'file')} checked, {counted(len(found.problems), 'problem')}")
    raise typer.Exit(1 if found.problems else 0)
