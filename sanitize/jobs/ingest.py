"""Ingest of new shards, batch by batch: only new shards are read; each batch is judged against the reference of the
store, and released to training jobs if the batch as a whole resembles the approved data.

The ledger (`sanitize/ledger.py`) is the only record of which shards are new, of the batches, and of their outcomes. One
entry claims a batch and one entry commits it. In between any process may die: the folder of the batch is an ordinary
run folder, and the next ingest resumes it before it claims anything.

No shard stops the others. A shard that cannot be in a batch is refused in the ledger, with the reason: before the claim
where its name or place is the reason; later, where its bytes are, by splitting the batch: one commit refuses the bad
shards and makes the others new again, for the next batch. These are indexed a second time; in return a claim alone
determines the content of a batch folder, so that two processes in one folder write the same bytes.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from sanitize.data.index import index_shards
from sanitize.data.index_config import IndexConfig
from sanitize.data.sources import fingerprint_shards, refuse_inside
from sanitize.drift import DriftConfig, check_drift, summarise_shards
from sanitize.drift.statistics import CALIBRATE
from sanitize.embed import embed_shards
from sanitize.entries import ClaimEntry, CommitEntry, DuplicatesEntry, Offered, Refused, RefusedEntry
from sanitize.errors import ArtifactError, SanitizeError, StorageError
from sanitize.jobs.clean import scores_folder
from sanitize.jobs.job import ShardsConfig, job
from sanitize.jobs.landed import as_utf8, list_shards
from sanitize.jobs.reference import BATCH_STATISTICS, Reference, clean_shards, load_reference, refuse_outdated
from sanitize.jobs.run import Run
from sanitize.jobs.store import (
    FEED,
    SHARDS,
    IngestStore,
    altered_shards,
    batch_summary,
    refused_summary,
    write_feed,
)
from sanitize.jobs.unfit import is_storage, look_again, losses, unfit_shards
from sanitize.lease import check_held
from sanitize.ledger import IngestBatch, Ledger, State
from sanitize.plural import counted
from sanitize.report import ReportConfig, write_drift_report, write_report
from sanitize.score import score_shards
from sanitize.select import WriteConfig, judge_shards, write_selected
from sanitize.storage import exclusive, join

logger = logging.getLogger("sanitize.ingest")
STATUSES: dict[str, Literal["accepted", "held"]] = {"accept": "accepted", "hold": "held", "refit": "held"}
MAX_TEXT = 2_000  # characters of the reason of a failed batch


class BatchConfig(BaseModel):
    """Settings of a batch. The outcome depends on them and on the reference alone; they are written into the claim.

    Attributes:
        max_bad_fraction: share of unreadable samples in [0, 1] above which a shard is refused; None takes
            `index.max_bad_fraction` of the approved run. Samples behind damage count, as far as their number is known.
        max_bad_shards: number of shards in a batch that may have lost an unknown number of samples, such as shards that
            are cut off; if there are more, all are refused. None takes `index.max_bad_shards` of the approved run.
        drift: limits above which a batch is held.
        write, report: sections of the stages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bad_fraction: float | None = Field(default=None, ge=0, le=1)
    max_bad_shards: int | None = Field(default=None, ge=0)
    drift: DriftConfig = DriftConfig()
    write: WriteConfig = WriteConfig()
    report: ReportConfig = ReportConfig(title="New training data")


class IngestConfig(BatchConfig, ShardsConfig):
    """Config of one ingest; one YAML file. The reference has the settings by which samples are judged.

    Attributes:
        shards: places of incoming shards: directories, globs, brace ranges or URLs.
        max_shards: largest number of shards in a batch; more new shards make several batches.
        allow_factory: True allows the reference's embedder to run the function that it names, if an installed package
            holds the function.
        compute: device and threads; seed and precision are those of the reference.
    """

    max_shards: int = Field(default=64, ge=1)
    allow_factory: bool = Field(default=False, exclude=True)


@job(IngestConfig, IngestStore, claims=False)
def ingest(config: IngestConfig, run: Run) -> dict[str, Any]:
    """Judge new shards against the reference of a store, batch by batch, and release the clean ones.

    Steps: finish claimed batches, list shards, claim and process new batches, write the feed.

    Returns:
        `batches` that this call committed, and those that storage kept from it (status `claimed`); shards that this
        call `refused`; numbers of `new`, `duplicates` and `known` shards; shards that were `changing` while they were
        read, and `unreadable` ones; the `feed`, and shards `altered` in it; version of the `reference`.
    """
    store = run.out
    refuse_inside(config.shards, store)
    ledger = Ledger(store)
    newest = load_reference(store, ledger.read().reference, config.allow_factory)  # raises before any shard is claimed
    refuse_outdated(newest, store)
    work = _Work(config, run, ledger, [], [])
    for begun in ledger.read().unfinished:
        work.finish(begun)
    landed = list_shards(config.shards, ledger.read(), names_of(newest))
    note_refused(landed.refused, ledger, work.refused)
    claimed = work.claim_all(landed.offered)
    state = note_duplicates(landed.offered, ledger)
    write_feed(store, ledger)
    return {
        "batches": work.found,
        "refused": [refused_summary(shard) for shard in work.refused],
        "new": len(claimed),
        "duplicates": len(set(landed.was_read) - claimed),
        "known": len(landed.offered) - len(landed.was_read),
        "changing": landed.changing,
        "unreadable": landed.unreadable,
        "altered": altered_shards(store, state),
        "feed": join(store, FEED),
        "reference": state.reference.version,
    }


