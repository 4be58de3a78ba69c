"""What became of every shard that was ever offered: an append-only log of small files beside the data.

An entry is `ledger/NNNNNNNN.json`; it is created only where none of that number is, and never changed. Whoever writes
number n has read all before it, so the entries are in one order that all see, and a decision that rests on what was
read (these shards are new) still holds when it is written: where another was quicker the name is taken, the log is read
again, and the decision made anew. This is optimistic concurrency as in Delta Lake (Armbrust et al., VLDB 2020, section
3.2); no lock, no server, and a process may die at any instant.

Nothing here is measured by the clock but the `at` of a person's decision. A shard is what its bytes are, whatever its
name; `url`, `size` and `modified` serve to recognise without reading one that was seen.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sanitize.errors import ArtifactError, ConfigError
from sanitize.storage import create_new, is_local, join, names_below, read_bytes

_ENTRY = "{:08d}.json"
Status = Literal["claimed", "accepted", "held", "failed"]
Decision = Literal["approved", "rejected", "retried"]
Fingerprint = tuple[str, int, str]  # url, size, modification time or ETag


class Offered(BaseModel):
    """A shard that was offered: where it was seen, and the sha256 of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    size: int
    modified: str
    sha256: str

    @property
    def fingerprint(self) -> Fingerprint:
        """What tells, without reading it, that it is still the same."""
        return self.url, self.size, self.modified

    @property
    def name(self) -> str:
        """Its name in its batch: no two shards share one, and it does not depend on what else is in the batch."""
        base = self.url.rpartition("/")[2]
        suffix = next(suffix for suffix in (".tar.gz", ".tgz", ".tar", "") if base.endswith(suffix))
        return f"{base.removesuffix(suffix)}-{self.sha256[:16]}{suffix}"


class CleanShard(BaseModel):
    """One line of the feed: a clean shard, by its place below the store or its URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str
    sha256: str
    size: int
    samples: int
    batch: str


class ReferenceEntry(BaseModel):
    """A version of the reference was approved. Version 1 brings the shards of the run it was made from.

    Attributes:
        version: 1, 2, …
        digests: of its artifacts, by folder.
        merged: batches whose statistics are in this version and were not in the one before.
        shards, clean: of the run, for version 1.
        by, at, note: who approved it, when (ISO 8601), why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["reference"] = "reference"
    version: int = Field(ge=1)
    digests: dict[str, str]
    merged: tuple[str, ...] = ()
    shards: tuple[Offered, ...] = ()
    clean: tuple[CleanShard, ...] = ()
    by: str = ""
    at: str = ""
    note: str = ""


class ClaimEntry(BaseModel):
    """These shards are a batch: nobody else takes them.

    Attributes:
        batch: its name, from the contents of its shards.
        reference: version it is judged against.
        shards: sorted by name.
        settings: all that its verdicts depend on beside the reference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["claim"] = "claim"
    batch: str
    reference: int
    shards: tuple[Offered, ...] = Field(min_length=1)
    settings: dict[str, Any] = {}


class DuplicatesEntry(BaseModel):
    """Shards whose bytes had been offered before, so that they need not be read again to see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["duplicates"] = "duplicates"
    shards: tuple[Offered, ...] = Field(min_length=1)


class CommitEntry(BaseModel):
    """What became of a batch; there is one for each, ever.

    Attributes:
        verdict: of the drift rule; None where the batch failed before.
        reasons: in plain words.
        samples: counts by status.
        digests: of its artifacts, by folder.
        clean: what it adds to the feed, if it is accepted or approved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["commit"] = "commit"
    batch: str
    status: Literal["accepted", "held", "failed"]
    verdict: Literal["accept", "hold", "refit"] | None = None
    reasons: tuple[str, ...] = ()
    samples: dict[str, int] = {}
    digests: dict[str, str] = {}
    clean: tuple[CleanShard, ...] = ()


class DecisionEntry(BaseModel):
    """A person's word: a held or accepted batch is approved or rejected, the shards of a failed one are tried again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["decision"] = "decision"
    batch: str
    decision: Decision
    by: str
    at: str
    note: str = ""


Entry = ReferenceEntry | ClaimEntry | DuplicatesEntry | CommitEntry | DecisionEntry
_PARSER: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])


class Batch(BaseModel):
    """A batch as the log has it so far."""

    claim: ClaimEntry
    commit: CommitEntry | None = None
    decision: DecisionEntry | None = None

    @property
    def status(self) -> Status:
        """As it was committed."""
        return "claimed" if self.commit is None else self.commit.status

    @property
    def is_released(self) -> bool:
        """True where training jobs may see its clean shards: what a person decided last is what counts."""
        if self.decision is not None:
            return self.decision.decision == "approved"
        return self.status == "accepted"


