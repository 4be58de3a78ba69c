"""`sanitize restore`."""

from typing import Any

from flows.cli.app import RunFolder, check_there, console
from flows.cli.command import REQUIRED, Option, job_command
from sanitize.plural import counted


def _of_a_run(settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    check_there(values["out"])
    return settings


@job_command(
    Option(
        "--key",
        list[str],
        "keys",
        "Key of a quarantined sample; SHARD:KEY where several shards have the key. May be given several times.",
        REQUIRED,
    ),
    Option("--note", str, "note", "Person who decided, and the reason; kept with the verdict."),
    out=RunFolder,
    has_flow=False,
    common=(),
    prepare=_of_a_run,
)
def restore(result: dict[str, Any], out: str) -> None:
    """Put quarantined samples back.

    Writes a new selection and new shards beside the old ones (40-selection.r1, 50-shards.r1, …); no existing file is
    changed. The decision is kept in the verdict's reasons and in decisions.jsonl. Keys are in the report, and in the
    names of the members of RUN/50-shards/quarantine: up to the first dot, with folders. Shards of `sanitize import`
    have keys of eight digits.

    Example:

        sanitize restore runs/first --key 00000123 --key train-000004.tar:00000456 --note "seen by Ada"
    """
    console.print(f"{counted(result['restored'], 'sample')} put back; clean shards: {result['clean']}", soft_wrap=True)