class _Work(NamedTuple):
    """One ingest: its inputs, the batches that were `found` finished, and the shards that were `refused`."""

    config: IngestConfig
    run: Run
    ledger: Ledger
    found: list[dict[str, Any]]
    refused: list[Refused]

    def finish(self, batch: IngestBatch) -> str:
        """Process and report a batch; returns its status, or "" where another process works on the batch."""
        try:
            entry = process(batch, self.ledger, self.config, self.run)
        except (StorageError, OSError) as error:
            logger.exception("batch %s: storage does not answer", batch.claim.batch)
            self.found.append(batch_summary(self.run.out, batch, None, (_message(error),)))
            return "claimed"
        if entry is None:
            return ""
        self.refused.extend(entry.refused)
        self.found.append(batch_summary(self.run.out, batch, entry))
        write_feed(self.run.out, self.ledger)
        self.run.note_batch(self.found[-1])
        return entry.status

    def claim_all(self, offered: Sequence[Offered]) -> set[Offered]:
        """Claim and process batches until no shard is new; returns the shards that were claimed here."""
        claimed: set[Offered] = set()
        waiting = self.ledger.read().new(offered)
        while (batch := claim(self.config, waiting, self.ledger)) is not None:
            claimed |= set(batch.claim.shards)
            n_refused = len(self.refused)
            if self.finish(batch) == "claimed":
                break  # storage failed for a fresh batch and may fail for all; new shards wait
            # The other shards of a split batch wait still; refused shards are not offered again here.
            gone, taken = {shard.url for shard in self.refused[n_refused:]}, self.ledger.read().taken
            waiting = [shard for shard in waiting if shard.sha256 not in taken and shard.url not in gone]
        return claimed


def names_of(reference: Reference) -> dict[int, str] | None:
    """Names of the classes of the reference, by number; None where labels are no class numbers."""
    index = reference.config.index
    return None if index.classes is not None or index.label != "cls" else index.class_names or {}


def claim(config: IngestConfig, waiting: Sequence[Offered], ledger: Ledger) -> IngestBatch | None:
    """Claim the next batch of new shards, in the order of `waiting`; None where no shard is new."""
    settings = config.model_dump(mode="json", include=set(BatchConfig.model_fields))

    def decide(state: State) -> ClaimEntry | None:
        shards: dict[str, Offered] = {}
        for shard in waiting:
            if shard.sha256 not in state.taken:
                shards.setdefault(shard.name, shard)  # a second shard of the same name waits for the next batch
            if len(shards) == config.max_shards:
                break
        if not shards:
            return None
        name, version = state.name_of(list(shards.values())), state.reference.version
        return ClaimEntry(batch=name, reference=version, shards=tuple(shards.values()), settings=settings)

    entry, _ = ledger.append(decide)
    return IngestBatch(claim=entry) if isinstance(entry, ClaimEntry) else None


def note_refused(refused: Sequence[Refused], ledger: Ledger, reported: list[Refused]) -> None:
    """Record files that cannot be shards in the ledger and in `reported`, once for each reason."""

    def decide(state: State) -> RefusedEntry | None:
        new = tuple(shard for shard in refused if state.refused.get((shard.url, "")) != shard)
        return RefusedEntry(shards=new) if new else None

    entry, _ = ledger.append(decide)
    if isinstance(entry, RefusedEntry):
        reported.extend(entry.shards)


def note_duplicates(offered: Sequence[Offered], ledger: Ledger) -> State:
    """Record shards whose bytes are known, so that the next ingest does not read them."""

    def decide(state: State) -> DuplicatesEntry | None:
        shards = [s for s in offered if s.fingerprint not in state.seen and s.sha256 in state.taken]
        return DuplicatesEntry(shards=tuple(shards)) if shards else None

    return ledger.append(decide)[1]


