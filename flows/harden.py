"""Repair of a model that may have learned a backdoor, and, where asked, certificates for what comes out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flows.certify import as_the_model_sees
from flows.run import Run, claimed, save_config
from flows.runner import RunnerConfig, Threads
from flows.train import packaged
from sanitize.attack import Poisoned
from sanitize.certify import CertifySmoothingConfig, certify_smoothing
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.errors import ConfigError
from sanitize.models.checkpoint import ModelConfig
from sanitize.package import PACKAGE, open_model, package_model
from sanitize.repair import RepairModelConfig, repair_model


class HardenConfig(BaseModel):
    """One run; one YAML file.

    Attributes:
        model: a model package, the folder of a training stage, or a run folder with a package.
        shards: what the model was trained on, for methods that read it (drr).
        clean_shards: samples that are known to be good, for methods that learn from a few (ibau).
        test_shards: samples to measure on before and after, and to certify; no method sees them.
        index: how shards are read; sizes and classes are those of the model.
        repair: the method.
        truth: folder of the artifact of `poison_shards` that made the shards, where the poison is known.
        smoothing: given, the repaired model is certified on the test shards.
        allow_factory: a function that the model names may be run, if an installed package holds it (a model of kind
            "factory"). It is not kept in `config.yaml`.
        n_groups: groups of shards that are worked on side by side. Results do not depend on it.
        compute: device, precision, seed, threads.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    allow_factory: bool = Field(default=False, exclude=True)  # never written down: a copied config.yaml grants nothing
    shards: tuple[str, ...] = ()
    clean_shards: tuple[str, ...] = ()
    test_shards: tuple[str, ...] = ()
    index: IndexConfig = IndexConfig()
    repair: RepairModelConfig = RepairModelConfig()
    truth: str | None = None
    smoothing: CertifySmoothingConfig | None = None
    n_groups: int = Field(default=1, ge=1)
    compute: Compute = Compute()
    runner: RunnerConfig = Threads()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*self.shards, *self.clean_shards, *self.test_shards)


def harden(config: HardenConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, repair, certify, package.

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
        shards = list(find_shards(config.test_shards))
        inputs = config.smoothing, repaired, given["test"]
        certificates = run.sharded("70-certificates", certify_smoothing, shards, *inputs)
        result |= packaged(repaired, [certificates], run)
    else:
        result["package"] = run.stage(PACKAGE, package_model, repaired).path
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def _indexed(folder: str, sources: Sequence[str], config: HardenConfig, model: ModelConfig, run: Run) -> Dataset | None:
    if not sources:
        return None
    return run.sharded(
        folder, index_shards, list(find_shards(sources)), as_the_model_sees(config.index, model), sources
    )


def run_harden(config: HardenConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Repair as a Prefect flow, or with plain function calls; both give the same digests.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    if direct:
        with claimed(out, config.sources):
            return harden(config, Run(out, config.compute, config.n_groups))
    from flows.tasks import harden_flow  # imports Prefect: a second that --direct need not wait for

    return dict(harden_flow(config, str(out)))
