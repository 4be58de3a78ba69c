"""Robust training: untrusted shards in, a model, its history and a score of every sample out."""

from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
from pydantic import model_validator

from sanitize.certification import Certificates, PartitionConfig, certify_partitions, train_partitions
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Scores
from sanitize.denoising import PCAConfig, fit_pca
from sanitize.embed import SimCLRConfig, pretrain_simclr
from sanitize.errors import ConfigError
from sanitize.jobs.job import RunConfig, job
from sanitize.jobs.result import ModelRun, table_of
from sanitize.jobs.run import Run
from sanitize.jobs.steps import index_found, index_more, leaks, packaged, with_facts
from sanitize.packaging import PACKAGE, package_model
from sanitize.report import write_training_report
from sanitize.training import DropScorerConfig, RobustModel, TrainConfig, drop_scores, train_robust


class TrainRunConfig(RunConfig):
    """Config of one training run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards to learn from.
        test_shards: shards to measure the accuracy on after each epoch; nothing is learned from them.
        unlabelled_shards: more images for `simclr`; labels are not read and may be missing.
        simclr: settings to pre-train an encoder with, without labels; `train` then learns the last layer alone
            (PRL-SimCLR-SN where `train.method` is prl_l and `train.lipschitz` is set). None does not pre-train.
        train, drop_scores: sections of the stages.
        partition: settings of an ensemble to train in place of the one model of `train`; its predictions on the test
            shards are certified against poisoned training samples. None trains one model.
        pca: principal components for `train.denoise`.
    """

    test_shards: tuple[str, ...] = ()
    unlabelled_shards: tuple[str, ...] = ()
    simclr: SimCLRConfig | None = None
    train: TrainConfig = TrainConfig()
    partition: PartitionConfig | None = None
    pca: PCAConfig = PCAConfig()
    drop_scores: DropScorerConfig = DropScorerConfig()

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

    @model_validator(mode="after")
    def _certificates_do_not_depend_on_the_data(self) -> Self:
        given: dict[str, Any] = {
            "index.n_classes=N": self.index.n_classes,
            "index.image.size=[H,W]": self.index.image.size,
        }
        if self.index.classes is not None:
            given["index.classes=[NAMES]"] = None if self.index.classes == "names" else self.index.classes
            given["index.n_classes=N"] = len(self.index.classes)
        missing = " and ".join(setting for setting, value in given.items() if value is None)
        if self.partition is not None and missing:
            raise ConfigError(
                "an ensemble of partitions is certified only where number of classes and image size do not depend on "
                f"the data: set {missing}"
            )
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """All shards that the job reads."""
        return (*self.shards, *self.test_shards, *self.unlabelled_shards)


@dataclass(frozen=True)
class TrainRun(ModelRun):
    """A finished run of `train`. With `partition` it has certificates and no history, otherwise no certificates."""

    kind = TrainRunConfig

    @property
    def history(self) -> list[dict[str, float]]:
        """One row an epoch: loss, dropped share, accuracy on training and test samples."""
        return RobustModel.load(self._in("60-model")).history

    @property
    def report(self) -> str:
        """Path or URL of the report page."""
        return self._page()

    def drop_scores(self) -> pa.Table:
        """One row a sample: shard, position, key, label, and score: how often training dropped the sample.

        Raises:
            ArtifactError: the method drops no samples.
        """
        return table_of(Scores.load(self._in("61-drop-scores")))

    def certificates(self) -> pa.Table:
        """One row a test sample of an ensemble: shard, position, key, label, prediction, radius, and the counts.

        Raises:
            ArtifactError: the run has no `partition`, or no test shards.
        """
        return table_of(Certificates.load(self._in("70-certificates")))


@job(TrainRunConfig, TrainRun)
def train(config: TrainRunConfig, run: Run) -> dict[str, Any]:
    """Train a robust model on untrusted shards.

    Stages: index, pre-train (with `simclr`), train, score samples by how often they were dropped, package, report. Of
    the processes that torchrun started, the first one runs all stages; the others take part in training alone.

    Returns:
        Places and the last row of the history.
    """
    index = with_facts(config.index, bool(config.test_shards))
    dataset = index_found("00-index", config.shards, index, run)
    test = index_more("01-index-test", config.test_shards, {}, index, dataset, run)
    n_leaks = leaks(dataset, test, run)
    if config.partition is not None:
        return _train_partitions(config.partition, dataset, test, n_leaks, config, run)
    encoder = None
    if config.simclr is not None:
        no_labels = {"label": None, "n_classes": 1, "classes": None}
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
    result["test_leaks"] = n_leaks
    result["package"] = run.stage(PACKAGE, package_model, model).path
    result["report"] = run.stage("90-report", write_training_report, model).url("index.html")
    return run.finish(config, result)


def _train_partitions(
    partition: PartitionConfig,
    dataset: Dataset,
    test: Dataset | None,
    n_leaks: int | None,
    config: TrainRunConfig,
    run: Run,
) -> dict[str, Any]:
    groups = list(partition.groups)
    ensemble = run.sharded("60-ensemble", train_partitions, groups, partition, dataset)
    certificates = []
    if test is not None:
        certificates = [run.stage("70-certificates", certify_partitions, ensemble, test)]
    return run.finish(config, packaged(ensemble, certificates, run) | {"test_leaks": n_leaks})
