"""One shard as a stream of samples: the WebDataset convention, read strictly.

A sample is a sequence of members that share a key, the name up to the first dot of its base name. Bad input costs one
sample, or at most the rest of one shard; each problem is reported in words.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import BinaryIO, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, Field

from sanitize.data.decode import IMAGE_SUFFIXES
from sanitize.errors import DataError
from sanitize.hashing import Sha256
from sanitize.storage import open_read
from sanitize.tar.compression import HEAD_BYTES, compression_in, decompressed, explain, not_read, unread_suffix
from sanitize.tar.names import USUAL_NAME, SeenPaths, is_of_macos, printable, split_name
from sanitize.tar.read import Member, TarDamage, TarLimits, TarReader, unsafe_name
from sanitize.tar.write import BLOCK

_SKIPPED_BYTES = 1 << 20  # bytes skipped at once
_MAX_LISTED = 6  # suffixes in a reason
_MAX_SHOWN = 40  # characters of a suffix or a label in a reason
ALL = "all"  # `ImageConfig.member` that reads every picture of a sample


class SampleLimits(BaseModel):
    """Limits on the cost of one sample.

    Attributes:
        max_sample_bytes: payload of all its members together, which is held in memory.
        max_members: number of members that share one key.
        max_listing_bytes: size of the names of all members of one shard, plus 512 bytes a member and 128 a folder;
            about the memory of its index rows. For a member with large extension headers, half of their size counts if
            that is more. A shard with more counts as damaged from there on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_sample_bytes: int = Field(default=256 * 2**20, gt=0)
    max_members: int = Field(default=100, gt=0)
    max_listing_bytes: int = Field(default=2**30, gt=0)


class Sample(NamedTuple):
    """Members that share a key, in the order of the shard.

    Attributes:
        position: 0, 1, 2, … in the shard; with the shard's name it identifies the sample even where keys repeat.
        key: key as in WebDataset.
        members: (name, payload) of every regular file that was read: of all, or of the requested suffix.
        problem: reason why the sample is unusable, or None.
        sizes: (name, bytes) of every regular file.
        start, end: its bytes in the uncompressed archive, from its first header to behind its last padding.
    """

    position: int
    key: str
    members: list[tuple[str, bytes]]
    problem: str | None
    sizes: Sequence[tuple[str, int]] = ()
    start: int = 0
    end: int = 0


class ShardReader:
    """Iterate over the samples of one shard (a tar archive, compressed or not).

    Args:
        url: path or URL of the shard.
        limits: limits on the cost of one sample.
        suffix: lower-case suffix of the members whose payloads are read; None reads all.
        digest: True reads and hashes the whole file; False steps over payloads that are not read.

    Attributes:
        damage: reason why reading stopped early, or an oddity of the archive; else None.
        compression: compression of the file, whatever its name ("" for none); set with the first sample.
        sha256: digest of the stored file, set after the last sample; "" without `digest`.
        size: size of the file in bytes.
        n_unread: bytes of the file behind the place where reading stopped early; 0 where it did not.
        n_of_macos: number of files of macOS (`._NAME`, `.DS_Store`), which belong to no sample.
    """

    def __init__(
        self, url: str, limits: SampleLimits | None = None, suffix: str | None = None, digest: bool = True
    ) -> None:
        self.url = url
        self.limits = limits or SampleLimits()
        self.damage: str | None = None
        self.compression = ""
        self.sha256 = ""
        self.size = self.n_unread = self.n_of_macos = 0
        self._suffix, self._digest = suffix, digest

    def __iter__(self) -> Iterator[Sample]:
        with open_read(self.url) as stream:
            file = ShardFile(stream, self.url, self._digest)
            stopped_at: int | None = 0
            self.compression = file.compression
            if unread := unread_suffix(self.url):
                self.damage = not_read(unread)
            else:
                is_empty = True
                with file.archive() as archive:
                    samples = SampleReader(archive, self.limits, self._suffix)
                    for sample in samples:
                        is_empty = False
                        yield sample
                self.damage, self.n_of_macos = samples.damage, samples.n_of_macos
                stopped_at = (
                    file.position if self.compression and samples.stopped_at is not None else samples.stopped_at
                )
                if is_empty and self.damage:
                    empty = "an empty file of 0 bytes"
                    self.damage = explain(samples.head, self.damage, self.compression) if file.head else empty
            self.sha256, self.size = file.finish()
            self.n_unread = 0 if stopped_at is None else max(0, self.size - stopped_at)


