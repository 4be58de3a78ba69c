"""One shard as a stream of samples: the WebDataset convention, read strictly.

A sample is a run of members that share a key, the name up to the first dot of its base name. Bad input costs one
sample, or the rest of one shard, never more; whatever is wrong is said in words and carried along.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, Field

from sanitize.data.decode import IMAGE_SUFFIXES
from sanitize.errors import DataError
from sanitize.hashing import Sha256
from sanitize.storage import open_read
from sanitize.tar.compression import GZIP, HEAD_BYTES, GzipStream, explain, not_read, unread_suffix
from sanitize.tar.names import USUAL_NAME, SeenPaths, printable, split_name
from sanitize.tar.read import Member, TarDamage, TarLimits, TarReader, unsafe_name
from sanitize.tar.write import BLOCK

_INTEGER = re.compile(rb"[+-]?\d{1,18}")
_SKIPPED_BYTES = 1 << 20  # at once
_MAX_JSON_BYTES = 2**20  # parsed, it takes up to 35 times its bytes


class SampleLimits(BaseModel):
    """What one sample may cost.

    Attributes:
        max_sample_bytes: payload of all its members together, held in memory while it is looked at.
        max_members: members that share one key.
        max_listing_bytes: names of all members of one shard, 512 bytes a member and 128 a folder; about what its index
            rows take in memory. Of a member with large extension headers, half of these count if that is more. A shard
            that has more counts as damaged from there on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_sample_bytes: int = Field(default=256 * 2**20, gt=0)
    max_members: int = Field(default=100, gt=0)
    max_listing_bytes: int = Field(default=2**30, gt=0)


class Sample(NamedTuple):
    """Members that share a key, in the order of the shard.

    Attributes:
        position: 0, 1, 2, … in the shard; with the shard's name it identifies the sample even where keys repeat.
        key: as WebDataset forms it.
        members: (name, payload) of every regular file that was read: of all, or of the suffix that was asked for.
        problem: why the sample cannot be used as it stands, or None.
        sizes: (name, bytes) of every regular file.
        start, end: where it lies in the uncompressed archive, from its first header to behind its last padding.
    """

    position: int
    key: str
    members: list[tuple[str, bytes]]
    problem: str | None
    sizes: Sequence[tuple[str, int]] = ()
    start: int = 0
    end: int = 0


class ShardReader:
    """Iterate over the samples of one shard (a tar archive, gzip-compressed or not); then see what was found.

    Args:
        url: of the shard.
        limits: what one sample may cost.
        suffix: read only payloads of members with this suffix, in lower case; None reads all.
        digest: read the file from end to end and hash it. Without, payloads that are not wanted are stepped over.

    Attributes:
        damage: why reading stopped early, or what is odd about the archive; None when all is well.
        is_gzip: whether the file is gzip-compressed, whatever its name; known with the first sample.
        sha256: of the shard file as it is stored, known after the last sample; "" without `digest`.
        size: its bytes.
    """

    def __init__(
        self, url: str, limits: SampleLimits | None = None, suffix: str | None = None, digest: bool = True
    ) -> None:
        self.url = url
        self.limits = limits or SampleLimits()
        self.damage: str | None = None
        self.is_gzip = False
        self.sha256 = ""
        self.size = 0
        self._suffix, self._digest = suffix, digest

    def __iter__(self) -> Iterator[Sample]:
        with open_read(self.url) as stream:
            file = ShardFile(stream, self.url, self._digest)
            self.is_gzip = file.is_gzip
            if unread := unread_suffix(self.url):
                self.damage = not_read(unread)
            else:
                samples = SampleReader(file.archive(), self.limits, self._suffix)
                is_empty = True
                for sample in samples:
                    is_empty = False
                    yield sample
                self.damage = samples.damage
                if is_empty and self.damage:
                    self.damage = explain(file.head) or self.damage
            self.sha256, self.size = file.finish()