def process(batch: IngestBatch, ledger: Ledger, config: IngestConfig, run: Run) -> CommitEntry | None:
    """Take a claimed batch through all stages and commit the outcome; None where another process does.

    Raises:
        StorageError, OSError: storage does not answer; the batch stays claimed, and the next ingest resumes it.
    """
    name = batch.claim.batch
    folder = join(run.out, "batches", name)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder))
        except ArtifactError:
            logger.info("batch %s: another process works on it", name)
            return None
        state = ledger.read()
        if state.batches[name].commit is not None:
            return None
        made = _outcome(batch, state, folder, config, run)

        def decide(state: State) -> CommitEntry | None:
            check_held(folder)  # without the lock another process may have overwritten the files
            return None if state.batches[name].commit else made

        entry, _ = ledger.append(decide)
    return made if entry is not None else None


def _outcome(batch: IngestBatch, state: State, folder: str, config: IngestConfig, run: Run) -> CommitEntry:
    """Outcome of a batch; all errors but those of storage end in a commit."""
    index = None
    try:
        if batch.claim.reference not in state.references:
            raise ArtifactError(f"the ledger has no reference v{batch.claim.reference:04d}, which the batch names")
        reference = load_reference(run.out, state.references[batch.claim.reference], config.allow_factory)
        settings = BatchConfig.model_validate(batch.claim.settings)
        index = index_config(reference, settings)
        numerics = {"seed": reference.config.compute.seed, "precision": reference.config.compute.precision}
        inside = run.inside(f"batches/{batch.claim.batch}", config.compute.model_copy(update=numerics))
        return _run_batch(batch, reference, settings, index, inside)
    except Exception as error:
        if is_storage(error):
            raise
        if not isinstance(error, SanitizeError):
            logger.exception("batch %s failed", batch.claim.batch)
        refused = [] if index is None else look_again(batch.claim, index, folder, error)
        if refused:
            return _split(batch, refused)
        return CommitEntry(batch=batch.claim.batch, status="failed", reasons=(_message(error),))


def index_config(reference: Reference, settings: BatchConfig) -> IndexConfig:
    """Index settings of a batch."""
    limits = {"max_bad_fraction": settings.max_bad_fraction, "max_bad_shards": settings.max_bad_shards}
    return reference.config.index.model_copy(update={name: one for name, one in limits.items() if one is not None})


def _message(error: Exception) -> str:
    """Message of an error, with the class of an unexpected one."""
    message = str(error) if isinstance(error, SanitizeError | OSError) else f"{type(error).__name__}: {error}"
    return as_utf8(message)[:MAX_TEXT]


def _split(batch: IngestBatch, refused: Sequence[Refused]) -> CommitEntry:
    n, of_all = len(refused), len(batch.claim.shards)
    others = "; the other is new again" if of_all - n == 1 else "; the others are new again"
    reason = f"{n:,} of {counted(of_all, 'shard')} refused{others if n < of_all else ''}"
    return CommitEntry(batch=batch.claim.batch, status="split", reasons=(reason,), refused=tuple(refused))


def _run_batch(
    batch: IngestBatch, reference: Reference, settings: BatchConfig, index: IndexConfig, run: Run
) -> CommitEntry:
    """Stages of a batch: index, embed, score, judge, write, summarise, compare, report."""
    known = reference.config
    places = {shard.name: shard.url for shard in batch.claim.shards}
    names = list(places)
    dataset = run.sharded("00-index", index_shards, names, index, fingerprint_shards(places))
    if refused := unfit_shards(dataset, batch.claim, index):
        return _split(batch, refused)
    embeddings = run.sharded("20-embeddings", embed_shards, names, known.embed, dataset, reference.embedder)
    scores = tuple(
        run.sharded(scores_folder(scorer), score_shards, embeddings.shards, scorer, fitted, embeddings)
        for scorer, fitted in zip(known.scorers, reference.fitted, strict=True)
    )
    judged = known.judge, dataset, scores, reference.scores
    selection = run.stage("40-selection", judge_shards, *judged, trusted=(CALIBRATE,))
    shards = run.sharded(SHARDS, write_selected, names, settings.write, dataset, selection)
    to_summarise = known.statistics, dataset, embeddings, selection, reference.projection
    summarised = run.stage(BATCH_STATISTICS, summarise_shards, *to_summarise)
    compared = settings.drift, reference.statistics, summarised, reference.projection
    by_design = known.judge.false_flags(len(known.scorers))
    drift = run.stage("70-drift", check_drift, *compared, by_design=by_design, names=dataset.class_names)
    run.stage("90-report", write_report, settings.report, dataset, scores, selection, shards)
    run.stage("91-drift-report", write_drift_report, drift)
    run.save("finished")
    name, counts = batch.claim.batch, selection.manifest().counts
    return CommitEntry(
        batch=name,
        status=STATUSES[drift.info["verdict"]],
        verdict=drift.info["verdict"],
        reasons=(*drift.info["reasons"], *losses(dataset, batch.claim)),
        samples={status: counts.get(status, 0) for status in ("samples", "kept", "quarantined", "unreadable")},
        digests={stage["folder"]: stage["digest"] for stage in run.stages},
        clean=clean_shards(shards, name, join("batches", name, SHARDS)),
    )
