"""Entries of the ledger: one JSON file each, see `ledger.py`.

A store is untrusted: names and numbers are bounded when an entry is parsed.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from sanitize.tar.compression import SHARD_SUFFIXES

MAX_NAME_BYTES = 160  # name of a shard in its batch; files named after it are longer, and file systems allow 255
Decision = Literal["approved", "rejected", "retried"]
Fingerprint = tuple[str, int, str]  # url, size, modification time or ETag
Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BatchId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]  # also the name of a folder


class Offered(BaseModel):
    """A shard that was offered: its place, and the sha256 of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    size: Count
    modified: str
    sha256: Sha256Hex

    @property
    def fingerprint(self) -> Fingerprint:
        """URL, size and modification: equal for an unchanged shard."""
        return self.url, self.size, self.modified

    @property
    def name(self) -> str:
        """Name of the shard in its batch: unique, and independent of other shards of the batch.

        A long name is cut to `MAX_NAME_BYTES`; the digest in it keeps it unique.
        """
        base = self.url.rpartition("/")[2]
        suffix = next(suffix for suffix in (*SHARD_SUFFIXES, "") if base.lower().endswith(suffix))
        end = f"-{self.sha256[:16]}{suffix}"
        stem = base[: len(base) - len(suffix)].encode()[: MAX_NAME_BYTES - len(end)].decode(errors="ignore")
        return stem + end


class Refused(BaseModel):
    """A shard that is in no batch, with the reason.

    Attributes:
        url: URL or path; bytes that are not UTF-8 are escaped.
        size, modified: size and modification of the file when it was refused; 0 and "" if unknown.
        sha256: digest of the bytes, if they are the reason: ingest ignores these bytes, under any name, until
            `sanitize retry`. "" for other reasons (the name, a permission, a change during processing): each ingest
            looks at the shard again.
        reason: reason in plain words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    size: Count = 0
    modified: str = ""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    reason: str


class CleanShard(BaseModel):
    """One line of the feed: a clean shard, by its place below the store or its URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str
    sha256: Sha256Hex
    size: Count
    samples: Count
    batch: str

    @model_validator(mode="after")
    def _is_in_its_batch(self) -> Self:
        folder = f"batches/{self.batch}/"
        if self.batch and (not self.shard.startswith(folder) or ".." in self.shard.split("/")):
            raise ValueError(f"clean shard {self.shard!r} is not in {folder}")
        return self


class ReferenceEntry(BaseModel):
    """A version of the reference was approved. Version 1 contains the shards of the run it was made from.

    Attributes:
        version: 1, 2, …
        digests: digest of each artifact, by folder.
        config: sha256 of its `config.yaml`; "" in entries of older versions of sanitize.
        merged: batches whose statistics are new in this version.
        shards, clean: shards and clean shards of the run, for version 1.
        by, at, note: person, time (ISO 8601) and reason of the approval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["reference"] = "reference"
    version: int = Field(ge=1, le=1_000_000)
    digests: dict[str, Sha256Hex]
    config: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    merged: tuple[BatchId, ...] = ()
    shards: tuple[Offered, ...] = ()
    clean: tuple[CleanShard, ...] = ()
    by: str = ""
    at: str = ""
    note: str = ""


class ClaimEntry(BaseModel):
    """Shards that become a batch: no other batch can claim them.

    Attributes:
        batch: name of the batch, derived from the contents of its shards.
        reference: version of the reference it is judged against.
        shards: shards of the batch, sorted by name.
        settings: everything else that its verdicts depend on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["claim"] = "claim"
    batch: BatchId
    reference: int
    shards: tuple[Offered, ...] = Field(min_length=1)
    settings: dict[str, Any] = {}


class DuplicatesEntry(BaseModel):
    """Shards whose bytes had been offered before, so that they need not be read again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["duplicates"] = "duplicates"
    shards: tuple[Offered, ...] = Field(min_length=1)


class RefusedEntry(BaseModel):
    """Shards that no batch can take: their name is unfit, or they cannot be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["refused"] = "refused"
    shards: tuple[Refused, ...] = Field(min_length=1)


class RetryEntry(BaseModel):
    """Decision of a person: refused bytes are offered again.

    Attributes:
        shards: sha256 of each shard.
        by, at, note: person, time (ISO 8601) and reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["retry"] = "retry"
    shards: tuple[Sha256Hex, ...] = Field(min_length=1)
    by: str
    at: str
    note: str = ""


class CommitEntry(BaseModel):
    """Result of a batch; each batch has at most one.

    Attributes:
        status: accepted or held by the drift rule; failed as a whole; or split: some of its shards are refused, and the
            others are new again, so that another batch takes them.
        verdict: verdict of the drift rule; None where the batch failed before, or was split.
        reasons: reasons in plain words.
        samples: number of samples by status.
        digests: digest of each artifact, by folder.
        clean: shards that it adds to the feed, if it is accepted or approved.
        refused: refused shards of a split batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["commit"] = "commit"
    batch: BatchId
    status: Literal["accepted", "held", "failed", "split"]
    verdict: Literal["accept", "hold", "refit"] | None = None
    reasons: tuple[str, ...] = ()
    samples: dict[str, Count] = {}
    digests: dict[str, Sha256Hex] = {}
    clean: tuple[CleanShard, ...] = ()
    refused: tuple[Refused, ...] = ()

    @model_validator(mode="after")
    def _adds_only_its_own(self) -> Self:
        if any(line.batch != self.batch for line in self.clean):
            raise ValueError(f"batch {self.batch} adds clean shards of another batch to the feed")
        if bool(self.refused) != (self.status == "split"):
            raise ValueError(f"batch {self.batch} is {self.status} and refuses {len(self.refused)} shards")
        return self


class DecisionEntry(BaseModel):
    """Decision of a person: a held or accepted batch is approved or rejected, a failed one is rejected or retried."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["decision"] = "decision"
    batch: BatchId
    decision: Decision
    by: str
    at: str
    note: str = ""


Entry = ReferenceEntry | ClaimEntry | DuplicatesEntry | RefusedEntry | CommitEntry | DecisionEntry | RetryEntry
PARSER: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])
