"""Condense a data set.

images, labels = sanitize.load_condensed("runs/condense/70-condensed")     # normalised float32, int64
"""

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.condensation.distribution_matching import Condensed, MatchingConfig, condense, to_pixels
from sanitize.condensation.evaluate import EvaluateConfig, learn_from
from sanitize.condensation.pool import Pool, fill_pool
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.writer import shard_writer
from sanitize.errors import ArtifactError
from sanitize.fit import snapshots_of
from sanitize.loop import predict
from sanitize.measure import count_correct
from sanitize.models.config import ModelConfig
from sanitize.progress import track
from sanitize.snapshots import training
from sanitize.stage import Work, stage

SHARD = "shards/condensed-0000.tar"  # its own folder: Hugging Face `datasets` reads .json files beside shards as data
_GRID_COLUMNS = 10


class CondenseConfig(BaseModel):
    """Settings of the condensation.

    Attributes:
        matching: condensed images and their optimisation.
        pool_bytes: bytes of uint8 pixels of real images, held on the device; a larger data set is sampled, with the
            same share for each class.
        evaluate: training of networks on the condensed set, if there is a test set.
        snapshot_every: iterations between two snapshots; a killed run resumes from the last one, and without one the
            optimisation begins again. Snapshots are kept on a disk, not in an object store.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    matching: MatchingConfig = MatchingConfig()
    pool_bytes: int = Field(default=2**30, gt=0)
    evaluate: EvaluateConfig = EvaluateConfig()
    snapshot_every: int = Field(default=500, ge=1)


class CondensedSet(Artifact):
    """`condensed.safetensors`: `images` (N, C, H, W) float32 in normalised units, class by class; `labels` (N,), int64.
    `shards/condensed-0000.tar`: for each image KEY.png (8 bit), KEY.npy (the exact floats) and KEY.cls. `grid.png`: up
    to ten images a class, one class a row. `frames/NNNNNNNN.png`: the first ten classes after so many iterations, from
    the initial noise to the end. `dataset.json`: description and settings. `history.json`: the loss."""

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images and labels, exact."""
        tensors = self.read_tensors("condensed.safetensors", "images", "labels")
        images_NCHW, labels_N = tensors["images"], tensors["labels"]
        if images_NCHW.ndim != 4 or labels_N.shape != images_NCHW.shape[:1] or not images_NCHW.isfinite().all():
            raise ArtifactError(f"{self.path} does not hold finite images (N, C, H, W) with one label each")
        return images_NCHW, labels_N

    @property
    def info(self) -> dict[str, Any]:
        """dataset.json."""
        return self.read_object("dataset.json")

    @property
    def frames(self) -> dict[int, bytes]:
        """Iteration -> PNG, from the first to the last."""
        names = sorted(name for name in self.manifest().files if name.startswith("frames/"))
        return {int(name.removeprefix("frames/").removesuffix(".png")): self.read(name) for name in names}


