"""`sanitize verify`."""

import typer

from flows.cli.app import AsJson, RunFolder, check_there, console, errors, print_json, say


def verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Re-hash every file of a run against its manifests and say what differs. Exit code 1 where something does.

    Example:

        sanitize verify runs/first
    """
    from flows.restore import verify_run

    with errors():
        check_there(run)
        n_files, problems = verify_run(run)
    if as_json:
        print_json({"files": n_files, "problems": problems})
    else:
        for problem in problems:
            say("differs", "red", problem)
        console.print(f"{n_files:,} files checked, {len(problems):,} problem(s)")
    raise typer.Exit(1 if problems else 0)
