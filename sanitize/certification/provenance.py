"""Steps that made the shards, and whether a poisoning certificate is valid after them.

A certificate of `partition` covers samples inserted into or removed from the training data. If an earlier step filtered
samples by statistics of all samples, one poisoned sample in the raw data may have changed which others were kept: a
certificate for the filtered data says nothing about the raw data.
"""

import json
from collections.abc import Iterator
from contextlib import suppress

from sanitize.artifacts import MANIFEST, read_manifest
from sanitize.data.dataset import Dataset
from sanitize.errors import ArtifactError, ConfigError
from sanitize.storage import exists, join, read_bytes

# Stages that treat each sample by itself, or that make the poison a certificate is tested with.
_SAMPLE_BY_SAMPLE = {"write_digits", "poison_shards"}


def refuse_if_void(dataset: Dataset) -> None:
    """Raise ConfigError unless a change of one sample in the shards is a change of one sample in the data set.

    Raises:
        ConfigError: the shards were written by a step that looks at all samples together; or the number of classes or
            the image size were taken from the samples.
    """
    for folder, stage in _upstream(dataset):
        if stage not in _SAMPLE_BY_SAMPLE:
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


def _upstream(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """(folder, stage) of the artifacts that contain the shards."""
    folders = {url.rpartition("/")[0] for url in dataset.urls.values()}
    for folder in sorted(folders | {folder.rpartition("/")[0] for folder in folders}):
        if stage := _stage_that_made(folder):
            yield folder, stage


def _stage_that_made(folder: str) -> str | None:
    """The stage by the manifest or, for a copy of clean shards, by `dataset.json`; None if both are unknown."""
    if exists(join(folder, MANIFEST)):
        with suppress(ArtifactError):  # another program's file of that name
            return read_manifest(folder).recipe.stage
    if exists(description := join(folder, "dataset.json")):
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # likewise
            return "write_selected" if json.loads(read_bytes(description))["made_from"]["selection"] else None
    return None
