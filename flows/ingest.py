"""New shards, batch by batch: only what is new is read, judged against the reference of the store, and released to
training jobs if the batch as a whole is like what was approved.

What was done is in the ledger (`sanitize/ledger.py`); nothing else decides what is new, what is a batch, and what
became of it. A batch is claimed by one entry and committed by one. Between the two any process may die: the folder of
the batch is an ordinary run folder, and the next ingest goes on there before it claims anything.
"""

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from flows.clean import scores_folder
from flows.reference import REMEMBERED, Reference, approval, clean_shards, load_reference
from flows.run import Run
from flows.runner import RunnerConfig, Threads
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import index_shards
from sanitize.data.sources import find_shards, refuse_inside
from sanitize.drift import DriftConfig, check_drift, summarise_shards
from sanitize.drift.statistics import CALIBRATE
from sanitize.embed import embed_shards
from sanitize.errors import ArtifactError, ConfigError, DataError, SanitizeError, StorageError
from sanitize.lease import check_held
from sanitize.ledger import (
    Batch,
    ClaimEntry,
    CommitEntry,
    Decision,
    DecisionEntry,
    DuplicatesEntry,
    Ledger,
    Offered,
    State,
)
from sanitize.progress import track
from sanitize.report import ReportConfig, write_drift_report, write_report
from sanitize.score import score_shards
from sanitize.select import WriteConfig, judge_shards, write_selected
from sanitize.storage import create, exclusive, exists, fingerprint, join, read_bytes, sha256_file

logger = logging.getLogger("sanitize.ingest")
FEED = "feed.json"
STATUSES: dict[str, Literal["accepted", "held"]] = {"accept": "accepted", "hold": "held", "refit": "held"}
MAX_TEXT = 2_000  # characters of what is said of a failed batch


class BatchConfig(BaseModel):
    """What becomes of a batch depends on this and on the reference alone; it is written into the claim.

    Attributes:
        drift: when a batch is held.
        write, report: one section a stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    drift: DriftConfig = DriftConfig()
    write: WriteConfig = WriteConfig()
    report: ReportConfig = ReportConfig(title="New training data")


class IngestConfig(BatchConfig):
    """Sanitizing what lands; one YAML file. How samples are judged is the reference's business.

    Attributes:
        shards: where shards land: directories, globs, brace ranges or URLs.
        max_shards: of one batch; where more are new, there are several batches.
        compute: device and threads; seed and precision are always the reference's.
        n_groups: groups of shards that are worked on side by side. Results do not depend on it.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    shards: tuple[str, ...] = Field(min_length=1)
    max_shards: int = Field(default=64, ge=1)
    compute: Compute = Compute()
    n_groups: int = Field(default=1, ge=1)
    runner: RunnerConfig = Threads()


NewRun = Callable[[str, Compute, int], Run]
Committed = Callable[[dict[str, Any]], None]


class Listing(NamedTuple):
    """What is there: shards, those of them that had to be read, and what is wrong with others."""

    offered: list[Offered]
    was_read: list[Offered]
    unreadable: list[str]


def run_ingest(config: IngestConfig, store: str, direct: bool) -> dict[str, Any]:
    """Process what is new as a Prefect flow, or with plain function calls; both give the same digests.

    Raises:
        ConfigError: there is no reference, or no folder that shards could come into.
        StorageError: storage does not answer; run again, and it goes on.
    """
    if direct:
        return ingest(config, store, Run, lambda _batch: None)
    from flows.tasks import ingest_flow  # imports Prefect: a second that --direct need not wait for

    return dict(ingest_flow(config, store))


def ingest(config: IngestConfig, store: str, new_run: NewRun, committed: Committed) -> dict[str, Any]:
    """The order of work: finish what was begun, list, claim and process batch by batch, tell trainers.

    Args:
        config: where shards land, and the limits.
        store: folder or URL.
        new_run: how stages are called.
        committed: is told of every batch that this call commits.

    Returns:
        `batches` that were committed here; how many shards were `new`, `duplicates` or `known`; those that are
        `unreadable`; the `feed`; version of the `reference`.
    """
    refuse_inside(config.shards, store)
    ledger = Ledger(store)
    found = []

    def finish(batch: Batch) -> None:
        if (entry := process(batch, store, ledger, config, new_run)) is not None:
            found.append(told(store, batch, entry))
            write_feed(store, ledger)
            committed(found[-1])

    for begun in ledger.read().unfinished:
        finish(begun)
    listing = list_shards(config.shards, ledger.read())
    claimed: set[Offered] = set()
    while (batch := claim(config, listing.offered, ledger)) is not None:
        claimed |= set(batch.claim.shards)
        finish(batch)
    state = note_duplicates(listing.offered, ledger)
    write_feed(store, ledger)
    return {
        "batches": found,
        "new": len(claimed),
        "duplicates": len(set(listing.was_read) - claimed),
        "known": len(listing.offered) - len(listing.was_read),
        "unreadable": listing.unreadable,
        "feed": join(store, FEED),
        "reference": state.reference.version,
    }


