"""Repair of a model that may have learned a backdoor, and, where asked, certificates for what comes out."""

from collections.abc import Sequence
from typing import Any

from sanitize.attack import Poisoned
from sanitize.certify import CertifySmoothingConfig, certify_smoothing
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError
from sanitize.jobs.job import ModelRunConfig, job
from sanitize.jobs.run import Run
from sanitize.jobs.steps import as_the_model_sees, index_found, packaged
from sanitize.models.config import ModelConfig
from sanitize.package import PACKAGE, open_model, package_model
from sanitize.repair import RepairModelConfig, repair_model


class RepairRunConfig(ModelRunConfig):
    """One run; one YAML file.

    Attributes:
        shards: what the model was trained on, for methods that read it (drr).
        clean_shards: samples that are known to be good, for methods that learn from a few (ibau).
        test_shards: samples to measure on before and after, and to certify; no method sees them.
        index: how shards are read; sizes and classes are those of the model.
        repair: the method.
        truth: folder of the artifact of `poison_shards` that made the shards, where the poison is known.
        smoothing: given, the repaired model is certified on the test shards.
    """

    shards: tuple[str, ...] = ()
    clean_shards: tuple[str, ...] = ()
    test_shards: tuple[str, ...] = ()
    repair: RepairModelConfig = RepairModelConfig()
    truth: str | None = None
    smoothing: CertifySmoothingConfig | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*self.shards, *self.clean_shards, *self.test_shards)


@job(RepairRunConfig)
def repair(config: RepairRunConfig, run: Run) -> dict[str, Any]:
    """Repair a model that may have learned a backdoor: index, repair, certify where asked, package.

    Returns:
        Places, and what was measured before and after.
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
    return run.finish(config, result)


def _indexed(
    folder: str, sources: Sequence[str], config: RepairRunConfig, model: ModelConfig, run: Run
) -> Dataset | None:
    return index_found(folder, sources, as_the_model_sees(config.index, model), run) if sources else None
