"""The stage that measures the robustness of a model, with `evasion` and `leaking`."""

import io
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.data.chosen import chosen_images
from sanitize.data.dataset import Dataset
from sanitize.data.tables import verified_rows
from sanitize.denoising import PCA
from sanitize.errors import ConfigError, DataError
from sanitize.measure.evasion import EvasionConfig, smallest_perturbation
from sanitize.measure.leaking import gradient_leaking
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.pixels import OnPixels
from sanitize.progress import track
from sanitize.stage import Work, stage

_AT_ONCE = 128  # images between two moves of the progress bar
_N_RADII = 50


class RobustnessConfig(BaseModel):
    """Attack and images.

    Attributes:
        n_images: number of usable samples, chosen by a keyed hash and held in memory.
        attack: the attack; its radius is the largest perturbation tried.
        searches: bisections of the radius for each image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_images: int = Field(default=500, ge=1)
    attack: EvasionConfig = EvasionConfig(norm="l2", radius=3.0, loss="margin")
    searches: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _radius_is_small_enough(self) -> Self:
        if self.attack.norm == "linf" and self.attack.radius > 0.5:
            raise ConfigError(
                f"attack.radius={self.attack.radius}: in l-infinity .5 turns every image grey; give .05, for example"
            )
        return self


class Robustness(Artifact):
    """`robustness.json`: `summary`. `perturbations.parquet`: shard, position, key, label and length of the smallest
    perturbation found for each image: 0 for misclassified images, infinite where none was found."""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """samples, clean_accuracy; norm; accuracy: [[radius, share of samples without a smaller perturbation], ...];
        mean, median length over correctly classified samples (the largest radius where none was found); not_found:
        number of samples without one; gradient_norm, alpha: mean alpha_d for d = 1, 2, ..."""
        return self.read_object("robustness.json", "samples", "norm", "accuracy")

    def table(self) -> pa.Table:
        """One row an image."""
        return verified_rows(self, "perturbations.parquet")


@stage(Robustness)
def measure_robustness(
    config: RobustnessConfig, checkpoint: Checkpoint, dataset: Dataset, pca: PCA, out: str, compute: Compute
) -> Work:
    """Attack a model and measure its gradient leaking.

    The accuracy under attack is an upper bound of the robust accuracy; `certify` gives lower ones.

    Args:
        config: the attack and the number of images.
        checkpoint: the model.
        dataset: test samples.
        pca: principal components of the training images, or of similar ones.
        out: folder of the artifact.
        compute: device, precision, and seed of the choice and of random starts.

    Raises:
        DataError: there is no usable sample.
    """

    def write(part: Part) -> None:
        if not dataset.n_samples:
            raise DataError(f"{dataset.path} has no usable sample to attack")
        chosen = chosen_images(dataset, config.n_images, compute)
        model = OnPixels(checkpoint.model(), checkpoint.config)
        with track("attack", len(chosen.keys), "images") as advance:
            lengths = []
            for start in range(0, len(chosen.keys), _AT_ONCE):
                rows = slice(start, start + _AT_ONCE)
                images_BCHW, labels_B = chosen.images_NCHW[rows], chosen.labels_N[rows]
                lengths.append(
                    smallest_perturbation(model, images_BCHW, labels_B, config.attack, compute, config.searches)
                )
                advance(len(labels_B))
        lengths_N = torch.cat(lengths)
        leaking = gradient_leaking(model, chosen.images_NCHW, chosen.labels_N, pca.components.vectors_DR, compute)
        part.write_json(
            "robustness.json",
            {"gradient_norm": leaking.gradient_norm, "alpha": leaking.alpha_R.tolist(), "norm": config.attack.norm}
            | summarise(lengths_N, config.attack.radius),
        )
        table = pa.table(
            {
                "shard": chosen.shards,
                "position": chosen.positions,
                "key": chosen.keys,
                "label": chosen.labels_N.numpy(),
                "length": lengths_N.numpy(),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        part.write("perturbations.parquet", sink.getvalue())
        part.counts.update(samples=len(lengths_N), wrong=int((lengths_N == 0).sum()))

    return Work(write=write)


def summarise(lengths_N: Tensor, largest: float) -> dict[str, Any]:
    """Statistics of the smallest perturbations: see `Robustness.summary`."""
    right_n = lengths_N[lengths_N > 0]
    at_most_n = right_n.clamp(max=largest)
    radii = [largest * i / _N_RADII for i in range(_N_RADII + 1)]
    return {
        "samples": len(lengths_N),
        "clean_accuracy": len(right_n) / len(lengths_N),
        "accuracy": [[radius, float((lengths_N > radius).double().mean())] for radius in radii],
        "mean": float(at_most_n.mean()) if len(right_n) else None,
        "median": float(np.median(at_most_n)) if len(right_n) else None,
        "not_found": int(right_n.isinf().sum()),
    }
