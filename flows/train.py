"""Robust training: shards nobody can vouch for in, a model, its history and a suspicion of every sample out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flows.run import Run, save_config
from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import find_shards, refuse_inside
from sanitize.report import write_training_report
from sanitize.storage import exclusive
from sanitize.train import DropScorerConfig, TrainConfig, drop_scores, train_robust


class TrainRunConfig(BaseModel):
    """One training run; one YAML file.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards to learn from.
        test_shards: shards to measure the accuracy on after each epoch; nothing is learned from them.
        index, train, drop_scores: one section a stage.
        compute: device, precision, seed, threads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...] = Field(min_length=1)
    test_shards: tuple[str, ...] = ()
    index: IndexConfig = IndexConfig()
    train: TrainConfig = TrainConfig()
    drop_scores: DropScorerConfig = DropScorerConfig()
    compute: Compute = Compute()


def train(config: TrainRunConfig, run: Run) -> dict[str, Any]:
    """The order of work: index, train, and score the samples by how often they were dropped.

    Returns:
        Places and the last row of the history, for people and machines.
    """
    dataset = run.sharded("00-index", index_shards, list(find_shards(config.shards)), config.index, config.shards)
    test = None
    if config.test_shards:
        image = config.index.image.model_copy(update={"size": dataset.image_shape[1:]})
        same = config.index.model_copy(update={"n_classes": dataset.n_classes, "image": image})
        names = list(find_shards(config.test_shards))
        test = run.sharded("01-index-test", index_shards, names, same, config.test_shards)
    model = run.stage("60-model", train_robust, config.train, dataset, test=test)
    result: dict[str, Any] = {"model": model.path, "history": model.url("history.parquet"), "last": model.history[-1]}
    if model.has_drops:
        scores = run.stage("61-drop-scores", drop_scores, config.drop_scores, model, dataset)
        result["drop_scores"] = scores.path
    result["report"] = run.stage("90-report", write_training_report, model).url("index.html")
    save_config(config, run.out)
    run.save("finished", **result)
    return result


def run_train(config: TrainRunConfig, out: str | Path, direct: bool) -> dict[str, Any]:
    """Train as a Prefect flow, or with plain function calls; both give the same digests.

    Raises:
        SanitizeError: what the stages raise; ArtifactError if another process is at work on `out`.
    """
    refuse_inside((*config.shards, *config.test_shards), out)
    with exclusive(out):
        if direct:
            return train(config, Run(out, config.compute))
        from flows.tasks import train_flow  # imports Prefect: a second that --direct need not wait for

        return dict(train_flow(config, str(out)))


STAGES: Sequence[Any] = (index_shards, train_robust, drop_scores, write_training_report)
