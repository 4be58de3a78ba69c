"""`sanitize verify`."""

from typing import Annotated

import typer

from flows.cli.app import AsJson, check_there, console, errors, print_json, say


def verify(
    path: Annotated[str, typer.Argument(help="A run folder, a store, or an artifact in one: a path or a URL.")],
    sources: Annotated[
        bool, typer.Option(help="Of a store, hash the shards too that its batches were made from.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Re-hash every file against its manifest, and say what differs. Exit code 1 where something does.

    Of a store, the walk goes from the feed and the ledger to all batches, all versions of the reference, and the shards
    they were made from. A source shard that is gone or has changed since is named, and no problem of the store.

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
        console.print(f"{found.n_files:,} files checked, {len(found.problems):,} problem(s)")
    raise typer.Exit(1 if found.problems else 0)
