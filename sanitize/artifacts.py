"""Artifacts: folders that exist only when they are finished, and remember the whole recipe they were made by.

    dataset = make(Dataset, out, recipe, parts=shards, write_part=...)

A folder is filled part by part (one part a shard, usually); a part that is finished is recorded, so that a run which
was killed goes on with the parts that are missing. When all are there, the manifest is written last: a folder without
one is no artifact, and a file it does not list is not read. On a disk the folder is filled beside its final name and
renamed; object stores cannot rename, so there it is filled in place. There is no other resume logic anywhere: calling
a stage again is resuming.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import safetensors.torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sanitize.distributed import broadcast, rank0_first, world
from sanitize.errors import ArtifactError, DataError
from sanitize.storage import (
    HashingWriter,
    create,
    exists,
    fingerprint,
    is_local,
    join,
    local_path,
    names_below,
    open_read,
    read_bytes,
    remove,
    sha256_file,
    stamps_below,
    sync_folder,
    sync_folders,
)

MANIFEST = "manifest.json"
MAX_JSON = 1 << 28  # bytes: what a million shards take in a manifest; a larger file is not read


class Recipe(BaseModel):
    """Everything that can change the numbers of an artifact, and nothing else.

    Attributes:
        stage: name of the stage function.
        version: of the stage's meaning; raised when the same config would give other results.
        config: the stage's configuration as plain data.
        numerics: seed and precision (`Compute.numerics`); not the device, not the number of workers.
        inputs: name -> digest of each artifact the stage reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int = 1
    config: dict[str, Any] = {}
    numerics: dict[str, Any] = {}
    inputs: dict[str, str] = {}


class FileEntry(BaseModel):
    """One file of an artifact: hex sha256 and size in bytes."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0, lt=2**63)


def _inside(name: str) -> str:
    """The name of a file of an artifact; ValueError if it would lead anywhere else than into its folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name or "::" in name or name == MANIFEST:
        raise ValueError("it names no file inside the folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Count = Annotated[int, Field(gt=-(2**63), lt=2**63)]


class Manifest(BaseModel):
    """What an artifact holds. `sources` locates inputs that are no artifacts; it is not part of the digest, because
    a copy of the same bytes elsewhere is the same data."""

    format: Literal[1] = 1
    recipe: Recipe
    files: dict[FileName, FileEntry] = {}
    counts: dict[str, Count] = {}
    sources: dict[str, dict[str, str | int]] = {}

    @property
    def digest(self) -> str:
        """sha256 of everything but `sources`."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json", exclude={"sources"}))).hexdigest()


class Artifact(BaseModel):
    """Handle of a finished folder: small, frozen, safe to send to another process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    digest: str

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The handle of a folder or URL. Raises ArtifactError if it is not a finished artifact."""
        return cls(path=str(path), digest=read_manifest(path).digest)

    def manifest(self) -> Manifest:
        """The manifest, checked against the digest of this handle."""
        manifest = read_manifest(self.path)
        if manifest.digest != self.digest:
            raise ArtifactError(f"{self.path} is not the artifact it was: its manifest has changed; re-run the stage")
        return manifest

    def url(self, name: str) -> str:
        """Path or URL of a file or folder inside."""
        return join(self.path, name)

    def file(self, name: str) -> Path:
        """Path of a file or folder inside. Raises ArtifactError where the artifact is not on this machine's disk."""
        if not is_local(self.path):
            raise ArtifactError(f"{self.url(name)} is not on this machine; read it with read()")
        return local_path(self.path) / name

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """Content of a file that fits into memory.

        Args:
            name: of the file.
            at_most: size in bytes above which it is not read.

        Raises:
            ArtifactError: the manifest does not list it, it is too large, it is no regular file inside the folder, or
                it is not what the manifest says.
        """
        entry, url = self._listed.get(name), self.url(name)
        if entry is None or not exists(url):
            raise ArtifactError(f"{self.path} has no {name}")
        if at_most is not None and entry.size > at_most:
            raise ArtifactError(f"{url} has {entry.size:,} bytes; no such file has more than {at_most:,}")
        if is_local(url) and not local_path(url).resolve().is_relative_to(local_path(self.path).resolve()):
            raise ArtifactError(f"{url} is a link that leads out of {self.path}")
        data = _read_if(url, lambda size: size == entry.size)
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArtifactError(f"{url} is not what the manifest says; delete {self.path} and run again")
        return data

    @cached_property
    def _listed(self) -> dict[str, FileEntry]:
        return self.manifest().files

    def read_json(self, name: str, at_most: int = MAX_JSON) -> Any:
        """Content of a JSON file inside the folder. Raises ArtifactError as `read` does, and where it is no JSON."""
        try:
            return json.loads(self.read(name, at_most))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self.url(name)} is no JSON file: {first_line(error)}") from error

    def read_object(self, name: str, *fields: str) -> dict[str, Any]:
        """Content of a JSON file that holds an object with at least these fields; ArtifactError where it does not."""
        found = self.read_json(name)
        if not isinstance(found, dict) or (missing := [field for field in fields if field not in found]):
            what = "is no object" if not isinstance(found, dict) else f"has no {', '.join(missing)}"
            raise ArtifactError(f"{self.url(name)} {what}; it was not written by this version, or is damaged")
        return found

    def read_tensors(self, name: str, *needed: str) -> dict[str, Tensor]:
        """Tensors of a safetensors file inside the folder, by name.

        Args:
            name: of the file.
            needed: names of tensors that must be there.

        Raises:
            ArtifactError: as `read`; the file is not of that format, or a tensor is missing.
        """
        try:
            tensors = safetensors.torch.load(self.read(name))
        except ArtifactError:
            raise
        except Exception as error:  # a header that lies: the library raises errors of many types
            raise ArtifactError(f"{self.url(name)} is no safetensors file: {first_line(error)}") from error
        if missing := [of for of in needed if of not in tensors]:
            raise ArtifactError(f"{self.url(name)} has no tensor {', '.join(missing)}; it is damaged")
        return tensors


