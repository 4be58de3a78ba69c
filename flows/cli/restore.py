"""`sanitize restore`."""

from typing import Annotated

import typer

from flows.cli.app import AsJson, Quiet, RunFolder, bars, check_there, console, errors, print_json


def restore(
    run: RunFolder,
    key: Annotated[
        list[str], typer.Option("--key", help="Key of a quarantined sample, or SHARD:KEY. May be repeated.")
    ],
    note: Annotated[str, typer.Option(help="Person who decided, and the reason; kept with the verdict.")] = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Put quarantined samples back.

    Writes a new selection and new shards beside the old ones (40-selection.r1, 50-shards.r1, …); no existing file is
    changed. The decision is kept in the verdict's reasons and in decisions.jsonl. Keys are in the report, and in the
    names of the members of RUN/50-shards/quarantine.

    Example:

        sanitize restore runs/first --key 000123 --key train-0004.tar:000456 --note "seen by Ada: both are fine"
    """
    from sanitize.jobs.restore import restore as put_back

    with errors(), bars(quiet):
        check_there(run)
        result = put_back(run, tuple(key), note)
    if as_json:
        print_json(result)
    else:
        console.print(f"{result['restored']} sample(s) put back; clean shards: {result['clean']}", soft_wrap=True)
