"""Repair of a model that may have learned a backdoor, and certificates for the repaired model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sanitize.attack import Poisoned
from sanitize.certification import CertifySmoothingConfig, certify_smoothing
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError
from sanitize.jobs.job import ModelRunConfig, job
from sanitize.jobs.result import ModelRun
from sanitize.jobs.run import Run
from sanitize.jobs.steps import as_the_model_sees, index_found, packaged
from sanitize.models.config import ModelConfig
from sanitize.packaging import PACKAGE, open_model, package_model
from sanitize.repairs import RepairedModel, RepairModelConfig, repair_model


class RepairRunConfig(ModelRunConfig):
    """Config of one run; one YAML file.

    Attributes:
        shards: training data of the model, for methods that read it (drr).
        clean_shards: trusted samples, for methods that learn from a few of them (ibau).
        test_shards: samples to measure on before and after, and to certify; no method sees them.
        index: settings of reading shards; sizes and classes are those of the model.
        repair: the method.
        truth: folder of the artifact of `poison_shards` that made the shards, where the poison is known.
        smoothing: settings to certify the repaired model with on the test shards; None does not certify it.
    """

    shards: tuple[str, ...] = ()
    clean_shards: tuple[str, ...] = ()
    test_shards: tuple[str, ...] = ()
    repair: RepairModelConfig = RepairModelConfig()
    truth: str | None = None
    smoothing: CertifySmoothingConfig | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """All shards that the job reads."""
        return (*self.shards, *self.clean_shards, *self.test_shards)


@dataclass(frozen=True)
class RepairRun(ModelRun):
    """A finished run of `repair`."""

    kind = RepairRunConfig

    @property
    def measures(self) -> dict[str, Any]:
        """The method, its findings, the change of the weights, and accuracy and ASR before and after."""
        return RepairedModel.load(self._in("60-repaired")).report

    @property
    def report(self) -> str | None:
        """Path or URL of the report page on the certificates; None where the run has no `smoothing`."""
        return self._page() if self.config.smoothing is not None else None


@job(RepairRunConfig, RepairRun)
def repair(config: RepairRunConfig, run: Run) -> dict[str, Any]:
    """Repair a model that may have learned a backdoor.

    Stages: index, repair, certify (with `smoothing`), package.

    Returns:
        Places, and measures before and after.
    """
    if config.smoothing is not None and not config.test_shards:
        raise ConfigError("`smoothing:` certifies predictions on test shards: give test_shards")
    model = open_model(config.model, config.allow_factory)
    given = {
        "untrusted": _indexed("00-index", config.shards, config, model.config, run),
        "clean": _indexed("01-index-clean", config.clean_shards, config, model.config, run),
        "test": _indexed("02-index-test", config.test_shards, config, model.config, run),
    }
    truth = None if config.truth is None else Poisoned.load(config.truth)
    repaired = run.stage("60-repaired", repair_model, config.repair, model, **given, truth=truth)
    result: dict[str, Any] = {"model": repaired.path, "repair": repaired.report}
    if config.smoothing is not None:
        shards = given["test"].shards if given["test"] else []
        inputs = config.smoothing, repaired, given["test"]
        certificates = run.sharded("70-certificates", certify_smoothing, shards, *inputs)
        result |= packaged(repaired, [certificates], run)
    else:
        result["package"] = run.stage(PACKAGE, package_model, repaired).path
    if names := repaired.config.class_names:
        result["class_names"] = {str(label): name for label, name in names.items()}
    return run.finish(config, result)


def _indexed(
    folder: str, sources: Sequence[str], config: RepairRunConfig, model: ModelConfig, run: Run
) -> Dataset | None:
    return index_found(folder, sources, as_the_model_sees(config.index, model, sources), run) if sources else None
