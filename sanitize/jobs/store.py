"""State of a store (batches, refused shards, the feed) and the decisions of its users."""

import difflib
import getpass
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sanitize.artifacts import altered
from sanitize.entries import CommitEntry, Decision, DecisionEntry, Refused, RetryEntry
from sanitize.errors import ArtifactError, RequestError, StorageError
from sanitize.jobs.result import CallResult
from sanitize.ledger import IngestBatch, Ledger, State
from sanitize.storage import create, exclusive, exists, is_local, join, read_bytes

FEED = "feed.json"
SHARDS = "50-shards"  # folder of a batch


@dataclass(frozen=True)
class IngestStore(CallResult):
    """A store of `ingest`: batches, refused shards, and the feed of clean shards.

    Attributes:
        folder: path or URL of the store.
        summary: findings of the call that returned this object; empty where the store was opened.
    """

    place = "store"

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The store in a folder.

        Args:
            folder: path or URL of the store.

        Raises:
            ArtifactError: the folder holds no store with a reference, or its ledger is damaged.
        """
        store = super().open(folder)
        if not Ledger(store.folder).read().references:
            raise ArtifactError(f"{folder} is no store: it has no reference; make one with `sanitize reference`")
        return store

    @property
    def batches(self) -> list[dict[str, Any]]:
        """All batches, the oldest first: batch, status, verdict, reasons, samples, report, drift, released, ..."""
        return list_batches(self.folder)

    @property
    def refused(self) -> list[dict[str, Any]]:
        """Shards that are in no batch: shard, sha256, reasons, size, modified."""
        return list_refused(self.folder)

    @property
    def feed(self) -> str:
        """Path or URL of the feed, a JSON file with all released clean shards."""
        return join(self.folder, FEED)

    @property
    def clean_shards(self) -> list[str]:
        """Paths or URLs of all released clean shards; of the approved run and of the batches."""
        lines = Ledger(self.folder).read().feed()
        return [join(self.folder, line.shard) if line.batch else line.shard for line in lines]


def feed_of(state: State) -> bytes:
    """Content of the feed; a function of the ledger alone."""
    feed = {"format": 1, "shards": [line.model_dump() for line in state.feed()]}
    return json.dumps(feed, indent=1).encode() + b"\n"


def write_feed(store: str, ledger: Ledger) -> None:
    """Write the feed from the ledger; the last process to write has read the ledger last."""
    n_written = -1
    while (state := ledger.read()).n_entries != n_written:  # a process that wrote an outdated feed writes again
        n_written, url = state.n_entries, join(store, FEED)
        data = feed_of(state)
        if not exists(url) or read_bytes(url) != data:
            with create(url) as writer:
                writer.write(data)


def altered_shards(store: str, state: State) -> list[str]:
    """Clean shards in the feed that have changed since their batch wrote them, judged by size and time."""
    released = [batch.claim.batch for batch in state.batches.values() if batch.is_released]
    expected: dict[str, dict[str, tuple[int, str]]] = {name: {} for name in released}
    for line in state.feed():
        if line.batch:
            name = line.shard.removeprefix(f"batches/{line.batch}/{SHARDS}/")
            expected[line.batch][name] = line.size, line.sha256

    def look(batch: str) -> list[str]:
        way_out = f"put it back, or take batch {batch} out of the feed with `sanitize reject`"
        found = altered(join(store, "batches", batch, SHARDS), expected[batch])
        return [f"{problem}; {way_out}" for problem in found]

    with ThreadPoolExecutor(1 if is_local(store) else 16) as pool:
        return [problem for problems in pool.map(look, released) for problem in problems]


def batch_summary(
    store: str, batch: IngestBatch, entry: CommitEntry | None, reasons: tuple[str, ...] = ()
) -> dict[str, Any]:
    """State of a batch as a result has it; a batch without entry is still claimed, for these `reasons`."""
    folder = join(store, "batches", batch.claim.batch)
    pages = {"report": "90-report/index.html", "drift": "91-drift-report/index.html"}
    return {
        "batch": batch.claim.batch,
        "status": "claimed" if entry is None else entry.status,
        "verdict": entry and entry.verdict,
        "reasons": list(reasons if entry is None else entry.reasons),
        "shards": len(batch.claim.shards),
        "samples": {} if entry is None else entry.samples,
        "reference": batch.claim.reference,
        **{name: join(folder, page) if entry and entry.verdict else None for name, page in pages.items()},
    }


def list_batches(store: str, status: str | None = None) -> list[dict[str, Any]]:
    """Batches in the ledger, the oldest first.

    Args:
        store: folder or URL.
        status: only batches of this status, which is the last `decision` of a person; without one, the `outcome`.
    """
    return [
        batch_summary(store, batch, batch.commit)
        | {
            "status": batch.status,
            "outcome": batch.outcome,
            "decision": None if batch.decision is None else batch.decision.model_dump(exclude={"kind", "batch"}),
            "released": batch.is_released,
        }
        for batch in Ledger(store).read().batches.values()
        if status in (None, batch.status)
    ]


def list_refused(store: str) -> list[dict[str, Any]]:
    """Shards that are in no batch, in the order of refusal: `shard`, `sha256`, `reasons`, `size`, `modified`."""
    return [refused_summary(shard) for shard in Ledger(store).read().refused.values()]


def refused_summary(shard: Refused) -> dict[str, Any]:
    """A refused shard as a result has it."""
    return {
        "status": "refused",
        "shard": shard.url,
        "reasons": [shard.reason],
        **shard.model_dump(include={"size", "modified", "sha256"}),
    }


def decide(store: str, name: str, decision: Decision, by: str = "", note: str = "") -> dict[str, Any]:
    """Record a user's decision on a batch in the ledger, and write the feed again.

    A claimed batch that no process works on is given up first: it counts as failed. A decision that stands already is
    not recorded again.

    Args:
        store: folder or URL.
        name: name of the batch, or its beginning; with `retried` also a refused shard (its URL, its file name, or the
            beginning of its sha256), or a split batch for all shards that it refused.
        decision: approved or rejected for a held or accepted batch; retried or rejected for a failed or claimed one.
        by: name of the user; empty takes the login name.
        note: reason.

    Returns:
        `batch`, its `status` and whether it is `released`; for refused shards `shards`, `sha256`; the `decision` with
        `by`, `at` and `note`; `already`: True where the decision was made before, and nothing was recorded.

    Raises:
        RequestError: there is no such batch, or the decision does not fit its status.
        ArtifactError: another process works on the batch.
    """
    ledger = Ledger(store)
    state = ledger.read()
    if decision == "retried" and (shards := _refused_by(state, name)) is not None:
        return _retry_refused(ledger, *shards, by, note)
    if state.find(name).outcome == "claimed" and decision != "approved":
        _give_up(store, state.find(name), ledger, approval(by, note))

    def entry(state: State) -> DecisionEntry | None:
        batch = state.find(name)
        if batch.status == decision:
            return None
        if decision not in batch.may_be:
            raise RequestError(_cannot_be(batch, decision))
        merged_in = [v for v, reference in state.references.items() if batch.claim.batch in reference.merged]
        if decision == "rejected" and merged_in:
            raise RequestError(f"reference v{merged_in[0]:04d} has learned from it; begin another store")
        return DecisionEntry(batch=batch.claim.batch, decision=decision, **approval(by, note))

    added, state = ledger.append(entry)
    write_feed(store, ledger)
    batch = state.find(name)
    assert batch.decision is not None
    return {
        "batch": batch.claim.batch,
        "status": batch.status,
        "released": batch.is_released,
        **batch.decision.model_dump(include={"decision", "by", "at", "note"}),
        "already": added is None,
    }


Retried = list[tuple[str, RetryEntry]]  # URLs of shards, with the decision


def _refused_by(state: State, name: str) -> tuple[list[Refused], Retried] | None:
    """Shards that are to be retried, and those that were; None where a batch is called so that was not split."""
    if not any(batch.startswith(name) for batch in state.batches):
        refused, retried = state.find_refused(name), state.find_retried(name)
        if len({shard.sha256 for shard in refused}) > 1:
            raise RequestError(f"{len(refused)} refused shards have that name; give the beginning of the sha256 of one")
        if not refused and not retried:
            names = {shard.url.rpartition("/")[2] for shard in state.refused.values()}
            near = difflib.get_close_matches(name, names)
            hint = f"there are {', '.join(near)}" if near else "`sanitize batches` lists all"
            raise RequestError(f"no batch begins with {name!r}, and no refused shard is called so; {hint}")
        return refused, retried
    commit = state.find(name).commit
    if commit is None or commit.status != "split":
        return None
    keys = [(shard.url, shard.sha256) for shard in commit.refused]
    return (
        [state.refused[key] for key in keys if key in state.refused],
        [(key[0], state.retried[key]) for key in keys if key in state.retried],
    )


def _cannot_be(batch: IngestBatch, decision: Decision) -> str:
    name = f"batch {batch.claim.batch}"
    if batch.outcome == "split":
        return f"{name} was split: its shards are refused (`sanitize batches` names them) or in other batches"
    if batch.decision is not None and batch.decision.decision == "retried":
        return f"{name} was retried; its shards are in other batches by now"
    allowed = {"approved": "held or accepted", "rejected": "held, accepted, failed or claimed"}
    return f"{name} is {batch.status}; only a {allowed.get(decision, 'failed or claimed')} batch can be {decision}"


def _give_up(store: str, batch: IngestBatch, ledger: Ledger, by: dict[str, str]) -> None:
    """Commit a claimed batch as failed. Raises ArtifactError where another process works on it."""
    name = batch.claim.batch
    with ExitStack() as stack:
        # A folder without answer cannot be locked; the ledger still has one commit a batch.
        with suppress(StorageError, OSError):
            stack.enter_context(exclusive(join(store, "batches", name)))
        reason = f"given up by {by['by']} at {by['at']}" + (f": {by['note']}" if by["note"] else "")
        made = CommitEntry(batch=name, status="failed", reasons=(reason,))
        ledger.append(lambda state: None if state.batches[name].commit else made)


def _retry_refused(ledger: Ledger, refused: Sequence[Refused], retried: Retried, by: str, note: str) -> dict[str, Any]:
    by_bytes = [shard for shard in refused if shard.sha256]
    if not by_bytes and retried:
        last = retried[-1][1]
        return _retry_summary([url for url, entry in retried if entry == last], last, already=True)
    if not by_bytes:
        which = refused[0].url if len(refused) == 1 else f"{len(refused)} refused shards"
        raise RequestError(
            f"nothing to retry for {which}: the reason for the refusal is not in the bytes, so every ingest tries again"
        )
    made = RetryEntry(shards=tuple(sorted({shard.sha256 for shard in by_bytes})), **approval(by, note))

    def entry(state: State) -> RetryEntry | None:
        still = all((shard.url, shard.sha256) in state.refused for shard in by_bytes)
        return made if still else None  # another process was faster

    ledger.append(entry)
    return _retry_summary([shard.url for shard in by_bytes], made, already=False)


def _retry_summary(shards: list[str], entry: RetryEntry, already: bool) -> dict[str, Any]:
    return {
        "shards": shards,
        "sha256": list(entry.shards),
        "decision": "retried",
        "released": False,
        **entry.model_dump(include={"by", "at", "note"}),
        "already": already,
    }


def approval(by: str, note: str) -> dict[str, str]:
    """User, time and reason of a decision."""
    return {"by": by or getpass.getuser(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "note": note}