class State:
    """All that the entries say, in their order.

    Attributes:
        n_entries: how many there are.
        references: by version.
        batches: by name, in the order they were claimed.
        seen: fingerprint of a shard -> sha256.
        taken: sha256 of all shards that are in a batch or in the first reference.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.n_entries = 0
        self.references: dict[int, ReferenceEntry] = {}
        self.batches: dict[str, Batch] = {}
        self.seen: dict[Fingerprint, str] = {}
        self.taken: set[str] = set()
        self.attempts: Counter[str] = Counter()
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """The next entry."""
        self.n_entries += 1
        if isinstance(entry, ReferenceEntry | ClaimEntry | DuplicatesEntry):
            self.seen |= {shard.fingerprint: shard.sha256 for shard in entry.shards}
            self.taken |= {shard.sha256 for shard in entry.shards}
        if isinstance(entry, ReferenceEntry):
            self.references[entry.version] = entry
        elif isinstance(entry, ClaimEntry):
            self.batches[entry.batch] = Batch(claim=entry)
        elif isinstance(entry, CommitEntry):
            self.batches[entry.batch].commit = entry
        elif isinstance(entry, DecisionEntry):
            batch = self.batches[entry.batch]
            batch.decision = entry
            if entry.decision == "retried":
                digests = {shard.sha256 for shard in batch.claim.shards}
                self.taken -= digests
                self.attempts.update(digests)

    @property
    def reference(self) -> ReferenceEntry:
        """The newest. Raises ConfigError where there is none."""
        if not self.references:
            raise ConfigError("the store has no reference yet: make one with `sanitize reference RUN --store STORE`")
        return self.references[max(self.references)]

    @property
    def unfinished(self) -> list[Batch]:
        """Claimed and not committed, the oldest first."""
        return [batch for batch in self.batches.values() if batch.commit is None]

    def new(self, shards: Iterable[Offered]) -> list[Offered]:
        """Those that are in no batch, each content once, sorted by name; of copies the smallest URL counts."""
        unique: dict[str, Offered] = {}
        for shard in sorted(shards, key=lambda shard: shard.url):
            if shard.sha256 not in self.taken:
                unique.setdefault(shard.sha256, shard)
        return sorted(unique.values(), key=lambda shard: shard.name)

    def name_of(self, shards: Sequence[Offered]) -> str:
        """Name of a batch of these shards, 16 hex digits; another one where some are tried again."""
        text = "\n".join(sorted(f"{shard.sha256} {self.attempts[shard.sha256]}" for shard in shards))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def find(self, name: str) -> Batch:
        """The batch whose name begins like that. Raises ConfigError where it is not one."""
        found = [batch for of_batch, batch in self.batches.items() if of_batch.startswith(name)]
        if len(found) != 1 or not name:
            raise ConfigError(f"{len(found)} batches begin with {name!r}; `sanitize batches` lists them")
        return found[0]

    def feed(self) -> list[CleanShard]:
        """Clean shards that training jobs may read: of the run behind version 1, and of all released batches."""
        lines = [line for entry in self.references.values() for line in entry.clean]
        released = (batch.commit for batch in self.batches.values() if batch.is_released)
        lines += [line for commit in released if commit is not None for line in commit.clean]
        return sorted(lines, key=lambda line: line.shard)


class Ledger:
    """The log of a store, a folder or a URL. What was read is not read again: entries never change."""

    def __init__(self, store: str) -> None:
        self.folder = join(store, "ledger")
        self._state = State(())

    def read(self) -> State:
        """The log as it is; the same object each time. Raises ArtifactError where an entry is missing or damaged."""
        names = [name for name in names_below(self.folder) if name[:1].isdigit()]  # others are being written
        if names != [_ENTRY.format(number) for number in range(len(names))]:
            raise ArtifactError(f"{self.folder} is not whole: it has {len(names)} entries, and the last is {names[-1]}")
        with ThreadPoolExecutor(1 if is_local(self.folder) else 16) as pool:  # one by one, a far store takes minutes
            for entry in pool.map(self._entry, names[self._state.n_entries :]):
                self._state.add(entry)
        return self._state

    def _entry(self, name: str) -> Entry:
        url = join(self.folder, name)
        try:
            return _PARSER.validate_json(read_bytes(url))
        except ValueError as error:
            raise ArtifactError(f"{url} is damaged: {error}") from error

    def append(self, decide: Callable[[State], Entry | None]) -> tuple[Entry | None, State]:
        """Add what `decide` makes of the log as it is when the entry is written.

        Args:
            decide: called again where another process was quicker; None adds nothing.

        Returns:
            The entry that was added, and the log with it.
        """
        while True:
            state = self.read()
            entry = decide(state)
            if entry is None:
                return None, state
            data = entry.model_dump_json(indent=1).encode() + b"\n"
            if create_new(join(self.folder, _ENTRY.format(state.n_entries)), data):
                state.add(entry)
                return entry, state
