"""Scores from robust training: how often a sample was dropped. Shapes: N usable samples."""

from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import first_rows, usable_rows
from sanitize.data.tables import Scores, write_rows
from sanitize.errors import ConfigError
from sanitize.stage import Advance, Work, stage
from sanitize.training.stage import RobustModel


class DropScorerConfig(BaseModel):
    """Score samples by the share of visits on which robust training dropped them.

    Attributes:
        prior: visits at the mean rate that are added to those of every sample, so that a sample dropped on 2 of 2
            visits does not score above one dropped on 19 of 20.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prl_drops"] = "prl_drops"
    prior: float = Field(default=1.0, ge=0)


@stage(Scores, version=2, gpu=False, draws="nothing")
def drop_scores(config: DropScorerConfig, model: RobustModel, dataset: Dataset, out: str, compute: Compute) -> Work:
    """Score every usable sample by the share of its visits, after the warm-up, on which it was dropped.

    Args:
        config: shrinkage of the shares.
        model: model trained on `dataset` by a method that drops samples.
        dataset: the samples to score.
        out: folder of the artifact.
        compute: unused; every stage takes it.

    Raises:
        ConfigError: the model was trained on other data, or by a method that drops no samples.
    """
    if model.manifest().recipe.inputs["dataset"] != dataset.digest:
        raise ConfigError(f"{model.path} was not trained on {dataset.path}: its counts belong to other samples")
    dropped_N, seen_N = model.drops()
    rate = float(dropped_N.sum()) / max(1, int(seen_N.sum()))
    scores_N = (dropped_N + config.prior * rate) / (seen_N + config.prior).clamp(min=1e-9)
    first = first_rows(dataset)

    def write_part(shard: str, part: Part, _advance: Advance) -> None:
        rows = usable_rows(dataset, shard)
        own_N = scores_N[first[shard] : first[shard] + len(rows)].float()
        if len(rows):
            write_rows(part, shard, rows.append_column("score", pa.array(own_N.numpy())))
        part.counts.update(samples=len(rows))

    def finish(part: Part, _builder: Any) -> None:
        info = {"config": config.model_dump(mode="json"), "rule": "fdr", "classes": {}, "exclude": []}
        part.write_json("scorer.json", info)

    return Work(parts=dataset.shards, write_part=write_part, finish=finish)
