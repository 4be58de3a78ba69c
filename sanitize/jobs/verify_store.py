"""Verification of a store: feed, ledger, batches, versions of the reference, and their source shards.

Outside the store only source shards are read, and only for their size and sha256.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sanitize.artifacts import MANIFEST, read_manifest
from sanitize.entries import CleanShard, ReferenceEntry
from sanitize.errors import ArtifactError, ConfigError, DataError, StorageError
from sanitize.jobs.reference import CONFIG, STATISTICS, version_folder
from sanitize.jobs.store import FEED, SHARDS, feed_of
from sanitize.jobs.verify import Verified, artifacts_of, check_artifact, check_run, nothing
from sanitize.ledger import IngestBatch, Ledger, State
from sanitize.storage import absolute, exists, fingerprint, is_local, join, names_below, read_bytes, sha256_file


def verify_path(path: str | Path, sources: bool = True) -> Verified:
    """Re-hash a store, a batch or a reference in a store, a run, or a single artifact.

    Args:
        path: path or URL of the folder.
        sources: True also checks the source shards of a store; missing or changed ones are notes, not problems.

    Raises:
        ArtifactError: the folder holds none of them.
    """
    path = str(path)
    path = absolute(path) if is_local(path) else path.rstrip("/")
    if exists(join(path, "ledger")):
        return verify_store(path, sources)
    above, _, name = path.rpartition("/")
    store, _, kind = above.rpartition("/")
    if kind in ("batches", "reference") and exists(join(store, "ledger")):
        state, found = _read(store)
        if kind == "batches" and name in state.batches:
            return found.plus(_batch(store, state, state.batches[name]))
        versions = [entry for entry in state.references.values() if version_folder(store, entry.version) == path]
        if kind == "reference" and versions:
            return found.plus(_reference(store, state, versions[0]))
    if exists(join(path, MANIFEST)):
        return check_artifact(path)[0]
    if not artifacts_of(path):
        raise ArtifactError(f"{path} holds no finished artifact; give the folder of a run, an artifact or a store")
    return check_run(path)


def verify_store(store: str, sources: bool = True) -> Verified:
    """Walk from the feed to the shards; see `verify_path`."""
    state, found = _read(store)
    found = found.plus(Verified(0, list(_feed_problems(store, state)), []))
    for batch in state.batches.values():
        found = found.plus(_batch(store, state, batch))
    for entry in state.references.values():
        found = found.plus(_reference(store, state, entry))
    found.problems.extend(_unknown_folders(store, state))
    found = found.plus(_approved(state))
    return found.plus(_sources(state)) if sources else found


def _read(store: str) -> tuple[State, Verified]:
    """The log up to the first wrong entry, and the problem with that entry."""
    ledger = Ledger(store)
    try:
        return ledger.read(), nothing()
    except ArtifactError as error:
        rest = "; later entries were not checked"
        return ledger.so_far, Verified(0, [f"{error}{rest}"], [])


def _feed_problems(store: str, state: State) -> Iterator[str]:
    """Differences of feed.json from the ledger."""
    url = join(store, FEED)
    expected = feed_of(state)
    try:
        data = read_bytes(url)
    except FileNotFoundError:
        if state.references:
            yield f"{url}: missing; the next `sanitize ingest` writes it"
        return
    if data == expected:
        return
    wanted = {line.shard: line.model_dump() for line in state.feed()}
    try:
        there = {str(line["shard"]): line for line in json.loads(data)["shards"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        yield f"{url}: damaged ({type(error).__name__}); the next `sanitize ingest` writes it again"
        return
    for shard in sorted(wanted.keys() | there.keys()):
        if shard not in there:
            yield f"{url}: {shard} is missing, which the ledger releases"
        elif shard not in wanted:
            yield f"{url}: has {shard}, which the ledger does not release"
        elif there[shard] != wanted[shard]:
            yield f"{url}: differs from the ledger on {shard}"
    if wanted == there:
        yield f"{url}: not as it was written, but its shards are those that the ledger releases"


def _batch(store: str, state: State, batch: IngestBatch) -> Verified:
    """The artifacts of a batch against its commit, and its inputs against its reference."""
    name, commit = batch.claim.batch, batch.commit
    folder = join(store, "batches", name)
    reference = state.references.get(batch.claim.reference)
    if reference is None:
        problem = f"{folder}: its claim names reference v{batch.claim.reference:04d}, which the ledger does not have"
        return Verified(0, [problem], [])
    found = check_run(folder, set(reference.digests.values()))
    if commit is None:
        found.notes.append(f"{folder}: claimed, and not finished; `sanitize ingest` goes on with it")
        return found
    there = set(artifacts_of(folder))
    for artifact, digest in sorted(commit.digests.items()):
        if artifact not in there:
            found.problems.append(f"{join(folder, artifact)}: missing; the ledger names it")
        elif _digest(join(folder, artifact)) != digest:
            found.problems.append(f"{join(folder, artifact)}: its manifest is not the one the ledger names")
    found.problems.extend(_clean_problems(folder, commit.clean))
    return found


def _clean_problems(folder: str, lines: Collection[CleanShard]) -> Iterator[str]:
    """Clean shards that differ between the feed and the manifest of their folder."""
    try:
        files = read_manifest(join(folder, SHARDS)).files if lines else {}
    except ArtifactError:
        return  # reported above
    for line in lines:
        inside = line.shard.removeprefix(f"batches/{line.batch}/{SHARDS}/")
        entry = files.get(inside)
        if entry is None or (entry.sha256, entry.size) != (line.sha256, line.size):
            yield f"{join(folder, SHARDS, inside)}: the ledger and the manifest list different bytes"


def _digest(path: str) -> str | None:
    try:
        return read_manifest(path).digest
    except ArtifactError:
        return None


def _reference(store: str, state: State, entry: ReferenceEntry) -> Verified:
    """The artifacts of a version against the digests in the ledger."""
    folder, found = version_folder(store, entry.version), nothing()
    for name, digest in sorted(entry.digests.items()):
        found = found.plus(check_artifact(join(folder, name), digest)[0])
    try:
        same = not entry.config or sha256_file(join(folder, CONFIG)) == entry.config
    except DataError:
        same = False
    if not same:
        found.problems.append(f"{join(folder, CONFIG)}: not what the ledger names")
    for name in entry.merged:
        if name not in state.batches or state.batches[name].commit is None:
            found.problems.append(f"{folder}: merges batch {name}, which the ledger does not have")
    if entry.version > 1:
        found.problems.extend(_merge_problems(folder, state, entry))
    return found


def _merge_problems(folder: str, state: State, entry: ReferenceEntry) -> Iterator[str]:
    """Problems where a version was not merged from the version before and the batches in the ledger."""
    commits = [state.batches[name].commit for name in entry.merged if name in state.batches]
    wanted = {commit.digests.get("60-statistics", "") for commit in commits if commit is not None}
    wanted.add(state.references[entry.version - 1].digests.get(STATISTICS, ""))
    try:
        inputs = set(read_manifest(join(folder, STATISTICS)).recipe.inputs.values())
    except ArtifactError:
        return  # reported above
    if inputs != wanted:
        yield f"{join(folder, STATISTICS)}: not merged from what the ledger names"


def _unknown_folders(store: str, state: State) -> Iterator[str]:
    """Folders that no entry of the ledger names."""
    for name in _folders(join(store, "batches")):
        if name not in state.batches:
            yield f"{join(store, 'batches', name)}: no entry of the ledger names this batch"
    names = {f"v{version:04d}" for version in state.references}
    begun = f"v{len(names) + 1:04d}"  # left by a killed refit; the next one removes it
    for name in _folders(join(store, "reference")):
        if name not in {*names, begun}:
            yield f"{join(store, 'reference', name)}: no entry of the ledger names this version"


def _folders(folder: str) -> list[str]:
    return sorted({name.partition("/")[0] for name in names_below(folder) if "/" in name})


def _approved(state: State) -> Verified:
    """Clean shards of the approved run, which are in the feed and in the folder of that run."""
    found = nothing()
    for entry in state.references.values():
        for line in entry.clean:
            problem = _difference(line.shard, line.size, line.sha256)
            found = found.plus(Verified(1, [f"{line.shard}: {problem}; the feed names it"] if problem else [], []))
    return found


def _sources(state: State) -> Verified:
    """Source shards of the batches and of the first reference, at their recorded places."""
    notes, n = [], 0
    shards = [shard for batch in state.batches.values() for shard in batch.claim.shards]
    shards += [shard for entry in state.references.values() for shard in entry.shards]
    for shard in {shard.url: shard for shard in shards}.values():
        n += 1
        if problem := _difference(shard.url, shard.size, shard.sha256):
            notes.append(f"{shard.url}: source shard {problem}")
    return Verified(n, [], notes)


def _difference(url: str, size: int, sha256: str) -> str:
    """Difference of a file from its record; "" where there is none."""
    try:
        found: dict[str, Any] = fingerprint(url)
        same = found["size"] == size and sha256_file(url) == sha256
    except (DataError, ConfigError, StorageError, OSError, ValueError) as error:
        return f"is gone or cannot be read ({error})"
    return "" if same else "has changed since"