def list_shards(sources: Sequence[str], state: State) -> Listing:
    """All shards that are there; one that was seen before is known by size and time, and is not read again."""
    state.reference  # noqa: B018 - raises where there is none, before anything is read
    urls = list(find_shards(sources, may_come=True).values())
    offered, was_read, unreadable = [], [], []

    def look(url: str) -> Offered | str:
        try:
            seen = _fingerprint(url)
            known = state.seen.get(seen)
            digest = known or sha256_file(url)
            if known is None and _fingerprint(url) != seen:
                return f"{url} changed while it was read; it will be looked at again"
        except DataError as error:
            return str(error)
        advance(1)
        return Offered(url=url, size=seen[1], modified=seen[2], sha256=digest)

    # One by one, a far store takes minutes to say what it has.
    with track("list", len(urls), "shards") as advance, ThreadPoolExecutor(16) as pool:
        for shard in pool.map(look, urls):
            if isinstance(shard, str):
                unreadable.append(shard)
            else:
                offered.append(shard)
                was_read += [] if shard.fingerprint in state.seen else [shard]
    return Listing(offered, was_read, unreadable)


def _fingerprint(url: str) -> tuple[str, int, str]:
    found = fingerprint(url)
    return str(found["url"]), int(found["size"]), str(found["modified"])


def claim(config: IngestConfig, offered: Sequence[Offered], ledger: Ledger) -> Batch | None:
    """The next batch of shards that nobody has; None where all are somebody's."""
    settings = config.model_dump(mode="json", include=set(BatchConfig.model_fields))

    def decide(state: State) -> ClaimEntry | None:
        shards = state.new(offered)[: config.max_shards]
        if not shards:
            return None
        name, version = state.name_of(shards), state.reference.version
        return ClaimEntry(batch=name, reference=version, shards=tuple(shards), settings=settings)

    entry, _ = ledger.append(decide)
    return Batch(claim=entry) if isinstance(entry, ClaimEntry) else None


def note_duplicates(offered: Sequence[Offered], ledger: Ledger) -> State:
    """Remember shards whose bytes were known, so that the next ingest need not read them to see it."""

    def decide(state: State) -> DuplicatesEntry | None:
        shards = [s for s in offered if s.fingerprint not in state.seen and s.sha256 in state.taken]
        return DuplicatesEntry(shards=tuple(shards)) if shards else None

    return ledger.append(decide)[1]


def process(batch: Batch, store: str, ledger: Ledger, config: IngestConfig, new_run: NewRun) -> CommitEntry | None:
    """Take a claimed batch through all stages and commit what became of it; None where another process does.

    Raises:
        StorageError, OSError: storage does not answer; the batch stays claimed, and the next ingest goes on with it.
    """
    name = batch.claim.batch
    folder = join(store, "batches", name)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder))
        except ArtifactError:
            logger.info("batch %s: another process is at work on it", name)
            return None
        state = ledger.read()
        if state.batches[name].commit is not None:
            return None
        reference = load_reference(store, state.references[batch.claim.reference])
        try:
            made = _run_batch(batch, reference, folder, config, new_run)
        except StorageError:
            raise
        except SanitizeError as error:
            made = CommitEntry(batch=name, status="failed", reasons=(str(error)[:MAX_TEXT],))

        def decide(state: State) -> CommitEntry | None:
            check_held(folder)  # `made` may be wrong where another process has written over the files since
            return None if state.batches[name].commit else made

        entry, _ = ledger.append(decide)
    return made if entry is not None else None


