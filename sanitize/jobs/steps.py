"""Steps that several jobs share."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sanitize.certification import Certificates
from sanitize.data.class_names import names_beside, refuse_others
from sanitize.data.dataset import Dataset
from sanitize.data.index import index_shards
from sanitize.data.index_config import IndexConfig
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.errors import ConfigError
from sanitize.hygiene import HygieneConfig, check_hygiene
from sanitize.jobs.run import Run
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.config import ModelConfig
from sanitize.packaging import PACKAGE, package_model
from sanitize.report import write_certificate_report, write_leak_report

logger = logging.getLogger("sanitize.run")
HYGIENE, LEAKS = "05-hygiene", "06-test-leaks"  # folders of its findings in a run, and of the page about leaks


def index_found(folder: str, sources: Sequence[str], index: IndexConfig, run: Run) -> Dataset:
    """The index of all shards that are found at `sources`."""
    found = find_shards(sources)
    return run.sharded(folder, index_shards, list(found), index.named(found.values()), fingerprint_shards(found))


def index_more(
    folder: str, sources: Sequence[str], changed: dict[str, Any], index: IndexConfig, dataset: Dataset, run: Run
) -> Dataset | None:
    """More shards, indexed with the image size and the classes of `dataset`; None without sources.

    Raises:
        DataError: files beside the shards number the classes in another way.
    """
    if not sources:
        return None
    image = index.image.model_copy(update={"size": dataset.image_shape[1:]})
    same = like(index, dataset).model_copy(update={"image": image} | changed)
    if index.class_names is None and same.label == index.label == "cls":
        refuse_other_numbers(sources, dataset.class_names, dataset.path)
    return index_found(folder, sources, same, run)


def like(index: IndexConfig, dataset: Dataset) -> IndexConfig:
    """Index settings with the classes of a data set, and their names."""
    names = {} if dataset.classes is not None else dataset.class_names
    return index.model_copy(update={"n_classes": dataset.n_classes, "classes": dataset.classes, "class_names": names})


def refuse_other_numbers(sources: Sequence[str], names: Mapping[int, str], whose: str) -> None:
    """Raise DataError where files beside shards number the classes in another way than `names`, those of `whose`."""
    if names:
        refuse_others(names_beside(find_shards(sources).values()), names, ", ".join(sources), whose)


def with_facts(index: IndexConfig, is_needed: bool = True) -> IndexConfig:
    """Index settings with facts about images, for `check_hygiene`; those of an index that decodes no images stay."""
    return index.model_copy(update={"image_facts": True}) if is_needed and index.check == "decode" else index


def leaks(dataset: Dataset, test: Dataset | None, run: Run) -> int | None:
    """Number of training samples whose picture is also in the test shards, with a warning; None without test shards."""
    if test is None:
        return None
    hygiene = run.stage(HYGIENE, check_hygiene, HygieneConfig(), dataset, test=test)
    n = int(hygiene.read_json("hygiene.json")["counts"]["test_leak"])
    if n:
        page = run.stage(LEAKS, write_leak_report, hygiene, dataset, test)
        logger.warning(
            "%s of %s training samples show a picture that is also in the test shards: accuracy on them is too high. "
            "%s shows them",
            f"{n:,}",
            f"{dataset.n_samples:,}",
            page.url("index.html"),
        )
    return n


def as_the_model_sees(index: IndexConfig, model: ModelConfig, sources: Sequence[str]) -> IndexConfig:
    """Index settings for these shards with the image size, channels and classes of the model.

    Raises:
        DataError: files beside the shards number the classes in another way than the model.
    """
    if index.classes == "names":
        raise ConfigError(
            "index.classes=names numbers the names of these shards, perhaps not as the model does: list the names, as "
            "in `classes` of 00-index/dataset.json of the training run (index.classes: [...])"
        )
    channels, height, width = model.image_shape
    image = index.image.model_copy(update={"size": (height, width), "channels": channels})
    same = index.model_copy(update={"n_classes": model.n_classes, "image": image})
    if same.class_names is None and same.classes is None and same.label == "cls" and model.class_names:
        refuse_other_numbers(sources, model.class_names, "the model")
        return same.model_copy(update={"class_names": model.class_names})
    return same


def packaged(model: Checkpoint, certificates: Sequence[Certificates], run: Run) -> dict[str, Any]:
    """The last steps of jobs that end in certificates: package and report; returns places and certified accuracy."""
    package = run.stage(PACKAGE, package_model, model, certificates=certificates)
    report = run.stage("90-report", write_certificate_report, package)
    proved = package.read_json("certificate.json")["certificates"]
    return {"package": package.path, "certificates": proved, "report": report.url("index.html")}
