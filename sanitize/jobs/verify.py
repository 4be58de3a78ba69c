"""Verification of a run: every file against its manifest, every input against its artifact."""

import json
from collections.abc import Collection
from typing import Any, NamedTuple

from sanitize.artifacts import MANIFEST, Manifest, first_line, read_manifest, verify
from sanitize.errors import ArtifactError
from sanitize.storage import join, names_below, read_bytes


class Verified(NamedTuple):
    """Result of a verification.

    Attributes:
        n_files: number of files that were hashed.
        problems: differences from what was written, one line each.
        notes: inputs that could not be checked or have changed since, one line each.
    """

    n_files: int
    problems: list[str]
    notes: list[str]

    def plus(self, other: "Verified") -> "Verified":
        """The sum of two results."""
        return Verified(self.n_files + other.n_files, self.problems + other.problems, self.notes + other.notes)


def nothing() -> Verified:
    """The result before any file was checked."""
    return Verified(0, [], [])


def verify_run(folder: str) -> tuple[int, list[str]]:
    """Re-hash all artifacts of a run, and check that every input digest is the digest of a known artifact.

    Returns:
        Number of files, and one line for each problem.

    Raises:
        ArtifactError: there is no artifact in the folder.
    """
    if not artifacts_of(folder):
        raise ArtifactError(f"{folder} holds no finished artifact; give the folder of a run, an artifact or a store")
    found = check_run(folder)
    return found.n_files, found.problems


def check_run(folder: str, known: Collection[str] | None = None) -> Verified:
    """Verify a run, with notes on what could not be checked.

    Args:
        folder: path or URL of the run folder.
        known: digests of input artifacts from outside the run; None takes those in `run.json`.
    """
    found, manifests = nothing(), {}
    for name in artifacts_of(folder):
        path = join(folder, name)
        result, manifest = check_artifact(path)
        found = found.plus(result)
        if manifest is not None:
            manifests[name] = manifest
    try:
        record = _record(folder)
    except ArtifactError as error:
        found.problems.append(str(error))
        record = {"stages": []}
    if known is None and isinstance(record.get("inputs"), dict):
        known = [str(digest) for digest in record["inputs"]]
    digests = {manifest.digest for manifest in manifests.values()}
    for name, manifest in manifests.items():
        path = join(folder, name)
        for input_name, digest in manifest.recipe.inputs.items():
            if len(digest) != 64 or input_name == "weights" or digest in digests or digest in (known or ()):
                continue  # shards and weights are files, not artifacts
            problem = f"{path}: its input {input_name} ({digest[:12]}) is no artifact of this run"
            if known is None:  # a run of a version that did not record its inputs
                found.notes.append(f"{problem}, and was not checked")
            else:
                found.problems.append(f"{problem}, nor an input from outside")
    for stage in record["stages"]:
        if stage["folder"] not in manifests:
            found.problems.append(f"{join(folder, stage['folder'])}: run.json lists it, but it is not there")
        elif manifests[stage["folder"]].digest != stage["digest"]:
            found.problems.append(f"{join(folder, stage['folder'])}: its manifest is not the one run.json lists")
    return found


def check_artifact(path: str, digest: str | None = None) -> tuple[Verified, Manifest | None]:
    """Re-hash one artifact; where `digest` is given, its manifest is checked too. None where there is no manifest."""
    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        return Verified(0, [str(error)], []), None
    problems = verify(path)
    if digest is not None and manifest.digest != digest:
        problems.append(f"{path}: its manifest is not the one the ledger names")
    return Verified(len(manifest.files), problems, []), manifest


def artifacts_of(folder: str) -> list[str]:
    """Names of the finished artifacts of a run, sorted."""
    names = (name.split("/") for name in names_below(folder))
    return sorted(parts[0] for parts in names if parts[1:] == [MANIFEST])


def _record(folder: str) -> dict[str, Any]:
    """The run.json of a folder, with folder and digest of each stage; without stages where there is no file.

    Raises:
        ArtifactError: it is damaged.
    """
    url = join(folder, "run.json")
    try:
        record: dict[str, Any] = json.loads(read_bytes(url))
        stages = [{"folder": str(stage["folder"]), "digest": str(stage["digest"])} for stage in record["stages"]]
    except FileNotFoundError:
        return {"stages": []}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{url} is damaged: {first_line(error)}") from error
    return record | {"stages": stages}