class SampleReader:
    """Iterate over the samples of an archive, or of a piece of one; everything else is as in ShardReader."""

    def __init__(self, stream: BinaryIO, limits: SampleLimits, suffix: str | None = None) -> None:
        self.damage: str | None = None
        self._reader = TarReader(stream, TarLimits(max_member_bytes=limits.max_sample_bytes))
        self._limits, self._suffix = limits, suffix

    def __iter__(self) -> Iterator[Sample]:
        seen = SeenPaths()
        group: _Group | None = None
        position = listed = 0
        try:
            for member in self._reader:
                listed += max(len(member.name) + BLOCK, (member.offset - member.start) // 2 - BLOCK)
                if listed + seen.folder_bytes > self._limits.max_listing_bytes:
                    raise TarDamage("more names than max_listing_bytes", member.start)
                if member.kind == "directory":
                    continue  # webdataset steps over them too: between two members of a sample they split nothing
                usual = USUAL_NAME.fullmatch(member.name)
                key, suffix = usual.groups() if usual else split_name(member.name)
                if group is None or key != group.key:
                    if group is not None:
                        yield group.sample(position, seen)
                        position += 1
                    group = _Group(key, member.start, self._limits)
                if group.add(member, usual is not None) and self._suffix in (None, suffix.lower()):
                    group.members.append((member.name, self._reader.read()))
        except TarDamage as error:
            self.damage = f"{error.reason} at byte {error.offset}"
            if group is not None:
                group.problem = f"the shard is damaged here: {error.reason}"
                yield group.sample(position, None)
            return
        self.damage = self._reader.warning
        if group is not None:
            yield group.sample(position, seen)


class _Group:
    """Members of one key as they come in."""

    def __init__(self, key: str, start: int, limits: SampleLimits) -> None:
        self.key = key
        self.members: list[tuple[str, bytes]] = []
        self.problem: str | None = None
        self._start, self._end = start, start
        self._names: list[str] = []
        self._sizes: list[tuple[str, int]] = []
        self._limits = limits
        self._bytes = 0

    def add(self, member: Member, usual: bool) -> bool:
        """Take a member in; True where its payload may be read. `usual`: its name is known to be harmless."""
        self._bytes += member.size
        self._end = member.end
        fits = self._bytes <= self._limits.max_sample_bytes and len(self._sizes) < self._limits.max_members
        fine = usual and fits and member.kind == "file" and member.name.lower() not in self._names
        if not fine and self.problem is None:
            self.problem = self._refuse(member)
        if len(self._names) <= self._limits.max_members:
            self._names.append(member.name.lower())
        if fits and member.kind == "file":
            self._sizes.append((member.name, member.size))
            return True
        return False

    def _refuse(self, member: Member) -> str | None:
        if member.kind != "file":
            return f"member '{printable(member.name)}' is no regular file: {member.reason}"
        if (unsafe := unsafe_name(member.name)) is not None:
            return f"unsafe member name '{printable(member.name)}': {unsafe}"
        if member.name.endswith("/") or not split_name(member.name)[0].rpartition("/")[2]:
            return f"member name {printable(member.name)!r} has nothing before its first dot"
        if member.name.lower() in self._names:  # the key is the same: readers do not tell suffixes apart by case
            return f"member '{printable(member.name)}' occurs twice"
        if self._bytes > self._limits.max_sample_bytes:
            return f"sample is larger than max_sample_bytes {self._limits.max_sample_bytes}"
        if len(self._sizes) >= self._limits.max_members:
            return f"sample has more than max_members {self._limits.max_members}"
        return None

    def sample(self, position: int, seen: SeenPaths | None) -> Sample:
        """The sample, once it is complete; `seen`: those before it, to which it is added."""
        clash = seen.add(self.key, [name for name, _ in self._sizes]) if seen is not None else None
        problem = self.problem if clash is None else f"key '{printable(self.key)}' {clash}"
        return Sample(position, self.key, self.members, problem, self._sizes, self._start, self._end)


class ShardFile:
    """A shard as it is stored, from its beginning: hashed as it goes by, and then read forward only; or seekable.

    Attributes:
        head: its first bytes.
    """

    def __init__(self, file: BinaryIO, url: str, digest: bool) -> None:
        self._file, self._url = file, url
        self.head = self._look()
        self._sha256 = Sha256() if digest else None
        self._size = 0

    def _look(self) -> bytes:
        try:
            head = self._file.read(HEAD_BYTES)
            self._file.seek(0)
        except OSError as error:
            raise DataError(f"cannot read {self._url}: {error}") from error
        return head

    @property
    def is_gzip(self) -> bool:
        """Whether the file is gzip-compressed, whatever its name."""
        return self.head.startswith(GZIP)

    def archive(self) -> BinaryIO:
        """The tar archive: this stream, or what it decompresses to."""
        return cast(BinaryIO, GzipStream(self) if self.is_gzip else self)

    def read(self, size: int = -1) -> bytes:
        """As that of any stream. Raises DataError where the disk or the store fails."""
        try:
            data = self._file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {self._url}: {error}") from error
        if self._sha256 is not None:
            self._sha256.update(data)
        self._size += len(data)
        return data

    def seekable(self) -> bool:
        """False where reading forward, once, is what hashes the shard."""
        return self._sha256 is None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As that of any stream."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As that of any stream."""
        return self._file.tell()

    def skip(self, size: int) -> None:
        """Go on `size` bytes further down; where they are hashed that means to read them."""
        if self.seekable():
            self.seek(size, os.SEEK_CUR)
            return
        while size > 0 and (data := self.read(min(size, _SKIPPED_BYTES))):
            size -= len(data)

    def finish(self) -> tuple[str, int]:
        """Read what is left to be hashed; the hex digest, "" where there is none, and the bytes of the file."""
        if self._sha256 is None:
            return "", self.seek(0, os.SEEK_END)
        while self.read(_SKIPPED_BYTES):
            pass
        return self._sha256.hexdigest(), self._size


class BadLabel(ValueError):
    """The label cannot be used; the message is the reason."""


def image_name(names: Iterable[str]) -> str:
    """The one name with the suffix of an image. Raises LookupError with the reason: none, or several."""
    images = [name for name in names if split_name(name)[1] in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise LookupError("no image member" if not images else f"{len(images)} image members")
    return images[0]


def find_image(sample: Sample) -> tuple[str, bytes]:
    """The image member (name, payload). Raises LookupError as `image_name` does."""
    found = image_name(name for name, _ in sample.members)
    return next(member for member in sample.members if member[0] == found)


def read_label(sample: Sample, source: str, n_classes: int) -> int:
    """The class, 0 <= label < n_classes.

    Args:
        sample: as read.
        source: suffix of the member that holds an ascii integer ("cls"), or "json:FIELD".
        n_classes: labels at or above it are refused.

    Raises:
        BadLabel: missing, there twice, not an integer, or out of range.
    """
    suffix, _, field = source.partition(":")
    found = [data for name, data in sample.members if split_name(name)[1] == suffix.lower()]
    if len(found) != 1:
        raise BadLabel(f"{len(found) or 'no'} .{suffix} member{'s' if found else ''}")
    data = (_json_field(found[0], field) if field else found[0]).strip()
    if not _INTEGER.fullmatch(data):
        raise BadLabel(f"label '{printable(data[:40].decode('utf-8', 'surrogateescape'))}' is not an integer")
    label = int(data)
    if not 0 <= label < n_classes:
        raise BadLabel(f"label {label} is not in 0..{n_classes - 1}")
    return label


def _json_field(data: bytes, field: str) -> bytes:
    if len(data) > _MAX_JSON_BYTES:
        raise BadLabel(f"the json member is larger than {_MAX_JSON_BYTES} bytes")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and sum(name == field for name, _ in pairs) > 1:  # parsers differ in which they take
            raise BadLabel(f"the json member has field {field!r} twice")
        return found

    try:
        record = json.loads(data, object_pairs_hook=once)
        if not isinstance(record, dict) or field not in record:
            raise BadLabel(f"the json member has no field {field!r}")
        value = record[field]
        text = value if isinstance(value, str) else json.dumps(value)
    except BadLabel:
        raise
    except (ValueError, RecursionError) as error:
        raise BadLabel("the json member is not valid JSON") from error
    return text.encode("utf-8", "surrogatepass")