def _run_batch(batch: Batch, reference: Reference, folder: str, config: IngestConfig, new_run: NewRun) -> CommitEntry:
    """The order of work in a batch: index, embed, score, judge, write, remember, compare, report."""
    settings, of = BatchConfig.model_validate(batch.claim.settings), reference.config
    numerics = {"seed": of.compute.seed, "precision": of.compute.precision}
    run = new_run(folder, config.compute.model_copy(update=numerics), config.n_groups)
    places = {shard.name: shard.url for shard in batch.claim.shards}
    names = list(places)
    dataset = run.sharded("00-index", index_shards, names, of.index, places)
    _refuse_changed(dataset, batch.claim)
    embeddings = run.sharded("20-embeddings", embed_shards, names, of.embed, dataset, reference.embedder)
    scores = tuple(
        run.sharded(scores_folder(scorer), score_shards, embeddings.shards, scorer, fitted, embeddings)
        for scorer, fitted in zip(of.scorers, reference.fitted, strict=True)
    )
    judged = of.judge, dataset, scores, reference.scores
    selection = run.stage("40-selection", judge_shards, *judged, held_out=(CALIBRATE,))
    shards = run.sharded("50-shards", write_selected, names, settings.write, dataset, selection)
    read = of.statistics, dataset, embeddings, selection, reference.projection
    remembered = run.stage(REMEMBERED, summarise_shards, *read)
    compared = settings.drift, reference.statistics, remembered, reference.projection
    by_design = of.judge.false_flags(len(of.scorers))
    drift = run.stage("70-drift", check_drift, *compared, by_design=by_design)
    run.stage("90-report", write_report, settings.report, dataset, scores, selection, shards)
    run.stage("91-drift-report", write_drift_report, drift)
    run.save("finished")
    name, counts = batch.claim.batch, selection.manifest().counts
    return CommitEntry(
        batch=name,
        status=STATUSES[drift.info["verdict"]],
        verdict=drift.info["verdict"],
        reasons=tuple(drift.info["reasons"]),
        samples={status: counts.get(status, 0) for status in ("samples", "kept", "quarantined", "unreadable")},
        digests={stage["folder"]: stage["digest"] for stage in run.stages},
        clean=clean_shards(shards, name, join("batches", name, "50-shards")),
    )


def _refuse_changed(dataset: Dataset, entry: ClaimEntry) -> None:
    for shard in entry.shards:
        if dataset.info["shards"][shard.name]["sha256"] != shard.sha256:
            raise DataError(f"shard {shard.url} has changed since it was claimed; offer it again under its new content")


def write_feed(store: str, ledger: Ledger) -> None:
    """Write what trainers may read, from the ledger; whoever writes last has read it last."""
    n_written = -1
    while (state := ledger.read()).n_entries != n_written:  # who writes an older one than is there, writes again
        n_written, url = state.n_entries, join(store, FEED)
        feed = {"format": 1, "shards": [line.model_dump() for line in state.feed()]}
        data = json.dumps(feed, indent=1).encode() + b"\n"
        if not exists(url) or read_bytes(url) != data:
            with create(url) as writer:
                writer.write(data)


def told(store: str, batch: Batch, entry: CommitEntry) -> dict[str, Any]:
    """What became of a batch, for people and machines."""
    folder = join(store, "batches", entry.batch)
    pages = {"report": "90-report/index.html", "drift": "91-drift-report/index.html"}
    return {
        "batch": entry.batch,
        "status": entry.status,
        "verdict": entry.verdict,
        "reasons": list(entry.reasons),
        "shards": len(batch.claim.shards),
        "samples": entry.samples,
        "reference": batch.claim.reference,
        **{name: join(folder, page) if entry.verdict else None for name, page in pages.items()},
    }


def list_batches(store: str, status: str | None = None) -> list[dict[str, Any]]:
    """All batches as the ledger has them, the oldest first."""
    found = []
    for batch in Ledger(store).read().batches.values():
        commit = batch.commit or CommitEntry(batch=batch.claim.batch, status="failed")  # nothing is known of it yet
        decision = None if batch.decision is None else batch.decision.model_dump(exclude={"kind", "batch"})
        state = {"status": batch.status, "decision": decision, "released": batch.is_released}
        found.append(told(store, batch, commit) | state)
    return [row for row in found if status in (None, row["status"])]


DECISIONS: dict[Decision, tuple[str, ...]] = {
    "approved": ("held", "accepted"),
    "rejected": ("held", "accepted"),
    "retried": ("failed",),
}


def decide(store: str, name: str, decision: Decision, by: str = "", note: str = "") -> dict[str, Any]:
    """A person's decision on a batch: a record in the ledger, and the feed that follows from it.

    Args:
        store: folder or URL.
        name: of the batch, or how it begins.
        decision: approved or rejected, of a held or accepted batch; retried, of a failed one.
        by: who; the user's name where it is empty.
        note: why.

    Raises:
        ConfigError: there is no such batch, or it cannot be decided like that.
    """
    ledger = Ledger(store)

    def entry(state: State) -> DecisionEntry:
        batch = state.find(name)
        allowed = DECISIONS[decision]
        if batch.status not in allowed:
            raise ConfigError(f"batch {batch.claim.batch} is {batch.status}; only {' or '.join(allowed)} is {decision}")
        if decision == "retried" and batch.decision is not None:
            raise ConfigError(f"batch {batch.claim.batch} was retried; its shards are in other batches by now")
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


STAGES: Sequence[Any] = (
    index_shards,
    embed_shards,
    score_shards,
    judge_shards,
    write_selected,
    summarise_shards,
    check_drift,
    write_report,
    write_drift_report,
)
