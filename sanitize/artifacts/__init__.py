"""Artifacts: folders that exist only when they are finished, and contain the recipe that they were made from."""

from sanitize.artifacts.making import ArtifactBuilder, Part, copy, make, make_together, partial_of
from sanitize.artifacts.reading import (
    MANIFEST,
    MAX_JSON,
    Artifact,
    FileEntry,
    Manifest,
    Recipe,
    Sources,
    altered,
    first_line,
    first_problem,
    read_manifest,
    verify,
)

__all__ = [
    "MANIFEST",
    "MAX_JSON",
    "Artifact",
    "ArtifactBuilder",
    "FileEntry",
    "Manifest",
    "Part",
    "Recipe",
    "Sources",
    "altered",
    "copy",
    "first_line",
    "first_problem",
    "make",
    "make_together",
    "partial_of",
    "read_manifest",
    "verify",
]
