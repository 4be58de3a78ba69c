"""Artifacts: folders that exist only when they are finished, and remember the whole recipe they were made by.

    dataset = make(Dataset, out, recipe, parts=shards, write_part=...)

A folder is filled beside its final name, part by part (one part a shard, usually); a part that is finished is
recorded, so that a run which was killed goes on with the parts that are missing. When all are there, the manifest is
written last and the folder is renamed. There is no other resume logic anywhere: calling a stage again is resuming.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from sanitize.errors import ArtifactError
from sanitize.storage import HashingWriter, create, sha256_file

MANIFEST = "manifest.json"


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

    sha256: str
    size: int


class Manifest(BaseModel):
    """What an artifact holds. `sources` locates inputs that are no artifacts; it is not part of the digest, because
    a copy of the same bytes elsewhere is the same data."""

    format: int = 1
    recipe: Recipe
    files: dict[str, FileEntry] = {}
    counts: dict[str, int] = {}
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
        """The handle of a folder on disk. Raises ArtifactError if it is not a finished artifact."""
        return cls(path=str(path), digest=read_manifest(Path(path)).digest)

    def manifest(self) -> Manifest:
        """The manifest, checked against the digest of this handle."""
        manifest = read_manifest(Path(self.path))
        if manifest.digest != self.digest:
            raise ArtifactError(f"{self.path} is not the artifact it was: its manifest has changed; re-run the stage")
        return manifest

    def file(self, name: str) -> Path:
        """Path of a file inside the folder."""
        return Path(self.path) / name

    def read_json(self, name: str) -> Any:
        """Content of a JSON file inside the folder."""
        return json.loads(self.file(name).read_bytes())


A = TypeVar("A", bound=Artifact)


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`. Raises ArtifactError where it is missing or not a manifest."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not a finished artifact: it has no {MANIFEST}") from None
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: {error}") from error


class Part:
    """One unit of work inside an artifact in the making; its files are recorded when it is finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, FileEntry] = {}
        self.counts: Counter[str] = Counter()

    @contextmanager
    def create(self, name: str) -> Iterator[HashingWriter]:
        """Open the file `name` of the artifact for writing; it appears when the block ends without an exception."""
        with create(self._folder / name) as writer:
            yield writer
        self.files[name] = FileEntry(sha256=writer.sha256, size=writer.size)

    def write(self, name: str, data: bytes) -> None:
        """Write the file `name` of the artifact."""
        with self.create(name) as writer:
            writer.write(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as readable JSON with sorted keys."""
        self.write(name, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


class Workshop:
    """An artifact in the making: the folder `.NAME.partial` beside the final one."""

    def __init__(self, out: Path, recipe: Recipe, sources: dict[str, dict[str, str | int]]) -> None:
        self.out = out
        self.recipe = recipe
        self.sources = sources
        self._partial = out.with_name(f".{out.name}.partial")
        self._files = self._partial / "files"
        recipe_file = self._partial / "recipe.json"
        # With the sources, but not where they are: what was read from a shard that has changed since is of no use.
        read = {name: {k: v for k, v in source.items() if k != "url"} for name, source in sources.items()}
        wanted = _canonical({"recipe": recipe.model_dump(mode="json"), "sources": read})
        with _one_at_a_time(out.parent):
            if self._partial.exists() and (not recipe_file.exists() or recipe_file.read_bytes() != wanted):
                shutil.rmtree(self._partial)  # left by a run with another recipe: nothing in it can be used
            self._files.mkdir(parents=True, exist_ok=True)
            if not recipe_file.exists():
                with create(recipe_file) as writer:
                    writer.write(wanted)

    def _record(self, part: str) -> Path:
        return self._partial / "parts" / f"{part}.json"

    def has(self, part: str) -> bool:
        """True when the part was finished, by this process or an earlier one."""
        return self._record(part).exists()

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Make one part: its record is written when the block ends without an exception."""
        part = Part(self._files)
        yield part
        record = {"files": {k: v.model_dump() for k, v in part.files.items()}, "counts": dict(part.counts)}
        with create(self._record(name)) as writer:
            writer.write(_canonical(record))

    def path(self, name: str) -> Path:
        """Where a file that a finished part wrote lies for now."""
        return self._files / name

    def counts(self, parts: Sequence[str]) -> Counter[str]:
        """Counts of finished parts, added up."""
        total: Counter[str] = Counter()
        for name in parts:
            total.update(json.loads(self._record(name).read_bytes())["counts"])
        return total

    def finish(self, parts: Sequence[str]) -> Manifest:
        """Write the manifest from the records of `parts` and give the folder its name."""
        files: dict[str, FileEntry] = {}
        for name in parts:
            record = json.loads(self._record(name).read_bytes())
            files |= {k: FileEntry(**v) for k, v in record["files"].items()}
        for stray in [
            p for p in self._files.rglob("*") if p.is_file() and str(p.relative_to(self._files)) not in files
        ]:
            stray.unlink()  # a file of a part that was killed before its record was written, and then renamed
        manifest = Manifest(
            recipe=self.recipe,
            files=dict(sorted(files.items())),
            counts=dict(sorted(self.counts(parts).items())),
            sources=self.sources,
        )
        with create(self._files / MANIFEST) as writer:
            writer.write(json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n")
        self._files.rename(self.out)
        shutil.rmtree(self._partial)
        return manifest


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
    finish: Callable[[Part, Workshop], None] | None = None,
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
    out = Path(out)
    if (found := _finished(kind, out, recipe, sources)) is not None:
        return found
    out.parent.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(out, recipe, sources or {})
    for name in parts if only is None else only:
        if write_part is not None and not workshop.has(name):
            with workshop.part(name) as part:
                write_part(name, part)
    if only is not None:
        return kind(path=str(out), digest="")
    with workshop.part(_WHOLE) as part:
        if write is not None:
            write(part)
        if finish is not None:
            finish(part, workshop)
    return kind(path=str(out), digest=workshop.finish([*parts, _WHOLE]).digest)


def _finished(kind: type[A], out: Path, recipe: Recipe, sources: dict[str, dict[str, str | int]] | None) -> A | None:
    """The artifact at `out` if it is there; ArtifactError if something else is."""
    if not out.exists():
        return None
    if not out.is_dir() or not (out / MANIFEST).exists():
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
    shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)  # killed between rename and clean-up
    return kind(path=str(out), digest=manifest.digest)


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


def verify(folder: Path) -> list[str]:
    """Re-hash every file of the artifact in `folder` and compare with its manifest.

    Returns:
        One line for each file that is missing, different or not listed; empty when all is as it was written.
    """
    manifest = read_manifest(folder)
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    problems = [f"{folder / name}: missing" for name in sorted(manifest.files.keys() - there)]
    problems += [f"{folder / name}: not listed in the manifest" for name in sorted(there - manifest.files.keys())]
    for name in sorted(there & manifest.files.keys()):
        entry, path = manifest.files[name], folder / name
        if path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
            problems.append(f"{path}: content differs from the manifest")
    return problems
