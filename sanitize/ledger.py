"""The ledger: the state of every shard that was ever offered, an append-only log of small files beside the data.

An entry is the file `ledger/NNNNNNNN.json`; it is created only if the number is free, and never changed. The writer of
number n has read all earlier entries, so all processes see one order of entries, and a decision based on the state that
was read (these shards are new) still holds when it is written: where another writer was faster, the number is taken,
the log is read again, and the decision is made again. This is optimistic concurrency as in Delta Lake (Armbrust et al.,
VLDB 2020, section 3.2); it needs no lock and no server, and a process may die at any instant.

The only clock time is the `at` of a person's decision. The bytes of a shard identify it, not its name; `url`, `size`
and `modified` serve to recognise a known shard without reading it.

A store is untrusted, so names and numbers are bounded when an entry is parsed (`entries.py`), and an entry that does
not follow from the earlier ones (a commit without a claim, say) is an error.
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import BaseModel

from sanitize.entries import (
    PARSER,
    ClaimEntry,
    CleanShard,
    CommitEntry,
    Decision,
    DecisionEntry,
    DuplicatesEntry,
    Entry,
    Fingerprint,
    Offered,
    ReferenceEntry,
    Refused,
    RefusedEntry,
    RetryEntry,
)
from sanitize.errors import ArtifactError, DataError, RequestError
from sanitize.storage import create_new, is_local, join, names_below, open_read

__all__ = [
    "ClaimEntry",
    "CleanShard",
    "CommitEntry",
    "Decision",
    "DecisionEntry",
    "DuplicatesEntry",
    "Entry",
    "IngestBatch",
    "Ledger",
    "Offered",
    "ReferenceEntry",
    "Refused",
    "RefusedEntry",
    "RetryEntry",
    "State",
]

_ENTRY = "{:08d}.json"
MAX_ENTRY_BYTES = 1 << 30  # a reference of a million shards has half as many
MAX_NAMED = 3  # batches in a message
Outcome = Literal["claimed", "accepted", "held", "failed", "split"]


class IngestBatch(BaseModel):
    """State of a batch in the log."""

    claim: ClaimEntry
    commit: CommitEntry | None = None
    decision: DecisionEntry | None = None

    @property
    def outcome(self) -> Outcome:
        """Status of the commit, or "claimed"; no decision of a person changes it."""
        return "claimed" if self.commit is None else self.commit.status

    @property
    def status(self) -> Outcome | Decision:
        """The last decision of a person; without one, the outcome."""
        return self.outcome if self.decision is None else self.decision.decision

    @property
    def may_be(self) -> tuple[Decision, ...]:
        """Decisions that a person can make: none before the commit, and none once the shards are new again."""
        if self.decision is not None and self.decision.decision == "retried":
            return ()
        if self.outcome in ("held", "accepted"):
            return "approved", "rejected"
        return ("rejected", "retried") if self.outcome == "failed" else ()

    @property
    def is_released(self) -> bool:
        """True if training jobs may read its clean shards; the last decision of a person counts."""
        return self.status in ("accepted", "approved")


class State:
    """State of the ledger after its entries.

    Attributes:
        n_entries: number of entries.
        references: references by version.
        batches: batches by name, in the order of their claims.
        seen: fingerprint of a shard -> sha256.
        taken: sha256 of all shards that are in a batch, in the first reference, or refused.
        refused: shards that are in no batch, by URL and sha256, in the order of refusal.
        retried: shards that were refused and made new again, by URL and sha256, with the person's decision.
        attempts: sha256 of a shard -> number of its batches that ended without a verdict on it.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.n_entries = 0
        self.references: dict[int, ReferenceEntry] = {}
        self.batches: dict[str, IngestBatch] = {}
        self.seen: dict[Fingerprint, str] = {}
        self.taken: set[str] = set()
        self.refused: dict[tuple[str, str], Refused] = {}
        self.retried: dict[tuple[str, str], RetryEntry] = {}
        self.attempts: Counter[str] = Counter()
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Add the next entry. Raises ArtifactError where it does not follow from the earlier ones."""
        self.check(entry)
        self.n_entries += 1
        if isinstance(entry, ReferenceEntry):
            self.references[entry.version] = entry
            self._take(entry.shards)
        elif isinstance(entry, ClaimEntry):
            self._add_claim(entry)
        elif isinstance(entry, DuplicatesEntry):
            self._take(entry.shards)
        elif isinstance(entry, RefusedEntry):
            self._refuse(entry.shards)
        elif isinstance(entry, CommitEntry):
            self._add_commit(entry)
        elif isinstance(entry, DecisionEntry):
            self._add_decision(entry)
        else:
            self._offer_again(entry.shards)
            self.retried |= {key: entry for key in self.refused if key[1] in entry.shards}
            self.refused = {key: shard for key, shard in self.refused.items() if key not in self.retried}

    def check(self, entry: Entry) -> None:
        """Raises ArtifactError where the entry does not follow from the earlier ones."""
        if isinstance(entry, ReferenceEntry) and entry.version != len(self.references) + 1:
            raise ArtifactError(f"reference v{entry.version:04d} follows {len(self.references)} others")
        if isinstance(entry, ClaimEntry):
            if entry.batch in self.batches:
                raise ArtifactError(f"batch {entry.batch} is claimed twice")
            if twice := {shard.sha256 for shard in entry.shards} & self.taken:
                raise ArtifactError(f"batch {entry.batch} claims bytes that were taken before (sha256 {min(twice)})")
            if len({shard.name for shard in entry.shards}) < len(entry.shards):
                raise ArtifactError(f"batch {entry.batch} claims two shards of one name")
        if isinstance(entry, RetryEntry) and (others := set(entry.shards) - {s.sha256 for s in self.refused.values()}):
            raise ArtifactError(f"bytes are retried that were never refused (sha256 {min(others)})")
        if isinstance(entry, CommitEntry | DecisionEntry) and entry.batch not in self.batches:
            raise ArtifactError(f"batch {entry.batch} was never claimed")
        if isinstance(entry, CommitEntry) and self.batches[entry.batch].commit is not None:
            raise ArtifactError(f"batch {entry.batch} is committed twice")
        if isinstance(entry, DecisionEntry) and entry.decision not in self.batches[entry.batch].may_be:
            batch = self.batches[entry.batch]
            raise ArtifactError(f"batch {entry.batch} is {batch.status}; it cannot be {entry.decision}")

    def _add_claim(self, entry: ClaimEntry) -> None:
        self.batches[entry.batch] = IngestBatch(claim=entry)
        self._take(entry.shards)
        for shard in entry.shards:
            self.refused.pop((shard.url, ""), None)

    def _add_commit(self, entry: CommitEntry) -> None:
        batch = self.batches[entry.batch]
        batch.commit = entry
        if entry.status == "split":
            kept_out = {shard.sha256 for shard in entry.refused}
            self._offer_again(shard.sha256 for shard in batch.claim.shards if shard.sha256 not in kept_out)
            self._refuse(entry.refused)

    def _add_decision(self, entry: DecisionEntry) -> None:
        batch = self.batches[entry.batch]
        batch.decision = entry
        if entry.decision == "retried":
            self._offer_again(shard.sha256 for shard in batch.claim.shards)

    def _take(self, shards: Iterable[Offered]) -> None:
        for shard in shards:
            self.seen[shard.fingerprint] = shard.sha256
            self.taken.add(shard.sha256)

    def _offer_again(self, digests: Iterable[str]) -> None:
        for sha256 in digests:
            self.taken.discard(sha256)
            self.attempts[sha256] += 1

    def _refuse(self, shards: Iterable[Refused]) -> None:
        for shard in shards:
            self.refused[shard.url, shard.sha256] = shard
            self.retried.pop((shard.url, shard.sha256), None)
            if shard.sha256:
                self.taken.add(shard.sha256)
            else:  # read it again: its bytes may differ from those of this fingerprint
                self.seen.pop((shard.url, shard.size, shard.modified), None)

    @property
    def reference(self) -> ReferenceEntry:
        """The newest reference. Raises RequestError where there is none."""
        if not self.references:
            raise RequestError("the store has no reference yet: make one with `sanitize reference RUN --store STORE`")
        return self.references[max(self.references)]

    @property
    def unfinished(self) -> list[IngestBatch]:
        """Batches that are claimed and not committed, the oldest first."""
        return [batch for batch in self.batches.values() if batch.commit is None]

    def new(self, shards: Iterable[Offered]) -> list[Offered]:
        """Shards that are in no batch, each content once, sorted by name; of copies the smallest URL is taken."""
        unique: dict[str, Offered] = {}
        for shard in sorted(shards, key=lambda shard: shard.url):
            if shard.sha256 not in self.taken:
                unique.setdefault(shard.sha256, shard)
        return sorted(unique.values(), key=lambda shard: shard.name)

    def name_of(self, shards: Sequence[Offered]) -> str:
        """Name of a batch of these shards, 16 hex digits; it differs where shards are tried again."""
        text = "\n".join(sorted(f"{shard.sha256} {self.attempts[shard.sha256]}" for shard in shards))
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        while name in self.batches:  # shards can be crafted to give such a name
            name = hashlib.sha256(name.encode()).hexdigest()[:16]
        return name

    def find_refused(self, what: str) -> list[Refused]:
        """Refused shards with this URL, file name, or beginning of a sha256."""
        return [shard for key, shard in self.refused.items() if _is_called(key, what)]

    def find_retried(self, what: str) -> list[tuple[str, RetryEntry]]:
        """URLs and decisions of retried shards with this URL, file name, or beginning of a sha256."""
        return [(key[0], entry) for key, entry in self.retried.items() if _is_called(key, what)]

    def find(self, name: str) -> IngestBatch:
        """The batch whose name begins with `name`. Raises RequestError unless there is exactly one."""
        found = [whole for whole in self.batches if whole.startswith(name)]
        if len(found) == 1 and name:
            return self.batches[found[0]]
        if not self.batches:
            raise RequestError(f"there is no batch {name!r}: the store has none yet")
        if found and name:
            what, names = f"{len(found)} batches begin with {name!r}", found[:MAX_NAMED]
        else:
            what, names = f"there is no batch {name!r}", self._nearest(name[:16])
        raise RequestError(f"{what}: {', '.join(names)}; `sanitize batches` lists all")

    def _nearest(self, name: str) -> list[str]:
        """Names of batches that begin nearly like that; if there are none, of the newest batches."""
        begins: dict[str, list[str]] = {}
        for whole in self.batches:
            begins.setdefault(whole[: len(name)], []).append(whole)
        close = difflib.get_close_matches(name, begins, n=MAX_NAMED)
        near = [whole for begin in close for whole in begins[begin]]
        return (near or list(self.batches)[::-1])[:MAX_NAMED]

    def feed(self) -> list[CleanShard]:
        """Clean shards that training jobs may read: those of the run of version 1, and of all released batches."""
        lines = [line for entry in self.references.values() for line in entry.clean]
        released = (batch.commit for batch in self.batches.values() if batch.is_released)
        lines += [line for commit in released if commit is not None for line in commit.clean]
        return sorted(lines, key=lambda line: line.shard)


def _is_called(key: tuple[str, str], what: str) -> bool:
    """True where `what` is the URL or file name of a shard, or the beginning of its sha256."""
    url, sha256 = key
    return bool(what) and (what in (url, url.rpartition("/")[2]) or sha256.startswith(what))


class Ledger:
    """Log of a store, a folder or a URL. Entries never change, so each is read once."""

    def __init__(self, store: str) -> None:
        self.folder = join(store, "ledger")
        self._state = State(())

    @property
    def so_far(self) -> State:
        """State of the entries read so far; where `read` failed, of those before the entry it names."""
        return self._state

    def read(self) -> State:
        """Current state, the same object each time. Raises ArtifactError where an entry is missing or damaged."""
        names = [name for name in names_below(self.folder) if name[:1].isdigit()]  # others are unfinished
        if names != [_ENTRY.format(number) for number in range(len(names))]:
            raise ArtifactError(
                f"{self.folder} is incomplete: it has {len(names)} entries, and the last is {names[-1]}"
            )
        new = names[self._state.n_entries :]
        with ThreadPoolExecutor(1 if is_local(self.folder) else 16) as pool:  # one after another, this takes minutes
            for name, entry in zip(new, pool.map(self._entry, new), strict=True):
                try:
                    self._state.add(entry)
                except ArtifactError as error:
                    raise ArtifactError(f"{join(self.folder, name)} does not follow from the log: {error}") from error
        return self._state

    def _entry(self, name: str) -> Entry:
        url = join(self.folder, name)
        try:
            with open_read(url) as stream:
                data = stream.read(MAX_ENTRY_BYTES + 1)
            if len(data) > MAX_ENTRY_BYTES:
                raise ValueError(f"it has more than {MAX_ENTRY_BYTES:,} bytes")
            return PARSER.validate_json(data)
        except (DataError, ValueError) as error:
            raise ArtifactError(f"{url} is damaged: {error}") from error

    def append(self, decide: Callable[[State], Entry | None]) -> tuple[Entry | None, State]:
        """Add the entry that `decide` returns for the state at the time of writing.

        Args:
            decide: function from the state to an entry; called again where another process was faster. None adds
                no entry.

        Returns:
            The added entry, and the state with it.
        """
        while True:
            state = self.read()
            entry = decide(state)
            if entry is None:
                return None, state
            state.check(entry)
            data = entry.model_dump_json(indent=1).encode() + b"\n"
            if create_new(join(self.folder, _ENTRY.format(state.n_entries)), data):
                state.add(entry)
                return entry, state