class SampleReader:
    """Iterate over the samples of an archive, or of a piece of one; otherwise like ShardReader.

    Attributes:
        stopped_at: byte of the archive from which on it is not read; None where it was read to its end.
        n_of_macos: as in ShardReader.
        head: first bytes of an archive that is damaged in its first header; else b"".
    """

    def __init__(self, stream: BinaryIO, limits: SampleLimits, suffix: str | None = None) -> None:
        self.damage: str | None = None
        self.stopped_at: int | None = None
        self.n_of_macos = 0
        self.head = b""
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
                    continue  # as in webdataset: a directory between two members does not split a sample
                usual = USUAL_NAME.fullmatch(member.name)
                if usual is None and member.kind == "file" and is_of_macos(member.name):
                    self.n_of_macos += 1  # webdataset steps over them, too
                    continue
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
            self.stopped_at = error.offset
            self.head = self._reader.head if error.offset == 0 else b""
            if group is not None:
                group.problem = f"the shard is damaged here: {error.reason}"
                yield group.sample(position, None)
            return
        self.damage, self.stopped_at = self._reader.warning, self._reader.joined_at
        if group is not None:
            yield group.sample(position, seen)


class _Group:
    """Members of one key so far."""

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
        """Add a member; True if its payload may be read. `usual` is True for a name that is known to be harmless."""
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
            what = "is refused" if member.kind == "refused" else "is no regular file"
            return f"member '{printable(member.name)}' {what}: {member.reason}"
        if (unsafe := unsafe_name(member.name)) is not None:
            return f"unsafe member name '{printable(member.name)}': {unsafe}"
        if member.name.endswith("/") or not split_name(member.name)[0].rpartition("/")[2]:
            return f"member name {printable(member.name)!r} has nothing before its first dot"
        if member.name.lower() in self._names:  # the key is the same, and readers ignore the case of suffixes
            return f"member '{printable(member.name)}' occurs twice"
        if self._bytes > self._limits.max_sample_bytes:
            return f"sample is larger than max_sample_bytes {self._limits.max_sample_bytes}"
        if len(self._sizes) >= self._limits.max_members:
            return f"sample has more than max_members {self._limits.max_members}"
        return None

    def sample(self, position: int, seen: SeenPaths | None) -> Sample:
        """The complete sample, which is added to the earlier ones in `seen`."""
        clash = seen.add(self.key, [name for name, _ in self._sizes]) if seen is not None else None
        problem = self.problem if clash is None else f"key '{printable(self.key)}' {clash}"
        return Sample(position, self.key, self.members, problem, self._sizes, self._start, self._end)


class ShardFile:
    """A shard as stored, from its beginning: hashed while it is read, and then forward only; or seekable.

    Attributes:
        head: first bytes of the shard.
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
    def compression(self) -> str:
        """Compression of the file, whatever its name; "" for none."""
        return compression_in(self.head)

    @property
    def position(self) -> int:
        """Byte of the file up to which it was read."""
        return self.tell() if self._sha256 is None else self._size

    @contextmanager
    def archive(self) -> Iterator[BinaryIO]:
        """The tar archive: this stream, decompressed if necessary. The decompressor lasts as long as the context."""
        if not self.compression:
            yield cast(BinaryIO, self)
            return
        with closing(decompressed(self, self.compression)) as stream:
            yield cast(BinaryIO, stream)

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes. Raises DataError where the disk or the store fails."""
        try:
            data = self._file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {self._url}: {error}") from error
        if self._sha256 is not None:
            self._sha256.update(data)
        self._size += len(data)
        return data

    def seekable(self) -> bool:
        """False if the shard is hashed, which needs one pass forward."""
        return self._sha256 is None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position; see `io.IOBase.seek`."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Current position in bytes."""
        return self._file.tell()

    def skip(self, size: int) -> None:
        """Skip `size` bytes; they are read if the shard is hashed."""
        if self.seekable():
            self.seek(size, os.SEEK_CUR)
            return
        while size > 0 and (data := self.read(min(size, _SKIPPED_BYTES))):
            size -= len(data)

    def finish(self) -> tuple[str, int]:
        """Hash the rest of the file; returns the hex digest ("" without hashing), and the size in bytes."""
        if self._sha256 is None:
            return "", self.seek(0, os.SEEK_END)
        while self.read(_SKIPPED_BYTES):
            pass
        return self._sha256.hexdigest(), self._size


