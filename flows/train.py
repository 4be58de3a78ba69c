"""Robust training: shards nobody can vouch for in, a model, its history and a suspicion of every sample out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.run import Run, claimed, save_config
from flows.runner import RunnerConfig, Threads
from sanitize.certify import Certificates, PartitionConfig, certify_partitions, train_partitions
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards
from sanitize.denoise import PCAConfig, fit_pca
from sanitize.distributed import world
from sanitize.embed import SimCLRConfig, pretrain_simclr
from sanitize.errors import ConfigError
from sanitize.models.checkpoint import Checkpoint
from sanitize.package import PACKAGE, package_model
from sanitize.report import write_certificate_report, write_training_report
from sanitize.train import DropScorerConfig, TrainConfig, drop_scores, train_robust


class TrainRunConfig(BaseModel):
    """One training run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards to learn from.
        test_shards: shards to measure the accuracy on after each epoch; nothing is learned from them.
        unlabelled_shards: more images for `simclr`; their labels are not read, and need not be there.
        index, train, drop_scores: one section a stage.
        partition: given, an ensemble is trained in place of the one model of `train`, and its predictions on the test
            shards are certified against poisoned training samples.
        simclr: given, an encoder is pre-trained without labels, and `train` learns its last layer alone (PRL-SimCLR-SN
            where `train.method` is prl_l and `train.lipschitz` is set).
        pca: how principal components are found, for `train.denoise`.
        n_groups: groups of partitions that are trained side by side. Results do not depend on it.
        compute: device, precision, seed, threads.
        runner: threads, processes or ray: where groups of shards are worked on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...] = Field(min_length=1)
    test_shards: tuple[str, ...] = ()
    unlabelled_shards: tuple[str, ...] = ()
    index: IndexConfig = IndexConfig()
    simclr: SimCLRConfig | None = None
    train: TrainConfig = TrainConfig()
    partition: PartitionConfig | None = None
    pca: PCAConfig = PCAConfig()
    drop_scores: DropScorerConfig = DropScorerConfig()
    n_groups: int = Field(default=1, ge=1)
    compute: Compute = Compute()
    runner: RunnerConfig = Threads()

    @model_validator(mode="after")
    def _labels_are_where_they_are_needed(self) -> Self:
        if self.index.label is None:
            raise ConfigError("index.label=null reads no labels: name such shards under `unlabelled_shards:`")
        if self.unlabelled_shards and self.simclr is None:
            raise ConfigError("only `simclr:` learns from unlabelled_shards: give it a section, {} for its defaults")
        if self.partition is not None and self.simclr is not None:
            raise ConfigError("`partition:` trains on pixels alone: an encoder of all data would void its certificates")
        if self.partition is not None and self.train != TrainConfig():
            raise ConfigError("`partition:` trains in place of `train:`: leave one of them out")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*self.shards, *self.test_shards, *self.unlabelled_shards)


def train(config: TrainRunConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, pre-train, train, score the samples by how often they were dropped, package.

    Returns:
        Places and the last row of the history, for people and machines.
    """
    dataset = run.sharded("00-index", index_shards, list(find_shards(config.shards)), config.index, config.shards)
    test = index_more("01-index-test", config.test_shards, {}, config.index, dataset, run)
    if config.partition is not None:
        return _train_partitions(config.partition, dataset, test, config, run)
    encoder = None
    if config.simclr is not None:
        no_labels = {"label": None, "n_classes": 1}
        unlabelled = index_more("02-index-unlabelled", config.unlabelled_shards, no_labels, config.index, dataset, run)
        encoder = run.together("50-encoder", pretrain_simclr, config.simclr, dataset, unlabelled=unlabelled)
    pca = None
    if config.train.denoise is not None:
        pca = run.stage("55-pca", fit_pca, config.pca, dataset)
    more = {"test": test, "encoder": encoder, "pca": pca}
    model = run.together("60-model", train_robust, config.train, dataset, **more)
    result: dict[str, Any] = {"model": model.path, "history": model.url("history.parquet"), "last": model.history[-1]}
    if model.has_drops:
        scores = run.stage("61-drop-scores", drop_scores, config.drop_scores, model, dataset)
        result["drop_scores"] = scores.path
    result["package"] = run.stage(PACKAGE, package_model, model).path
    result["report"] = run.stage("90-report", write_training_report, model).url("index.html")
    return _finished(result, config, run)


def _train_partitions(
    partition: PartitionConfig, dataset: Dataset, test: Dataset | None, config: TrainRunConfig, run: Run
) -> dict[str, Any]:
    groups = list(partition.groups)
    ensemble = run.sharded("60-ensemble", train_partitions, groups, partition, dataset)
    certificates = []
    if test is not None:
        certificates = [run.stage("70-certificates", certify_partitions, ensemble, test)]
    return _finished(packaged(ensemble, certificates, run), config, run)


def packaged(model: Checkpoint, certificates: Sequence[Certificates], run: Run) -> dict[str, Any]:
    """The last steps of what ends in certificates: package and page; where they are, and what is proved."""
    package = run.stage(PACKAGE, package_model, model, certificates=certificates)
    report = run.stage("90-report", write_certificate_report, package)
    proved = package.read_json("certificate.json")["certificates"]
    return {"package": package.path, "certificates": proved, "report": report.url("index.html")}


def _finished(result: dict[str, Any], config: TrainRunConfig, run: Run) -> dict[str, Any]:
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def index_more(
    folder: str, sources: Sequence[str], changed: dict[str, Any], index: IndexConfig, dataset: Dataset, run: Run
) -> Dataset | None:
    """Other shards, indexed like those of `dataset`: their images have its size, their labels are of its classes.

    None where there are none.
    """
    if not sources:
        return None
    image = index.image.model_copy(update={"size": dataset.image_shape[1:]})
    same = index.model_copy(update={"n_classes": dataset.n_classes, "image": image} | changed)
    return run.sharded(folder, index_shards, list(find_shards(sources)), same, sources)


def run_train(config: TrainRunConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Train as a Prefect flow, or with plain function calls; both give the same digests.

    Of the processes that torchrun started, the first one is the run; the others help it to train.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    if world()[0] > 0:
        return train(config, Run(out, config.compute))
    if direct:
        with claimed(out, config.sources):
            return train(config, Run(out, config.compute, config.n_groups))
    from flows.tasks import train_flow  # imports Prefect: a second that --direct need not wait for

    return dict(train_flow(config, str(out)))