A = TypeVar("A", bound=Artifact)
T = TypeVar("T")


def read_manifest(folder: str | Path) -> Manifest:
    """Read `folder/manifest.json`. Raises ArtifactError where it is missing or not a manifest."""
    url = join(folder, MANIFEST)
    try:
        data = _read_if(url, lambda size: size <= MAX_JSON)
    except DataError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise ArtifactError(f"{folder} is not a finished artifact: it has no {MANIFEST}") from None
        raise ArtifactError(f"{url} is damaged: {error}") from error
    if data is None:
        raise ArtifactError(f"{url} is damaged: it has more than {MAX_JSON:,} bytes")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ArtifactError(f"{url} is damaged: {first_problem(error)}") from error


def _read_if(url: str, is_right: Callable[[int], bool]) -> bytes | None:
    """All of a file if its size is right, and None otherwise. Raises DataError where it is no regular file."""
    with open_read(url) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        return stream.read(size) if is_right(size) else None


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, on one line: where and what."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return first_line(f"{where}: {problem['msg']}{more}" if where else problem["msg"])


def first_line(error: Exception | str) -> str:
    """At most 300 characters of a message, on one line, without control characters: a stranger may have written it."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:300])


class Part:
    """One unit of work inside an artifact in the making; its files are recorded when it is finished."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.files: dict[str, FileEntry] = {}
        self.counts: Counter[str] = Counter()

    @contextmanager
    def create(self, name: str) -> Iterator[HashingWriter]:
        """Open the file `name` of the artifact for writing; it appears when the block ends without an exception."""
        with create(join(self._folder, name)) as writer:
            yield writer
        self.files[name] = FileEntry(sha256=writer.sha256, size=writer.size)

    def write(self, name: str, data: bytes) -> None:
        """Write the file `name` of the artifact."""
        with self.create(name) as writer:
            writer.write(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as readable JSON with sorted keys."""
        self.write(name, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


class ArtifactBuilder:
    """An artifact in the making: its files, and in `.NAME.partial` the records of the parts that are finished."""

    def __init__(self, out: str, recipe: Recipe, sources: dict[str, dict[str, str | int]]) -> None:
        self.out = out
        self.recipe = recipe
        self.sources = sources
        self._partial = partial_of(out)
        # With the sources, but not where they are: what was read from a shard that has changed since is of no use.
        read = {name: {k: v for k, v in source.items() if k != "url"} for name, source in sources.items()}
        wanted = _canonical({"recipe": recipe.model_dump(mode="json"), "sources": read})
        self._in_place = not is_local(out)
        if self._in_place:
            self._files = out
            self._parts = join(self._partial, hashlib.sha256(wanted).hexdigest()[:16])
        else:
            self._files, self._parts = join(self._partial, "files"), join(self._partial, "parts")
            self._open_folder(local_path(self._partial), wanted)

    def _open_folder(self, partial: Path, wanted: bytes) -> None:
        recipe_file = partial / "recipe.json"
        with _one_at_a_time(partial.parent):
            if partial.exists() and (not recipe_file.exists() or recipe_file.read_bytes() != wanted):
                shutil.rmtree(partial)  # left by a run with another recipe: nothing in it can be used
            (partial / "files").mkdir(parents=True, exist_ok=True)
            if not recipe_file.exists():
                with create(recipe_file) as writer:
                    writer.write(wanted)

    def _record(self, part: str) -> dict[str, Any] | None:
        """What was written when the part was finished; None where it was not."""
        try:
            record: dict[str, Any] = json.loads(read_bytes(join(self._parts, f"{part}.json")))
        except FileNotFoundError:
            return None
        return record

    def has(self, part: str) -> bool:
        """True when the part was finished, by this process or an earlier one."""
        record = self._record(part)
        # Its files may be gone since: a run with another recipe was killed while it cleared up here, or this one was
        # killed after the rename, and then somebody deleted the result. In place, they may have been written over.
        return record is not None and record["stored"] == self._stored(record["files"])

    def _stored(self, names: Iterable[str]) -> dict[str, Any]:
        """What tells whether the files of a part are still those it wrote."""
        try:
            found = {name: fingerprint(self._path(name)) for name in names}
        except DataError:
            return {}
        return {name: {k: v for k, v in of_file.items() if k != "url"} for name, of_file in found.items()}

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Make one part: its record is written when the block ends without an exception."""
        part = Part(self._files)
        yield part
        files = {name: entry.model_dump() for name, entry in part.files.items()}
        record = {"files": files, "counts": dict(part.counts), "stored": self._stored(files)}
        with create(join(self._parts, f"{name}.json")) as writer:
            writer.write(_canonical(record))

    def _path(self, name: str) -> str:
        return join(self._files, name)

    def read(self, name: str) -> bytes:
        """Content of a file that a finished part wrote."""
        return read_bytes(self._path(name))

    def files(self, parts: Sequence[str]) -> dict[str, FileEntry]:
        """Files of finished parts, by name."""
        files: dict[str, FileEntry] = {}
        for record in self._records(parts):
            files |= {name: FileEntry(**entry) for name, entry in record["files"].items()}
        return files

    def counts(self, parts: Sequence[str]) -> Counter[str]:
        """Counts of finished parts, added up."""
        total: Counter[str] = Counter()
        for record in self._records(parts):
            total.update(record["counts"])
        return total

    def _records(self, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(16 if self._in_place else 1) as pool:  # one by one, a far store takes minutes
            for part, record in zip(parts, pool.map(self._record, parts), strict=True):
                if record is None:
                    raise ArtifactError(f"part {part} of {self.out} is gone; run again")
                yield record

    def finish(self, parts: Sequence[str]) -> Manifest:
        """Write the manifest from the records of `parts`; from then on the artifact is there."""
        files, counts = self.files(parts), self.counts(parts)
        for name in names_below(self._files):
            if name not in files:
                remove(self._path(name))  # of a part that was killed before its record was written, and then renamed
        manifest = Manifest(
            recipe=self.recipe,
            files=dict(sorted(files.items())),
            counts=dict(sorted(counts.items())),
            sources=self.sources,
        )
        with create(self._path(MANIFEST)) as writer:
            writer.write(json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n")
        if not self._in_place:
            sync_folders(local_path(self._files))  # a name that is only in memory is lost when the power goes
            local_path(self._files).rename(local_path(self.out))
            sync_folder(local_path(self.out).parent)
        remove(self._partial)
        return manifest


def partial_of(out: str) -> str:
    """Where the records of the artifact `out` lie while it is made."""
    folder, _, name = out.rstrip("/").rpartition("/")
    return join(folder, f".{name}.partial") if folder else f"{out[: -len(name)]}.{name}.partial"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for the other workers, threads or processes, that are just opening a workshop in this folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_WHOLE = ""  # the part that finishes an artifact; no shard and no table can have this name


def make(
    kind: type[A],
    out: str | Path,
    recipe: Recipe,
    write: Callable[[Part], None] | None = None,
    *,
    parts: Sequence[str] = (),
    write_part: Callable[[str, Part], None] | None = None,
    finish: Callable[[Part, ArtifactBuilder], None] | None = None,
    only: Sequence[str] | None = None,
    sources: dict[str, dict[str, str | int]] | None = None,
) -> A:
    """Return the artifact at `out`, making what is missing of it.

    Args:
        kind: class of the handle to return.
        out: the folder. If it is there with this recipe it is returned as it is: this is how a run resumes.
        recipe: what it is made from.
        write: makes all of a small artifact in one piece.
        parts, write_part: make a large one part by part; finished parts are never made again.
        finish: makes what needs all parts (a table over shards, say).
        only: make just these parts and return a handle with an empty digest: the artifact is not finished yet. This
            is how several workers share one artifact; the last call, without `only`, finishes it.
        sources: see `Manifest`; a difference in size or modification time is an error.

    Raises:
        ArtifactError: the folder was made by another recipe (the message names the field), or is not an artifact.
    """
    out = str(out).rstrip("/")
    if (found := _finished(kind, out, recipe, sources)) is not None:
        return found
    if is_local(out):
        local_path(out).parent.mkdir(parents=True, exist_ok=True)
    workshop = ArtifactBuilder(out, recipe, sources or {})
    for name in parts if only is None else only:
        if write_part is not None and not workshop.has(name):
            with workshop.part(name) as part:
                write_part(name, part)
    if only is not None:
        return kind(path=out, digest="")
    with workshop.part(_WHOLE) as part:
        if write is not None:
            write(part)
        if finish is not None:
            finish(part, workshop)
    return kind(path=out, digest=workshop.finish([*parts, _WHOLE]).digest)


def make_together(
    kind: type[A], out: str, recipe: Recipe, work: Callable[[], T], write: Callable[[Part, T], None]
) -> A:
    """`make` for what all processes of torchrun compute together: each does `work`, the first writes what came of it.

    How many there are is part of the recipe: what each of them drops is of its own share of a batch.
    """
    rank, size = world()
    if size > 1:
        recipe = recipe.model_copy(update={"numerics": recipe.numerics | {"processes": size}})
    is_missing = broadcast(not exists(join(out, MANIFEST)))
    if rank > 0 and is_missing:
        work()
    return rank0_first(lambda: make(kind, out, recipe, lambda part: write(part, work())))


def _finished(kind: type[A], out: str, recipe: Recipe, sources: dict[str, dict[str, str | int]] | None) -> A | None:
    """The artifact at `out` if it is there; ArtifactError if something else is."""
    if not exists(join(out, MANIFEST)):
        if not is_local(out) or not exists(out):
            return None
        raise ArtifactError(f"{out} exists and is not an artifact; choose another --out or move it away")
    manifest = read_manifest(out)
    if differing := _differences(manifest.recipe.model_dump(mode="json"), recipe.model_dump(mode="json")):
        raise ArtifactError(
            f"{out} was made by another recipe: {'; '.join(differing[:5])}. "
            "Choose another --out, or delete the folder to make it again"
        )
    changed = [n for n, source in (sources or {}).items() if not _same_source(manifest.sources.get(n), source)]
    if changed:
        raise ArtifactError(f"{changed[0]} has changed since {out} was made from it; choose another --out")
    if problems := altered(out, {name: (entry.size, entry.sha256) for name, entry in manifest.files.items()}):
        more = f" ({len(problems)} files in all)" if len(problems) > 1 else ""
        raise ArtifactError(
            f"{problems[0]}{more}. Put back what was written, or delete {out} to make it again, or choose another --out"
        )
    remove(partial_of(out))  # killed between the manifest and the clean-up
    return kind(path=out, digest=manifest.digest)


def _same_source(before: dict[str, str | int] | None, now: dict[str, str | int]) -> bool:
    return before is not None and all(before.get(name) == now[name] for name in ("size", "modified"))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Human-readable list of the leaves in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [d for n in names for d in _differences(before.get(n), now.get(n), f"{path}.{n}" if path else n)]
    return [] if before == now else [f"{path} was {_short(before)} and is now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def copy(artifact: A, out: str) -> A:
    """The same artifact in another folder: its small files, each checked, and the manifest last."""
    if exists(join(out, MANIFEST)):
        there = type(artifact).load(out)
        if there.digest != artifact.digest:
            raise ArtifactError(f"{out} is another artifact than {artifact.path}; delete the folder to copy it again")
        return there
    manifest = artifact.manifest()
    for name in manifest.files:
        with create(join(out, name)) as writer:
            writer.write(artifact.read(name))
    with create(join(out, MANIFEST)) as writer:
        writer.write(read_bytes(artifact.url(MANIFEST)))
    return type(artifact).load(out)


def altered(folder: str, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Files of a finished artifact that are not what was written, as far as sizes and times tell.

    The manifest is written last, so a file that is younger was written again since: only such files are hashed. Who
    keeps the size and sets the time back is found by `verify`, which hashes everything.

    Args:
        folder: of the artifact.
        files: size and sha256 of each, by name; others are not looked at.

    Returns:
        One line for each file.
    """
    there = stamps_below(folder)
    finished = there.get(MANIFEST, (0, math.inf))[1]
    problems = []
    for name, (size, sha256) in sorted(files.items()):
        now, modified = there.get(name, (None, 0.0))
        if now is None:
            problems.append(f"{join(folder, name)} is gone since it was written")
        elif now != size or (modified > finished and sha256_file(join(folder, name)) != sha256):
            problems.append(f"{join(folder, name)} has changed since it was written")
    return problems


def verify(folder: str | Path) -> list[str]:
    """Re-hash every file of the artifact in `folder` and compare with its manifest.

    Returns:
        One line for each file that is missing, different or not listed; empty when all is as it was written.
    """
    manifest = read_manifest(folder)
    there = set(names_below(folder)) - {MANIFEST}
    problems = [f"{join(folder, name)}: missing" for name in sorted(manifest.files.keys() - there)]
    problems += [f"{join(folder, name)}: not listed in the manifest" for name in sorted(there - manifest.files.keys())]
    for name in sorted(there & manifest.files.keys()):
        if sha256_file(join(folder, name)) != manifest.files[name].sha256:
            problems.append(f"{join(folder, name)}: content differs from the manifest")
    return problems