def is_picture(suffix: str) -> bool:
    """True for the suffix of an image, also behind others (`left.jpg`); lower-case."""
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def image_name(names: Iterable[str], member: str | None = None) -> str:
    """Name of the image of a sample.

    Args:
        names: names of its members, in the order of the shard.
        member: `ImageConfig.member`.

    Raises:
        LookupError: there is no such image, or there are several; the message is the reason.
    """
    names = list(names)
    pictures = _pictures(names)
    if member == "first":
        return next(iter(pictures))
    if member is not None:
        return _the_only(pictures, member, names)
    plain = [name for name, suffix in pictures.items() if "." not in suffix]
    if len(plain or pictures) > 1:
        raise LookupError(
            f"{len(plain or pictures)} image members, '{_listed(plain or pictures)}': set index.image.member to one of "
            "these suffixes, or to first"
        )
    return (plain or list(pictures))[0]


def image_names(names: Iterable[str], member: str | None = None) -> list[str]:
    """Names of the images that are read of a sample: one, or with member "all" every picture. See `image_name`."""
    return list(_pictures(list(names))) if member == ALL else [image_name(names, member)]


def _pictures(names: Sequence[str]) -> dict[str, str]:
    """Names of the pictures of a sample, with their suffixes. Raises LookupError where there is none."""
    pictures = {name: suffix for name in names if is_picture(suffix := split_name(name)[1])}
    if not pictures:
        raise LookupError(f"no image member{beside(names)}")
    return pictures


def _the_only(pictures: Mapping[str, str], member: str, names: Sequence[str]) -> str:
    """The picture with the suffix `member`, or the only one with that suffix in another image format."""
    wanted = member.lower()
    found = [name for name, suffix in pictures.items() if suffix == wanted]
    if not found:
        stem = wanted.rpartition(".")[0]
        found = [name for name, suffix in pictures.items() if suffix.rpartition(".")[0] == stem]
    if len(found) != 1:
        raise LookupError(f"{len(found) or 'no'} image members for index.image.member={member}{beside(names)}")
    return found[0]


def beside(names: Sequence[str]) -> str:
    """End of a reason that lists what is there instead."""
    return f" beside '{_listed(names)}'" if names else ""


def _listed(names: Iterable[str]) -> str:
    """Suffixes of the names, for a reason."""
    suffixes = list(dict.fromkeys(_short(split_name(name)[1]) or "(none)" for name in names))
    return ", ".join(suffixes[:_MAX_LISTED]) + (
        f" and {len(suffixes) - _MAX_LISTED} more" * (len(suffixes) > _MAX_LISTED)
    )


def _short(text: str) -> str:
    return printable(text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 2]} …")


def find_image(sample: Sample, member: str | None = None) -> tuple[str, bytes]:
    """The image member (name, payload). Arguments and errors: see `image_name`."""
    found = image_name((name for name, _ in sample.members), member)
    return next(one for one in sample.members if one[0] == found)


def find_images(sample: Sample, member: str | None = None) -> list[tuple[str, bytes]]:
    """The image members that are read (name, payload). Arguments and errors: see `image_names`."""
    payloads = dict(sample.members)
    return [(name, payloads[name]) for name in image_names(payloads, member)]


def in_format(name: str, suffix: str) -> str:
    """The name with the last part of its suffix replaced: `x.left.jpg` becomes `x.left.png`."""
    return f"{name.rpartition('.')[0]}.{suffix}"
