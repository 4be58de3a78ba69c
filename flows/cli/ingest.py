"""`sanitize reference`, `ingest`, `batches`, `approve`, `reject`, `retry`, `refit`."""

import math
import shlex
from typing import Annotated, Any, Literal

import typer

from flows.cli.app import (
    AsJson,
    Store,
    console,
    errors,
    print_json,
    say,
)
from flows.cli.command import DEVICE, REQUIRED, SHARDS, Option, job_command
from sanitize.plural import counted

BatchName = Annotated[
    str, typer.Argument(help="First characters of the name of a batch; `sanitize batches` lists them.")
]
By = Annotated[str, typer.Option(help="Person who decides (default: your user name).")]
Note = Annotated[str, typer.Option(help="Reason; kept in the ledger.")]
Retried = Annotated[
    str,
    typer.Argument(
        help="First characters of the name of a batch (of a split batch, all refused shards are retried); or file "
        "name, URL or sha256 of a refused shard."
    ),
]
STYLES = {
    "accepted": "green",
    "approved": "green",
    "held": "yellow",
    "failed": "red",
    "rejected": "red",
    "claimed": "cyan",
    "split": "cyan",
    "retried": "cyan",
}


NOTE = Option("--note", str, "note", "Reason; kept in the ledger.")


def _of_level(settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a reference; level 0 means no level."""
    return settings if values["level"] is None else settings | {"level": values["level"] or None}


@job_command(
    Option("run", str, "run", "A run folder, as given to --out: a path or a URL.", REQUIRED),
    Option(
        "--per-class", int, "statistics.per_class", "Samples of each class stored with all embeddings (default 2,000)."
    ),
    Option(
        "--level",
        float,
        "",
        "Probability that a scorer flags a clean sample (default 0.001); 0: the rules alone decide.",
    ),
    NOTE,
    out=Store,
    has_flow=False,
    common=(),
    prepare=_of_level,
)
def reference(result: dict[str, Any], out: str) -> None:
    """Approve a finished run of `sanitize clean` as the reference for new shards.

    Writes version 1 of the reference: the embedder, a sample of each class, the scorers fitted on it, and statistics to
    compare batches with. The shards of the run count as processed, and its clean shards are the first in the feed.

    Example:

        sanitize reference runs/first --store s3://bucket/store --note "checked by Ada"
    """
    console.print(
        f"reference v0001 is in {result['folder']}, from {counted(result['shards'], 'shard')}", soft_wrap=True
    )
    _warn_of_level(result)


def _warn_of_level(result: dict[str, Any]) -> None:
    """Warn where p-values from so few rows cannot be as small as the level: no sample would ever be flagged."""
    level, n_rows = result["level"], result["samples"]["calibrate"]
    if level and level * (n_rows + 1) < 1:
        least = math.ceil(1e3 / (n_rows + 1)) / 1e3
        say(
            "level",
            "yellow",
            f"{level:g} flags no sample: p-values from {counted(n_rows, 'held-out sample')} cannot be so small. "
            f"Batches are still compared as a whole. Take --level {least:g} or more, or a run of "
            f"{counted(math.ceil(2 / level), 'sample')}",
        )


def _exit_code(result: dict[str, Any]) -> int:
    statuses = {batch["status"] for batch in result["batches"]}
    if statuses & {"failed", "claimed"} or result["unreadable"] or result["altered"]:
        return 1
    return 3 if "held" in statuses or result["refused"] else 0


@job_command(
    Option("--max-shards", int, "max_shards", "Shards of one batch, at most (default 64)."),
    Option("--groups", int, "n_groups", "Groups of shards worked on side by side (default 1)."),
    out=Store,
    common=(SHARDS, DEVICE),  # the seed is that of the reference
    exit_code=_exit_code,
)
def ingest(result: dict[str, Any], out: str) -> None:
    """Sanitize new shards, and release them to training jobs if they resemble the reference.

    Shards that were processed before are not read again. New shards are made batches; each is judged sample by sample
    against the reference, and as a whole for drift. An accepted batch is in STORE/feed.json, which training jobs read;
    a held batch waits for `sanitize approve` or `sanitize reject`. Run the command any number of times, also
    twice at once: each shard ends in exactly one batch, and a crashed batch is finished first. A shard that no batch
    can take is refused, once, with the reason; the others go on.

    Exit code 3: a batch is held or a shard was refused, and waits for a person. 1: a batch failed or could not be
    finished, a shard could not be read this time, or a clean shard in the feed is not as its batch wrote it.

    Examples:

        sanitize ingest --store runs/store --shards 'incoming/*.tar' --direct

        sanitize ingest configs/ingest.yaml --store s3://bucket/store
    """
    console.print(
        f"{counted(result['new'], 'new shard')}, {counted(result['duplicates'], 'copy')} of others, "
        f"{result['known']:,} known; reference v{result['reference']:04d}"
    )
    if not any(result[name] for name in ("new", "duplicates", "known", "refused", "changing", "unreadable")):
        say("nothing", "yellow", "has landed yet at the sources")
    for name, style in (("changing", "yellow"), ("unreadable", "red"), ("altered", "red")):
        for why in result[name]:
            say(name, style, why)
    for shard in result["refused"]:
        _print_refused(shard, out)
    for batch in result["batches"]:
        _print_batch(batch)
        if batch["status"] == "held":
            then = f"`sanitize approve {batch['batch']} --store {shlex.quote(out)}`, or `sanitize reject` with the same"
            console.print(f"         look: {batch['drift']}", highlight=False, soft_wrap=True)
            console.print(f"         then: {then}", highlight=False, soft_wrap=True)
    console.print(f"feed: {result['feed']}", highlight=False, soft_wrap=True)


def _print_batch(batch: dict[str, Any], more: str = "") -> None:
    """One line, and one for each reason."""
    line = counted(batch["shards"], "shard")
    if counts := batch["samples"]:
        line += "".join(f", {counts[name]:,} {name}" for name in ("kept", "quarantined", "unreadable"))
    say(f"{batch['status']:>8} {batch['batch']}", STYLES[batch["status"]], line + more)
    for reason in batch["reasons"]:
        say("        ", "", reason)


def _print_refused(shard: dict[str, Any], store: str) -> None:
    """One line, and one for the reason."""
    retry = f"sanitize retry {shard['sha256'][:16]} --store {shlex.quote(store)}"
    again = f"; `{retry}` offers it again" if shard["sha256"] else ""
    say(f"{shard['status']:>8}", "red", shard["shard"] + again)
    for reason in shard["reasons"]:
        say("        ", "", reason)


def batches(
    store: Store,
    status: Annotated[
        Literal["accepted", "approved", "held", "rejected", "failed", "retried", "claimed", "split", "refused"] | None,
        typer.Option(
            help="Only batches of this status; `held`: those that wait for a decision; `refused`: only shards that are "
            "in no batch."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the batches of a store, oldest first, and the refused shards, with status and reasons.

    Example:

        sanitize batches --store runs/store --status held
    """
    from sanitize.jobs.store import list_batches, list_refused

    with errors():
        found = [] if status == "refused" else list_batches(store, status)
        refused = list_refused(store) if status in (None, "refused") else []
    if as_json:
        print_json([*found, *refused])
        return
    for shard in refused:
        _print_refused(shard, store)
    for batch in found:
        _print_batch(batch, f"; reference v{batch['reference']:04d}; {'' if batch['released'] else 'not '}in the feed")
        if decision := batch["decision"]:
            note = f": {decision['note']}" if decision["note"] else ""
            what = f"it was {batch['outcome']}; {decision['decision']} by {decision['by']} at {decision['at']}"
            say("        ", "", what + note)
    if not found and not refused:
        say("none", "yellow", "there are no such batches")


def approve(batch: BatchName, store: Store, by: By = "", note: Note = "", as_json: AsJson = False) -> None:
    """Release a held batch to training jobs.

    Example:

        sanitize approve 3f2a --store runs/store --note "the new camera, as announced"
    """
    _decide(store, batch, "approved", by, note, as_json)


def reject(batch: BatchName, store: Store, by: By = "", note: Note = "", as_json: AsJson = False) -> None:
    """Keep a held batch from training jobs for good, or take back an accepted one.

    A failed batch, or a claimed batch that no process works on, is given up.

    Example:

        sanitize reject 3f2a --store runs/store --note "a patch in the corner of class 0"
    """
    _decide(store, batch, "rejected", by, note, as_json)


def retry(batch: Retried, store: Store, by: By = "", note: Note = "", as_json: AsJson = False) -> None:
    """Let the shards of a failed batch, or a refused shard, be new again; the next ingest takes them.

    A claimed batch that no process works on counts as failed. An ingest with `--max-shards 1` puts each shard into a
    batch of its own, so that a shard that makes batches fail fails alone.

    Examples:

        sanitize retry 3f2a --store runs/store

        sanitize retry train-000017.tar --store runs/store --note "limits were raised"
    """
    _decide(store, batch, "retried", by, note, as_json)


def _decide(
    store: str, batch: str, decision: Literal["approved", "rejected", "retried"], by: str, note: str, as_json: bool
) -> None:
    from sanitize.jobs.store import decide

    with errors():
        result = decide(store, batch, decision, by, note)
    if as_json:
        print_json(result)
    else:
        _print_decision(result)


def _print_decision(result: dict[str, Any]) -> None:
    """What was decided, by whom, and what follows; for a decision that stood already, also when and why."""
    decision, by = result["decision"], f"by {result['by']}"
    if result["already"]:
        what, style = f"was {decision} already", "yellow"
        effect = f"at {result['at']}" + (f": {result['note']}" if result["note"] else "")
    elif decision == "retried":
        what, style, effect = decision, "green", "and new again: the next ingest takes it"
    else:
        what, style = decision, "green"
        effect = f"and its clean shards are {'' if result['released'] else 'not '}in the feed"
    for name in result.get("shards") or [f"batch {result['batch']}"]:
        say(f"{name} {what}", style, f"{by} {effect}")


@job_command(NOTE, out=Store, has_flow=False, common=())
def refit(result: dict[str, Any], out: str) -> None:
    """Make the next version of the reference: the statistics of all released batches are merged into it.

    No old shard is read. Batches that are claimed later are judged against the new version.

    Example:

        sanitize refit --store runs/store --note "monthly"
    """
    what = f"reference v{result['reference']:04d}, {counted(len(result['merged']), 'batch')} merged: {result['folder']}"
    console.print(what, soft_wrap=True)
    _warn_of_level(result)
