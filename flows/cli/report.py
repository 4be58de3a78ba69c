"""`sanitize report`."""

import sys

from flows.cli.app import RunFolder, check_there, errors


def report(run: RunFolder) -> None:
    """Write the report of a run again, for example after a restore, and print its place.

    Example:

        sanitize report runs/first
    """
    from sanitize.jobs.restore import write_again

    with errors():
        check_there(run)
        sys.stdout.write(write_again(run) + "\n")
