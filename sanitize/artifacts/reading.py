"""Finished artifacts: recipe, manifest, digest; reading and checking their files."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import safetensors.torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sanitize.errors import ArtifactError, DataError
from sanitize.storage import exists, is_local, join, local_path, names_below, open_read, sha256_file, stamps_below

MANIFEST = "manifest.json"
MAX_JSON = 1 << 28  # bytes; the manifest of a million shards is that large. Larger files are not read
Sources = dict[str, dict[str, str | int]]  # name -> url, size, modification time or ETag


class Recipe(BaseModel):
    """Everything that can change the numbers of an artifact, and nothing else.

    Attributes:
        stage: name of the stage function.
        version: version of the stage's meaning; raised when the same config would give other results.
        config: the stage's configuration as plain data.
        numerics: seed and precision (`Compute.numerics`); not the device, not the number of workers.
        inputs: name -> digest of each input artifact.
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
    """The name itself; ValueError if it is not the name of a file inside the artifact's folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name or "::" in name or name == MANIFEST:
        raise ValueError("it names no file inside the folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Count = Annotated[int, Field(gt=-(2**63), lt=2**63)]


class Manifest(BaseModel):
    """Recipe, files and counts of an artifact. `sources` locates inputs that are no artifacts; it is not part of the
    digest, because a copy of the same bytes elsewhere is the same data."""

    format: Literal[1] = 1
    recipe: Recipe
    files: dict[FileName, FileEntry] = {}
    counts: dict[str, Count] = {}
    sources: Sources = {}

    @property
    def digest(self) -> str:
        """sha256 of everything but `sources`."""
        return hashlib.sha256(canonical(self.model_dump(mode="json", exclude={"sources"}))).hexdigest()


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
        """The manifest, checked against the digest of this handle. Raises ArtifactError where they differ."""
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
            name: name of the file.
            at_most: largest size in bytes of a file that is read.

        Raises:
            ArtifactError: the manifest does not list the file, the file is too large, is no regular file inside the
                folder, or differs from the manifest.
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
            raise ArtifactError(f"{url} differs from the manifest; delete {self.path} and run again")
        return data

    @cached_property
    def _listed(self) -> dict[str, FileEntry]:
        return self.manifest().files

    def read_json(self, name: str, at_most: int = MAX_JSON) -> Any:
        """Content of a JSON file inside the folder. Raises ArtifactError as `read` does, or if the file is no JSON."""
        try:
            return json.loads(self.read(name, at_most))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self.url(name)} is no JSON file: {first_line(error)}") from error

    def read_object(self, name: str, *fields: str) -> dict[str, Any]:
        """Content of a JSON file that holds an object with at least these fields; else ArtifactError."""
        found = self.read_json(name)
        if not isinstance(found, dict) or (missing := [field for field in fields if field not in found]):
            what = "is no object" if not isinstance(found, dict) else f"has no {', '.join(missing)}"
            raise ArtifactError(f"{self.url(name)} {what}; it was not written by this version, or is damaged")
        return found

    def read_tensors(self, name: str, *needed: str) -> dict[str, Tensor]:
        """Tensors of a safetensors file inside the folder, by name.

        Args:
            name: name of the file.
            needed: names of required tensors.

        Raises:
            ArtifactError: as `read`; the file has another format, or a tensor is missing.
        """
        try:
            tensors = safetensors.torch.load(self.read(name))
        except ArtifactError:
            raise
        except Exception as error:  # a header that lies: the library raises errors of many types
            raise ArtifactError(f"{self.url(name)} is no safetensors file: {first_line(error)}") from error
        if missing := [tensor for tensor in needed if tensor not in tensors]:
            raise ArtifactError(f"{self.url(name)} has no tensor {', '.join(missing)}; it is damaged")
        return tensors


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
    """Content of a file if its size is right, else None. Raises DataError where it is no regular file."""
    with open_read(url) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        return stream.read(size) if is_right(size) else None


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation, on one line: the field and the reason."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return first_line(f"{where}: {problem['msg']}{more}" if where else problem["msg"])


def first_line(error: Exception | str) -> str:
    """At most 300 characters of a message, on one line, without control characters: it may come from outside."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:300])


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no blanks: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def altered(folder: str, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Files of a finished artifact that differ from what was written, judged by size and time.

    The manifest is written last, so a younger file was written again since: only such files are hashed. A change that
    keeps the size and sets the time back is found by `verify`, which hashes everything.

    Args:
        folder: folder of the artifact.
        files: size and sha256 of each file to check, by name.

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
        One line for each file that is missing, different or not listed; empty when nothing has changed.
    """
    manifest = read_manifest(folder)
    there = set(names_below(folder)) - {MANIFEST}
    problems = [f"{join(folder, name)}: missing" for name in sorted(manifest.files.keys() - there)]
    problems += [f"{join(folder, name)}: not listed in the manifest" for name in sorted(there - manifest.files.keys())]
    for name in sorted(there & manifest.files.keys()):
        if sha256_file(join(folder, name)) != manifest.files[name].sha256:
            problems.append(f"{join(folder, name)}: content differs from the manifest")
    return problems
