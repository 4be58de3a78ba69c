"""Making artifacts: an artifact exists when it is finished, and contains the recipe that it was made from.

    dataset = make(Dataset, out, recipe, parts=shards, write_part=...)

The folder is filled part by part (usually one part a shard). Finished parts are recorded, so that a run that was killed
makes only the missing ones. The manifest is written last: a folder without a manifest is no artifact, and files that it
does not list are not read. On a disk the folder is filled beside its final name and renamed; object stores cannot
rename, so there it is filled in place. There is no other resume logic: calling a stage again resumes it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sanitize.artifacts.reading import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    Recipe,
    Sources,
    altered,
    canonical,
    read_manifest,
)
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
    read_bytes,
    remove,
    sync_folder,
    sync_folders,
)

A = TypeVar("A", bound=Artifact)
T = TypeVar("T")


class Part:
    """One part of an unfinished artifact; its files are recorded when the part is finished."""

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
    """An unfinished artifact: its files, and the records of finished parts in `.NAME.partial`."""

    def __init__(self, out: str, recipe: Recipe, sources: Sources) -> None:
        self.out = out
        self.recipe = recipe
        self.sources = sources
        self._partial = partial_of(out)
        # With the sources, without their URLs: parts made from a shard that has changed since cannot be used.
        read = {name: {k: v for k, v in source.items() if k != "url"} for name, source in sources.items()}
        wanted = canonical({"recipe": recipe.model_dump(mode="json"), "sources": read})
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
                shutil.rmtree(partial)  # of a run with another recipe
            (partial / "files").mkdir(parents=True, exist_ok=True)
            if not recipe_file.exists():
                with create(recipe_file) as writer:
                    writer.write(wanted)

    def _record(self, part: str) -> dict[str, Any] | None:
        """Record of a finished part; None for an unfinished one."""
        try:
            record: dict[str, Any] = json.loads(read_bytes(join(self._parts, f"{part}.json")))
        except FileNotFoundError:
            return None
        return record

    def has(self, part: str) -> bool:
        """True when the part was finished, by this process or an earlier one."""
        record = self._record(part)
        # Its files may be gone: a run with another recipe was killed while it cleared this folder, or this run was
        # killed after the rename, and the result was deleted. In place, another run may have overwritten them.
        return record is not None and record["stored"] == self._stored(record["files"])

    def _stored(self, names: Iterable[str]) -> dict[str, Any]:
        """Fingerprints of the files of a part, without URLs; empty if a file is missing."""
        try:
            found = {name: fingerprint(self._path(name)) for name in names}
        except DataError:
            return {}
        return {name: {k: v for k, v in stamp.items() if k != "url"} for name, stamp in found.items()}

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Make one part; its record is written when the block ends without an exception."""
        part = Part(self._files)
        yield part
        files = {name: entry.model_dump() for name, entry in part.files.items()}
        record = {"files": files, "counts": dict(part.counts), "stored": self._stored(files)}
        with create(join(self._parts, f"{name}.json")) as writer:
            writer.write(canonical(record))

    def _path(self, name: str) -> str:
        return join(self._files, name)

    def read(self, name: str) -> bytes:
        """Content of a file of a finished part."""
        return read_bytes(self._path(name))

    def files(self, parts: Sequence[str]) -> dict[str, FileEntry]:
        """Files of finished parts, by name."""
        files: dict[str, FileEntry] = {}
        for record in self._records(parts):
            files |= {name: FileEntry(**entry) for name, entry in record["files"].items()}
        return files

    def counts(self, parts: Sequence[str]) -> Counter[str]:
        """Sums of the counts of finished parts."""
        total: Counter[str] = Counter()
        for record in self._records(parts):
            total.update(record["counts"])
        return total

    def _records(self, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(16 if self._in_place else 1) as pool:  # one after another, this takes minutes
            for part, record in zip(parts, pool.map(self._record, parts), strict=True):
                if record is None:
                    raise ArtifactError(f"part {part} of {self.out} is missing; run again")
                yield record

    def finish(self, parts: Sequence[str]) -> Manifest:
        """Write the manifest from the records of `parts`; then the artifact is finished."""
        files, counts = self.files(parts), self.counts(parts)
        for name in names_below(self._files):
            if name not in files:
                remove(self._path(name))  # of a part that was killed before its record was written
        manifest = Manifest(
            recipe=self.recipe,
            files=dict(sorted(files.items())),
            counts=dict(sorted(counts.items())),
            sources=self.sources,
        )
        with create(self._path(MANIFEST)) as writer:
            writer.write(json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n")
        if not self._in_place:
            sync_folders(local_path(self._files))  # else the names may be lost in a power failure
            local_path(self._files).rename(local_path(self.out))
            sync_folder(local_path(self.out).parent)
        remove(self._partial)
        return manifest


def partial_of(out: str) -> str:
    """Folder of the records of the artifact `out` while it is made."""
    folder, _, name = out.rstrip("/").rpartition("/")
    return join(folder, f".{name}.partial") if folder else f"{out[: -len(name)]}.{name}.partial"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other workers, threads or processes, that open a builder in this folder."""
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
    sources: Sources | None = None,
) -> A:
    """Return the artifact at `out`; make it, or its missing parts, first.

    Args:
        kind: class of the returned handle.
        out: folder of the artifact. A finished artifact of this recipe is returned unchanged: so runs resume.
        recipe: everything that the artifact is made from.
        write: writes a small artifact in one piece.
        parts, write_part: names of the parts of a large artifact, and the function that writes one; finished parts are
            not written again.
        finish: writes files that need all parts, such as a table over shards.
        only: parts to make; the returned handle has an empty digest, because the artifact is not finished. Several
            workers share an artifact in this way; the last call, without `only`, finishes it.
        sources: see `Manifest`; a difference in size or modification time is an error.

    Raises:
        ArtifactError: the folder was made by another recipe (the message names the field), or is not an artifact.
    """
    out = str(out).rstrip("/")
    if (found := _finished(kind, out, recipe, sources)) is not None:
        return found
    if is_local(out):
        local_path(out).parent.mkdir(parents=True, exist_ok=True)
    builder = ArtifactBuilder(out, recipe, sources or {})
    for name in parts if only is None else only:
        if write_part is not None and not builder.has(name):
            with builder.part(name) as part:
                write_part(name, part)
    if only is not None:
        return kind(path=out, digest="")
    with builder.part(_WHOLE) as part:
        if write is not None:
            write(part)
        if finish is not None:
            finish(part, builder)
    return kind(path=out, digest=builder.finish([*parts, _WHOLE]).digest)


def make_together(
    kind: type[A], out: str, recipe: Recipe, work: Callable[[], T], write: Callable[[Part, T], None]
) -> A:
    """`make` for a value that all processes of torchrun compute together: each calls `work`, rank 0 writes the result.

    The number of processes is part of the recipe: each process drops samples of its own share of a batch.
    """
    rank, size = world()
    if size > 1:
        recipe = recipe.model_copy(update={"numerics": recipe.numerics | {"processes": size}})
    is_missing = broadcast(not exists(join(out, MANIFEST)))
    if rank > 0 and is_missing:
        work()
    return rank0_first(lambda: make(kind, out, recipe, lambda part: write(part, work())))


def _finished(kind: type[A], out: str, recipe: Recipe, sources: Sources | None) -> A | None:
    """The finished artifact at `out`, or None; ArtifactError if something else is there."""
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
            f"{problems[0]}{more}. Put the original back, or delete {out} to make it again, or choose another --out"
        )
    remove(partial_of(out))  # killed between the manifest and the clean-up
    return kind(path=out, digest=manifest.digest)


def _same_source(before: dict[str, str | int] | None, now: dict[str, str | int]) -> bool:
    return before is not None and all(before.get(name) == now[name] for name in ("size", "modified"))


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Readable list of the leaves in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [d for n in names for d in _differences(before.get(n), now.get(n), f"{path}.{n}" if path else n)]
    return [] if before == now else [f"{path} was {_short(before)} and is now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def copy(artifact: A, out: str) -> A:
    """Copy an artifact of small files; each file is checked, and the manifest is written last."""
    if exists(join(out, MANIFEST)):
        present = type(artifact).load(out)
        if present.digest != artifact.digest:
            raise ArtifactError(f"{out} is another artifact than {artifact.path}; delete the folder to copy it again")
        return present
    manifest = artifact.manifest()
    for name in manifest.files:
        with create(join(out, name)) as writer:
            writer.write(artifact.read(name))
    with create(join(out, MANIFEST)) as writer:
        writer.write(read_bytes(artifact.url(MANIFEST)))
    return type(artifact).load(out)
