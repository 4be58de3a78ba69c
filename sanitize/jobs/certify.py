"""Certificates for a trained model: predictions that no change within the stated bounds can alter."""

import logging
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sanitize.certification import Certificates, CertifySmoothingConfig, certify_partitions, certify_smoothing
from sanitize.data.dataset import Dataset
from sanitize.jobs.job import ModelRunConfig, job
from sanitize.jobs.result import ModelRun, table_of
from sanitize.jobs.run import Run
from sanitize.jobs.steps import as_the_model_sees, index_found, leaks, packaged, with_facts
from sanitize.jobs.trained_on import training_data
from sanitize.packaging import open_model

logger = logging.getLogger("sanitize.run")


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

    Stages: index, search for test pictures in the training data, certify, package, report.

    Returns:
        Places, and the certified accuracy; `test_leaks`: number of training samples whose picture is in the test
        shards, or None and `leaks_unchecked`, the reason why that is not known.
    """
    model = open_model(config.model, config.allow_factory)
    trained = training_data(model)
    index = as_the_model_sees(config.index, model.config, config.shards)
    if isinstance(trained, Dataset):
        index = with_facts(index, trained.has_facts)
    dataset = index_found("00-index", config.shards, index, run)
    found = _leaks(trained, dataset, run)
    if model.config.is_ensemble:
        certificates = run.sharded("70-certificates", certify_partitions, dataset.shards, model, dataset)
    else:
        certificates = run.sharded(
            "70-certificates", certify_smoothing, dataset.shards, config.smoothing, model, dataset
        )
    return run.finish(config, packaged(model, [certificates], run) | found)


def _leaks(trained: Dataset | str, test: Dataset, run: Run) -> dict[str, Any]:
    """Number of leaks, or why they were not looked for, with a warning."""
    unchecked = trained if isinstance(trained, str) else None
    if isinstance(trained, Dataset) and "headers" in (trained.info["check"], test.info["check"]):
        unchecked = "an index read no pictures (index.check=headers)"
    if unchecked is None and isinstance(trained, Dataset):
        return {"test_leaks": leaks(trained, test, run), "leaks_unchecked": None}
    logger.warning("whether test pictures were trained on was not checked: %s", unchecked)
    return {"test_leaks": None, "leaks_unchecked": unchecked}
