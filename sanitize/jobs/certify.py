"""Certificates for a model that exists: what nobody within the stated bounds can change about its predictions."""

from typing import Any

from sanitize.certify import CertifySmoothingConfig, certify_partitions, certify_smoothing
from sanitize.jobs.job import ModelRunConfig, job
from sanitize.jobs.run import Run
from sanitize.jobs.steps import as_the_model_sees, index_found, packaged
from sanitize.package import open_model


class CertifyRunConfig(ModelRunConfig):
    """One run; one YAML file.

    Attributes:
        shards: test samples: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        index: how they are read; sizes and classes are those of the model.
        smoothing: for one network; an ensemble of partitions is certified by its votes, which has no settings.
    """

    smoothing: CertifySmoothingConfig = CertifySmoothingConfig()


@job(CertifyRunConfig)
def certify(config: CertifyRunConfig, run: Run) -> dict[str, Any]:
    """Certify a trained model: index, certify, package, report.

    Returns:
        Places, and what is proved.
    """
    model = open_model(config.model, config.allow_factory)
    dataset = index_found("00-index", config.shards, as_the_model_sees(config.index, model.config), run)
    if model.config.is_ensemble:
        certificates = run.sharded("70-certificates", certify_partitions, dataset.shards, model, dataset)
    else:
        certificates = run.sharded(
            "70-certificates", certify_smoothing, dataset.shards, config.smoothing, model, dataset
        )
    return run.finish(config, packaged(model, [certificates], run))
