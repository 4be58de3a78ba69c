"""Certificates for a trained model: predictions that no change within the stated bounds can alter."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sanitize.certification import Certificates, CertifySmoothingConfig, certify_partitions, certify_smoothing
from sanitize.jobs.job import ModelRunConfig, job
from sanitize.jobs.result import ModelRun, table_of
from sanitize.jobs.run import Run
from sanitize.jobs.steps import as_the_model_sees, index_found, packaged
from sanitize.package import open_model


class CertifyRunConfig(ModelRunConfig):
    """Config of one run; one YAML file.

    Attributes:
        shards: test samples: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        index: settings of reading shards; sizes and classes are those of the model.
        smoothing: randomized smoothing of one network. An ensemble of partitions is certified by its votes, without
            settings.
    """

    smoothing: CertifySmoothingConfig = CertifySmoothingConfig()


@dataclass(frozen=True)
class CertifyRun(ModelRun):
    """A finished run of `certify`."""

    kind = CertifyRunConfig

    @property
    def report(self) -> str:
        """Path or URL of the report page."""
        return self._page()

    def certificates(self) -> pa.Table:
        """One row a test sample: shard, position, key, label, prediction (-1: abstains), radius, and the counts."""
        return table_of(Certificates.load(self._in("70-certificates")))


@job(CertifyRunConfig, CertifyRun)
def certify(config: CertifyRunConfig, run: Run) -> dict[str, Any]:
    """Certify the predictions of a trained model on test samples.

    Stages: index, certify, package, report.

    Returns:
        Places, and the certified accuracy.
    """
    model = open_model(config.model, config.allow_factory)
    dataset = index_found("00-index", config.shards, as_the_model_sees(config.index, model.config, config.shards), run)
    if model.config.is_ensemble:
        certificates = run.sharded("70-certificates", certify_partitions, dataset.shards, model, dataset)
    else:
        certificates = run.sharded(
            "70-certificates", certify_smoothing, dataset.shards, config.smoothing, model, dataset
        )
    return run.finish(config, packaged(model, [certificates], run))
