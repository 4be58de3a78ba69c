"""Steps that made the shards, and whether a poisoning certificate is valid after them.

A certificate of `partition` covers samples inserted into or removed from the training data. If an earlier step filtered
samples by statistics of all samples, one poisoned sample in the raw data may have changed which others were kept: a
certificate for the filtered data says nothing about the raw data.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from sanitize.artifacts import MANIFEST, read_manifest
from sanitize.data.dataset import Dataset
from sanitize.errors import ArtifactError, ConfigError
from sanitize.storage import exists, join, read_bytes

_IMPORT = "import_data"
# Stages that treat each sample by itself, or that make the poison a certificate is tested with.
_SAMPLE_BY_SAMPLE = {"write_digits", "poison_shards"}


def refuse_if_void(dataset: Dataset) -> None:
    """Raise ConfigError unless a change of one sample in the shards is a change of one sample in the data set.

    Raises:
        ConfigError: the shards were written by a step that looks at all samples together, such as an import that
            numbered the classes it found; or the number of classes or
            the image size were taken from the samples.
    """
    for folder, stage, settings in _upstream(dataset):
        if stage == _IMPORT:
            _refuse_import(folder, settings)
        elif stage not in _SAMPLE_BY_SAMPLE:
            raise ConfigError(
                f"no poisoning certificate for {folder}: these shards were made by {stage}, which looks at all samples "
                "together. One poisoned sample may have changed which others were kept, so a certificate would not "
                "hold for the raw data. Give the raw shards, and filter inside each partition "
                "(partition.filter: {kind: per_partition})"
            )
    config = dataset.manifest().recipe.config
    wanted = {
        "index.n_classes": (config["n_classes"] or config.get("classes"), dataset.n_classes),
        "index.image.size": (config["image"]["size"], list(dataset.image_shape[1:])),
    }
    if config.get("classes") == "names":
        raise ConfigError(
            "no poisoning certificate with index.classes=names, because one more name could renumber the classes: list "
            "the names, as in `classes` of the index"
        )
    if taken := [f"{name}: {found}" for name, (given, found) in wanted.items() if given is None]:
        raise ConfigError(
            "no poisoning certificate while settings are taken from the samples, because one more sample could change "
            f"them: set {', '.join(taken)} (values found in these samples)"
        )


def _refuse_import(folder: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError unless each sample of an import depends on its own file alone.

    Names of classes that are found number all samples, and folders of splits that are found decide which folder is the
    class. A table of paths, and a file of rows, are one file for all samples.
    """
    if settings.get("kind") != "folders" or not settings.get("classes"):
        raise ConfigError(
            f"no poisoning certificate for {folder}: this import took the classes, or the kind of its source, from all "
            "files together, so that one more file could change all labels. Import class folders again with `sanitize "
            "import FOLDER --kind folders --classes NAMES.json`, where NAMES.json lists all class names and does not "
            'come from the data: ["cat", "dog"]; keep manifest.json beside the shards'
        )


def _upstream(dataset: Dataset) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(folder, stage, its config) of the artifacts that contain the shards."""
    folders = {url.rpartition("/")[0] for url in dataset.urls.values()}
    for folder in sorted(folders | {folder.rpartition("/")[0] for folder in folders}):
        if made := _stage_that_made(folder):
            yield folder, *made


def _stage_that_made(folder: str) -> tuple[str, Mapping[str, Any]] | None:
    """The stage and its config by the manifest; for copies of shards the stage alone, by the description beside them
    (`dataset.json` of clean shards, `import.json`); None if all are unknown."""
    if exists(join(folder, MANIFEST)):
        with suppress(ArtifactError):  # another program's file of that name
            recipe = read_manifest(folder).recipe
            return recipe.stage, recipe.config
    if exists(description := join(folder, "dataset.json")):
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # likewise
            if json.loads(read_bytes(description))["made_from"]["selection"]:
                return "write_selected", {}
    if exists(description := join(folder, "import.json")):
        with suppress(ValueError, TypeError, AttributeError, RecursionError):  # likewise
            if {"offered", "imported", "refused"} <= json.loads(read_bytes(description)).keys():
                return _IMPORT, {}
    return None
