"""Robust training: shards nobody can vouch for in, a model, its history and a suspicion of every sample out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.run import Run, save_config
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards, refuse_inside
from sanitize.distributed import world
from sanitize.embed import SimCLRConfig, pretrain_simclr
from sanitize.errors import ConfigError
from sanitize.report import write_training_report
from sanitize.storage import exclusive
from sanitize.train import DropScorerConfig, TrainConfig, drop_scores, train_robust


class TrainRunConfig(BaseModel):
    """One training run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards to learn from.
        test_shards: shards to measure the accuracy on after each epoch; nothing is learned from them.
        unlabelled_shards: more images for `simclr`; their labels are not read, and need not be there.
        index, train, drop_scores: one section a stage.
        simclr: given, an encoder is pre-trained without labels, and `train` learns its last layer alone (PRL-SimCLR-SN
            where `train.method` is prl_l and `train.lipschitz` is set).
        compute: device, precision, seed, threads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...] = Field(min_length=1)
    test_shards: tuple[str, ...] = ()
    unlabelled_shards: tuple[str, ...] = ()
    index: IndexConfig = IndexConfig()
    simclr: SimCLRConfig | None = None
    train: TrainConfig = TrainConfig()
    drop_scores: DropScorerConfig = DropScorerConfig()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _labels_are_where_they_are_needed(self) -> Self:
        if self.index.label is None:
            raise ConfigError("index.label=null reads no labels: name such shards under `unlabelled_shards:`")
        if self.unlabelled_shards and self.simclr is None:
            raise ConfigError("only `simclr:` learns from unlabelled_shards: give it a section, {} for its defaults")
        return self


def train(config: TrainRunConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, pre-train, train, and score the samples by how often they were dropped.

    Returns:
        Places and the last row of the history, for people and machines.
    """
    dataset = run.sharded("00-index", index_shards, list(find_shards(config.shards)), config.index, config.shards)
    test = _index_more("01-index-test", config.test_shards, {}, config, dataset, run)
    encoder = None
    if config.simclr is not None:
        no_labels = {"label": None, "n_classes": 1}
        unlabelled = _index_more("02-index-unlabelled", config.unlabelled_shards, no_labels, config, dataset, run)
        encoder = run.together("50-encoder", pretrain_simclr, config.simclr, dataset, unlabelled=unlabelled)
    model = run.together("60-model", train_robust, config.train, dataset, test=test, encoder=encoder)
    result: dict[str, Any] = {"model": model.path, "history": model.url("history.parquet"), "last": model.history[-1]}
    if model.has_drops:
        scores = run.stage("61-drop-scores", drop_scores, config.drop_scores, model, dataset)
        result["drop_scores"] = scores.path
    result["report"] = run.stage("90-report", write_training_report, model).url("index.html")
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def _index_more(
    folder: str, sources: Sequence[str], changed: dict[str, Any], config: TrainRunConfig, dataset: Dataset, run: Run
) -> Dataset | None:
    """Other shards, indexed like those of `dataset`: their images have its size, their labels are of its classes."""
    if not sources:
        return None
    image = config.index.image.model_copy(update={"size": dataset.image_shape[1:]})
    same = config.index.model_copy(update={"n_classes": dataset.n_classes, "image": image} | changed)
    return run.sharded(folder, index_shards, list(find_shards(sources)), same, sources)


def run_train(config: TrainRunConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Train as a Prefect flow, or with plain function calls; both give the same digests.

    Of the processes that torchrun started, the first one is the run; the others help it to train.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    refuse_inside((*config.shards, *config.test_shards, *config.unlabelled_shards), out)
    if world()[0] > 0:
        return train(config, Run(out, config.compute))
    with exclusive(out):
        if direct:
            return train(config, Run(out, config.compute))
        from flows.tasks import train_flow  # imports Prefect: a second that --direct need not wait for

        return dict(train_flow(config, str(out)))


STAGES: Sequence[Any] = (index_shards, pretrain_simclr, train_robust, drop_scores, write_training_report)
