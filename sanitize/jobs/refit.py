"""The next version of a reference: the statistics of the batches released since are merged into the last one. No old
shard is read again."""

from typing import Any

from sanitize.artifacts import copy
from sanitize.drift import Statistics, merge_statistics
from sanitize.errors import ArtifactError, RequestError
from sanitize.jobs.job import DecisionConfig, job
from sanitize.jobs.reference import (
    BATCH_STATISTICS,
    CONFIG,
    EMBEDDER,
    PROJECTION,
    STATISTICS,
    begin,
    digests_of,
    fit_scorers,
    load_reference,
    n_samples,
    outdated,
)
from sanitize.jobs.run import Run
from sanitize.jobs.store import IngestStore, approval
from sanitize.lease import check_held
from sanitize.ledger import Ledger, ReferenceEntry, State
from sanitize.storage import exclusive, join, sha256_file


class RefitConfig(DecisionConfig):
    """Config of the next version of a reference; all that decides is in the last version."""


@job(RefitConfig, IngestStore, claims=False, has_flow=False)
def refit(config: RefitConfig, run: Run) -> dict[str, Any]:
    """Make the next version of a reference: the last one merged with the batches released since; scorers are refitted.

    Returns:
        `reference`: the version; `folder`; the `merged` batches; `samples` seen, and stored for each half; `level`.

    Raises:
        RequestError: there is no reference, or there is nothing to do: no batch was released since, and this version of
            sanitize can use the reference as it is.
    """
    ledger = Ledger(run.out)
    with exclusive(join(run.out, "reference")):
        state = ledger.read()
        last = load_reference(run.out, state.reference)
        batches = unmerged(state)
        if not batches and not outdated(last):
            raise RequestError(f"no batch was released since reference v{last.version:04d}: nothing to merge")
        inside = begin(last.version + 1, config.compute_after(last.config.compute), run)
        copy(last.embedder, join(inside.out, EMBEDDER))
        copy(last.projection, join(inside.out, PROJECTION))
        parts = [last.statistics, *(_committed_statistics(run.out, state, name) for name in batches)]
        stored = inside.stage(STATISTICS, merge_statistics, last.config.statistics, parts)
        fit_scorers(last.config, stored, inside)
        entry = ReferenceEntry(
            version=last.version + 1,
            digests=digests_of(inside),
            config=sha256_file(join(inside.out, CONFIG)),
            merged=tuple(batches),
            **approval("", config.note),
        )

        def decide(state: State) -> ReferenceEntry:
            check_held(join(run.out, "reference"))  # with the lock, no other process makes versions
            if state.reference.version != last.version:  # the lock was lost to another process
                raise ArtifactError(f"reference v{state.reference.version:04d} was made meanwhile; run again")
            return entry

        ledger.append(decide)
    return {
        "reference": entry.version,
        "folder": inside.out,
        "merged": list(batches),
        "samples": n_samples(stored),
        "level": last.config.judge.level,
    }


def unmerged(state: State) -> list[str]:
    """Released batches that are in no version of the reference; sorted, as the order of merging changes rounding."""
    merged = {name for entry in state.references.values() for name in entry.merged}
    return sorted(name for name, batch in state.batches.items() if batch.is_released and name not in merged)


def _committed_statistics(store: str, state: State, batch: str) -> Statistics:
    statistics, commit = Statistics.load(join(store, "batches", batch, BATCH_STATISTICS)), state.batches[batch].commit
    if commit is None or commit.digests[BATCH_STATISTICS] != statistics.digest:
        raise ArtifactError(f"{statistics.path} is not what was committed to the ledger")
    return statistics
