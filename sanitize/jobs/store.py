"""What a store says of itself, and what a person decides: batches, refused shards, the feed."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

from sanitize.artifacts import altered
from sanitize.entries import CommitEntry, Decision, DecisionEntry, Refused, RetryEntry
from sanitize.errors import ConfigError, StorageError
from sanitize.jobs.reference import approval
from sanitize.ledger import IngestBatch, Ledger, State
from sanitize.storage import create, exclusive, exists, is_local, join, read_bytes

FEED = "feed.json"
SHARDS = "50-shards"  # folder of a batch


def feed_of(state: State) -> bytes:
    """The content of the feed, which is a function of the ledger."""
    feed = {"format": 1, "shards": [line.model_dump() for line in state.feed()]}
    return json.dumps(feed, indent=1).encode() + b"\n"


def write_feed(store: str, ledger: Ledger) -> None:
    """Write what trainers may read, from the ledger; whoever writes last has read it last."""
    n_written = -1
    while (state := ledger.read()).n_entries != n_written:  # who writes an older one than is there, writes again
        n_written, url = state.n_entries, join(store, FEED)
        data = feed_of(state)
        if not exists(url) or read_bytes(url) != data:
            with create(url) as writer:
                writer.write(data)


def altered_shards(store: str, state: State) -> list[str]:
    """Clean shards in the feed that are not what their batch wrote, as far as sizes and times tell."""
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


def told(store: str, batch: IngestBatch, entry: CommitEntry | None, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    """What became of a batch, for people and machines; with no entry, it is still claimed, and `reasons` say why."""
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
    """All batches as the ledger has them, the oldest first."""
    found = []
    for batch in Ledger(store).read().batches.values():
        decision = None if batch.decision is None else batch.decision.model_dump(exclude={"kind", "batch"})
        found.append(told(store, batch, batch.commit) | {"decision": decision, "released": batch.is_released})
    return [row for row in found if status in (None, row["status"])]


def list_refused(store: str) -> list[dict[str, Any]]:
    """Shards that are in no batch, in the order they were refused: `shard`, `sha256`, `reason`, and the file's mark."""
    return [told_refused(shard) for shard in Ledger(store).read().refused.values()]


def told_refused(shard: Refused) -> dict[str, Any]:
    """A refused shard, for people and machines."""
    return {
        "status": "refused",
        "shard": shard.url,
        "reasons": [shard.reason],
        **shard.model_dump(include={"size", "modified", "sha256"}),
    }


def decide(store: str, name: str, decision: Decision, by: str = "", note: str = "") -> dict[str, Any]:
    """A person's decision on a batch: a record in the ledger, and the feed that follows from it.

    A batch that is claimed and that nobody is at work on is given up first: it counts as failed.

    Args:
        store: folder or URL.
        name: of the batch, or how it begins; with `retried` also a refused shard (its URL, its file name, or how its
            sha256 begins), or a split batch for all shards that it refused.
        decision: approved or rejected, of a held or accepted batch; retried or rejected, of a failed or claimed one.
        by: who; the user's name where it is empty.
        note: why.

    Raises:
        ConfigError: there is no such batch, or it cannot be decided like that.
        ArtifactError: another process is at work on the batch.
    """
    ledger = Ledger(store)
    state = ledger.read()
    if decision == "retried" and not _begins_batch(state, name) and (refused := state.find_refused(name)):
        if len({shard.sha256 for shard in refused}) > 1:
            raise ConfigError(f"{len(refused)} refused shards go by that name; give how the sha256 of one begins")
        return _retry_refused(ledger, refused, by, note)
    if decision == "retried" and (commit := state.find(name).commit) is not None and commit.status == "split":
        return _retry_refused(ledger, [s for s in commit.refused if (s.url, s.sha256) in state.refused], by, note)
    if state.find(name).status == "claimed" and decision != "approved":
        _give_up(store, state.find(name), ledger, approval(by, note))

    def entry(state: State) -> DecisionEntry:
        batch = state.find(name)
        if decision not in batch.may_be:
            raise ConfigError(_cannot_be(batch, decision))
        merged_in = [v for v, reference in state.references.items() if batch.claim.batch in reference.merged]
        if decision == "rejected" and merged_in:
            raise ConfigError(f"reference v{merged_in[0]:04d} has learned from it; begin another store")
        return DecisionEntry(batch=batch.claim.batch, decision=decision, **approval(by, note))

    added, state = ledger.append(entry)
    write_feed(store, ledger)
    assert isinstance(added, DecisionEntry)
    batch = state.batches[added.batch]
    return {
        "batch": added.batch,
        "status": batch.status,
        "released": batch.is_released,
        **added.model_dump(include={"decision", "by", "at", "note"}),
    }


def _begins_batch(state: State, name: str) -> bool:
    return any(batch.startswith(name) for batch in state.batches)


def _cannot_be(batch: IngestBatch, decision: Decision) -> str:
    name = f"batch {batch.claim.batch}"
    if batch.status == "split":
        return f"{name} was split: its shards are refused (`sanitize batches` names them) or in other batches"
    if batch.decision is not None and batch.decision.decision == "retried":
        return f"{name} was retried; its shards are in other batches by now"
    allowed = {"approved": "held or accepted", "rejected": "held, accepted, failed or claimed"}
    return f"{name} is {batch.status}; only {allowed.get(decision, 'failed or claimed')} is {decision}"


def _give_up(store: str, batch: IngestBatch, ledger: Ledger, by: dict[str, str]) -> None:
    """Commit a claimed batch as failed. Raises ArtifactError where another process is at work on it."""
    name = batch.claim.batch
    with ExitStack() as stack:
        # What keeps an ingest from the folder keeps us from it too; the ledger still has one commit a batch.
        with suppress(StorageError, OSError):
            stack.enter_context(exclusive(join(store, "batches", name)))
        reason = f"given up by {by['by']} at {by['at']}" + (f": {by['note']}" if by["note"] else "")
        made = CommitEntry(batch=name, status="failed", reasons=(reason,))
        ledger.append(lambda state: None if state.batches[name].commit else made)


def _retry_refused(ledger: Ledger, refused: Sequence[Refused], by: str, note: str) -> dict[str, Any]:
    by_bytes = [shard for shard in refused if shard.sha256]
    if not by_bytes:
        which = f"{refused[0].url} needs" if len(refused) == 1 else f"{len(refused)} refused shards need"
        raise ConfigError(f"{which} no retry: each ingest looks at what it refused for another reason than its bytes")
    made = RetryEntry(shards=tuple(sorted({shard.sha256 for shard in by_bytes})), **approval(by, note))

    def entry(state: State) -> RetryEntry | None:
        still = all((shard.url, shard.sha256) in state.refused for shard in by_bytes)
        return made if still else None  # somebody else was quicker

    ledger.append(entry)
    return {
        "shards": [shard.url for shard in by_bytes],
        "sha256": list(made.shards),
        "decision": "retried",
        "released": False,
        **made.model_dump(include={"by", "at", "note"}),
    }