def load_condensed(path: str | Path) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W), float32 in normalised units, and labels (N,), int64, of a condensed set.

    Raises:
        ArtifactError: there is no condensed set, or it does not match its manifest.
    """
    return CondensedSet.load(path).tensors()


@stage(CondensedSet, version=4)
def condense_dataset(
    config: CondenseConfig, dataset: Dataset, out: str, compute: Compute, test: Dataset | None = None
) -> Work:
    """Learn a few images a class from a data set, robust to poison in it.

    Args:
        config: settings.
        dataset: the untrusted data; usable samples are read in one pass.
        out: folder of the artifact.
        compute: device, precision, seed.
        test: samples for the accuracy of networks trained on the condensed set; nothing is chosen by them.

    Raises:
        DataError: a class has no usable sample.
        ConfigError: `pool_bytes` does not hold one image of each class.
        NumericsError: matching or training diverged.
    """

    def write(part: Part) -> None:
        pool, *held_out = fill_pool(dataset, config.pool_bytes, compute).hold_out(config.evaluate.held_out)
        snapshots = snapshots_of(out, config.snapshot_every)
        with track("condense", config.matching.iterations, "iterations") as advance, training(snapshots):
            condensed = condense(
                config.matching,
                pool,
                compute,
                snapshots,
                advance,
                lambda row: advance.note(f"loss {row['loss']:.4g}"),
            )
        images_NCHW = condensed.images_KMCHW.flatten(0, 1)
        labels_N = torch.arange(dataset.n_classes).repeat_interleave(config.matching.images_per_class)
        accuracies = (
            _measure(images_NCHW, labels_N, (held_out[0], held_out[1]), test, config, compute)
            if test is not None
            else None
        )
        _write(part, condensed, images_NCHW, labels_N, config.matching)
        part.write_json("dataset.json", _description(part, labels_N, pool, dataset, config, accuracies))
        part.counts.update(images=len(images_NCHW), pool=int(pool.count_K.sum()))

    return Work(write=write, config=config.model_dump(mode="json", exclude={"snapshot_every"}))


def _model_config(config: MatchingConfig, n_classes: int, image_shape: tuple[int, ...]) -> ModelConfig:
    channels, height, width = image_shape
    return ModelConfig(
        architecture=config.architecture,
        n_classes=n_classes,
        image_shape=(channels, height, width),
        mean=config.mean,
        std=config.std,
    )


def _measure(
    images_NCHW: Tensor,
    labels_N: Tensor,
    held_out: tuple[Tensor, Tensor],
    test: Dataset,
    config: CondenseConfig,
    compute: Compute,
) -> list[float]:
    """Test accuracy of new networks trained on the condensed set."""
    model_config = _model_config(config.matching, test.n_classes, test.image_shape)
    accuracies = []
    with track("evaluate", config.evaluate.n_networks, "networks") as advance:
        for number in range(config.evaluate.n_networks):
            model = learn_from(images_NCHW, labels_N, held_out, config.evaluate, model_config, number, compute)
            logits = partial(predict, model, transform=model_config.normalise, compute=compute)
            batches = ((batch.images_BCHW, batch.labels_B) for batch in test.batches(512))
            accuracies.append(count_correct([logits], batches, test.n_classes)[0].share)
            advance(1)
    return accuracies


def _write(part: Part, condensed: Condensed, images_NCHW: Tensor, labels_N: Tensor, config: MatchingConfig) -> None:
    """Write all files except `dataset.json`."""
    part.write("condensed.safetensors", safetensors.torch.save({"images": images_NCHW, "labels": labels_N}))
    pixels_NCHW = to_pixels(images_NCHW, config)
    with shard_writer(part, SHARD) as tar:
        for i, label in enumerate(labels_N.tolist()):
            key = f"{label:04d}-{i % config.images_per_class:04d}"
            exact = io.BytesIO()
            np.save(exact, images_NCHW[i].numpy(), allow_pickle=False)
            tar.add(f"{key}.png", encode_png(pixels_NCHW[i]))
            tar.add(f"{key}.npy", exact.getvalue())
            tar.add(f"{key}.cls", str(label).encode())
    part.write("grid.png", encode_png(grid(pixels_NCHW.unflatten(0, condensed.images_KMCHW.shape[:2]))))
    for iteration, pixels_KMCHW in condensed.frames.items():
        part.write(f"frames/{iteration:08d}.png", encode_png(grid(pixels_KMCHW)))
    part.write_json("history.json", condensed.history)


def grid(pixels_KMCHW: Tensor) -> Tensor:
    """One image (C, H', W') of up to ten images a class, one class a row, two white pixels apart."""
    framed_KMCHW = torch.nn.functional.pad(pixels_KMCHW[:, :_GRID_COLUMNS], [1, 1, 1, 1], value=255)
    rows, columns, channels, height, width = framed_KMCHW.shape
    return framed_KMCHW.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)


def _description(
    part: Part, labels_N: Tensor, pool: Pool, dataset: Dataset, config: CondenseConfig, accuracies: list[float] | None
) -> dict[str, Any]:
    """The content of `dataset.json`."""
    shard, matching = part.files[SHARD], config.matching
    return {
        "format": 1,
        "n_classes": dataset.n_classes,
        **({"class_names": {str(y): name for y, name in names.items()}} if (names := dataset.class_names) else {}),
        "labels": {str(label): count for label, count in enumerate(labels_N.bincount().tolist())},
        "image": {"shape": dataset.image_shape, "mean": matching.mean, "std": matching.std},
        "shards": {SHARD: {"samples": len(labels_N), "size": shard.size, "sha256": shard.sha256}},
        "matching": matching.model_dump(mode="json"),
        "real_images": {str(label): count for label, count in enumerate(pool.count_K.tolist())},
        "utility": None
        if accuracies is None
        else {"test_accuracy": accuracies, "config": config.evaluate.model_dump(mode="json")},
        "made_from": {"dataset": dataset.digest},
    }
