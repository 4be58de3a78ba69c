"""`sanitize report`."""

from flows.cli.app import AsJson, RunFolder, check_there, errors, print_json, print_places


def report(run: RunFolder, as_json: AsJson = False) -> None:
    """Write the report of a run of `sanitize clean` again, for example after a restore, and print its place.

    Example:

        sanitize report runs/first
    """
    from sanitize.jobs.restore import write_again

    with errors():
        check_there(run)
        places = {"report": write_again(run)}
    if as_json:
        print_json(places)
    else:
        print_places(places)
