"""Certificates for a model that exists: what nobody within the stated bounds can change about its predictions."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flows.run import Run, claimed, save_config
from flows.runner import RunnerConfig, Threads
from flows.train import packaged
from sanitize.certify import CertifySmoothingConfig, certify_partitions, certify_smoothing
from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.models.checkpoint import ModelConfig
from sanitize.package import open_model


class CertifyRunConfig(BaseModel):
    """One run; one YAML file.

    Attributes:
        model: a model package, the folder of a training stage, or a run folder with a package.
        shards: test samples: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        index: how they are read; sizes and classes are those of the model.
        smoothing: for one network; an ensemble of partitions is certified by its votes, which has no settings.
        allow_factory: a function that the model names may be run, if an installed package holds it (a model of kind
            "factory"). It is not kept in `config.yaml`.
        n_groups: groups of shards that are worked on side by side. Results do not depend on it.
        compute: device, precision, seed, threads.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    allow_factory: bool = Field(default=False, exclude=True)  # never written down: a copied config.yaml grants nothing
    shards: tuple[str, ...] = Field(min_length=1)
    index: IndexConfig = IndexConfig()
    smoothing: CertifySmoothingConfig = CertifySmoothingConfig()
    n_groups: int = Field(default=1, ge=1)
    compute: Compute = Compute()
    runner: RunnerConfig = Threads()


def certify(config: CertifyRunConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, certify, package.

    Returns:
        Places, and what is proved.
    """
    model = open_model(config.model, config.allow_factory)
    shards = list(find_shards(config.shards))
    dataset = run.sharded(
        "00-index", index_shards, shards, as_the_model_sees(config.index, model.config), config.shards
    )
    if model.config.n_networks > 1:
        certificates = run.sharded("70-certificates", certify_partitions, shards, model, dataset)
    else:
        certificates = run.sharded("70-certificates", certify_smoothing, shards, config.smoothing, model, dataset)
    result = packaged(model, [certificates], run)
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def as_the_model_sees(index: IndexConfig, model: ModelConfig) -> IndexConfig:
    """The same, with the image size, channels and classes of the model."""
    channels, height, width = model.image_shape
    image = index.image.model_copy(update={"size": (height, width), "channels": channels})
    return index.model_copy(update={"n_classes": model.n_classes, "image": image})


def run_certify(config: CertifyRunConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Certify as a Prefect flow, or with plain function calls; both give the same digests.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    if direct:
        with claimed(out, config.shards):
            return certify(config, Run(out, config.compute, config.n_groups))
    from flows.tasks import certify_flow  # imports Prefect: a second that --direct need not wait for

    return dict(certify_flow(config, str(out)))
