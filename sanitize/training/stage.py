"""Train a robust model on a data set that may be corrupted.

Shapes: N usable samples, in the order of shards and positions.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import buffer_bytes, first_rows, usable_rows
from sanitize.data.tables import verified_rows
from sanitize.denoising import PCA, PCANoise, PCANoiseConfig
from sanitize.distributed import total, world
from sanitize.errors import ConfigError
from sanitize.fit import ClassifierConfig, fit_classifier, snapshots_of
from sanitize.loop import OptimConfig, predict
from sanitize.measure import count_correct
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.snapshots import Snapshots
from sanitize.stage import Work, stage
from sanitize.training.adversary import InputSpace
from sanitize.training.collaborate import Pair
from sanitize.training.method import Drops, MethodConfig, robust_objective
from sanitize.training.probe import Probe


class TrainConfig(ClassifierConfig):
    """A network and how it is trained.

    Attributes:
        architecture: the network. For methods that need gradients of single samples (prl_g, max_sample_grad_norm),
            GroupNorm replaces BatchNorm, in the recipe and in the description of the model.
        mean, std, optim, augment, cache_bytes: as in `ClassifierConfig`.
        denoise: PCA-noise, with new noise in every step; needs the components of the training images. Test images
            are not changed.
        method: ingredients of robust training; docs/methods.md names the combinations.
        mmc_scale: length of the centres for `method.loss: mmc`. Logits grow with its square; for TRADES, which compares
            logits, use at most about 2.
        lipschitz: bound on the largest singular value of the last Linear (Algorithm 7); None sets no bound.
        snapshot_every: steps between two snapshots; a killed run resumes from the last one. Snapshots are kept on a
            disk, not in an object store.
    """

    optim: OptimConfig = OptimConfig(epochs=30)
    denoise: PCANoiseConfig | None = None
    method: MethodConfig = MethodConfig()
    mmc_scale: float = Field(default=10.0, gt=0)
    lipschitz: float | None = Field(default=None, gt=0)
    snapshot_every: int = Field(default=500, ge=1)

    @model_validator(mode="after")
    def _gradients_are_those_of_the_weights(self) -> Self:
        if self.method.loss == "mmc" and self.lipschitz is not None:
            raise ConfigError("lipschitz bounds the last layer, and loss=mmc has none: leave lipschitz out")
        if self.lipschitz is not None and self.method.needs_sample_gradients:
            raise ConfigError("lipschitz cannot be combined with prl_g or max_sample_grad_norm: leave one of them out")
        return self


class RobustModel(Checkpoint):
    """A Checkpoint with `history.parquet`, one row an epoch, and `drops.safetensors`: counts `dropped` and `seen` (N,),
    int32, of each usable sample after the warm-up."""

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """One row an epoch: loss, share dropped and accuracy on the training samples, and `test_accuracy`."""
        rows: list[dict[str, float]] = verified_rows(self, "history.parquet").to_pylist()
        return rows

    @property
    def has_drops(self) -> bool:
        """True if the method dropped samples."""
        return "drops.safetensors" in self.manifest().files

    def drops(self) -> tuple[Tensor, Tensor]:
        """dropped_N and seen_N. Raises ConfigError if the method drops no samples."""
        if not self.has_drops:
            raise ConfigError(f"{self.path} was trained without dropping samples: set train.method.select_batch")
        counts = self.read_tensors("drops.safetensors", "dropped", "seen")
        return counts["dropped"], counts["seen"]


@stage(RobustModel, version=2)
def train_robust(
    config: TrainConfig,
    dataset: Dataset,
    out: str,
    compute: Compute,
    test: Dataset | None = None,
    encoder: Checkpoint | None = None,
    pca: PCA | None = None,
) -> Work:
    """Train a robust model; all processes of torchrun call this stage, and the first one writes.

    Args:
        config: network and method.
        dataset: training samples; only usable ones are read.
        out: folder of the artifact.
        compute: device, precision, seed.
        test: samples for the accuracy after each epoch; they are not trained on.
        encoder: pre-trained network; its weights before the last Linear are used and stay fixed (Algorithm 7).
        pca: components of the images of `dataset`, for `config.denoise`.

    Raises:
        NumericsError: training diverged; the message names the step and its samples.
        ConfigError: the method does not suit the task or the network, or the encoder is another network.
    """
    if not config.method.classifies:
        raise ConfigError(f"train.method.loss={config.method.loss}: shards have class labels; set cross_entropy or mmc")
    if (config.denoise is None) != (pca is None):
        raise ConfigError("train.denoise needs the PCA of the images: give both or neither")
    model_config = _model_config(config, dataset, encoder)

    def fit() -> _Fitted:
        compute.seed_global("train", "init")
        networks = [_network(config, model_config, encoder) for _ in range(config.method.n_networks)]
        model = networks[0] if len(networks) == 1 else Pair(*networks)
        drops = Drops(dataset.n_samples, compute.torch_device)
        snapshots = snapshots_of(out, config.snapshot_every)
        history = _train(model, model_config, drops, config, dataset, test, pca, snapshots, compute)
        network = networks[0].finished() if isinstance(networks[0], Probe) else networks[0]
        return _Fitted(network, history, total(drops.dropped_N).cpu(), total(drops.seen_N).cpu())

    def write(part: Part, fitted: _Fitted) -> None:
        write_checkpoint(part, fitted.network, model_config, fitted.history)
        part.write("history.parquet", _parquet(pa.Table.from_pylist(fitted.history)))
        if int(fitted.seen_N.sum()):
            counts = {"dropped": fitted.dropped_N, "seen": fitted.seen_N}
            part.write("drops.safetensors", safetensors.torch.save(counts))
        part.counts.update(samples=dataset.n_samples)

    own = partial(RobustModel.of_own, architecture=config.architecture)
    # The order of samples depends on the size of the buffer, not on cache_bytes if all images fit.
    settings = config.model_dump(mode="json", exclude={"snapshot_every", "cache_bytes"})
    settings["buffer_bytes"] = buffer_bytes(dataset, config.cache_bytes)
    return Work(fit=fit, write_fitted=write, handle=own, config=settings)


class _Fitted(NamedTuple):
    """Result of the training: the network, its history, and counts of each sample."""

    network: nn.Module
    history: list[dict[str, float]]
    dropped_N: Tensor
    seen_N: Tensor


def _model_config(config: TrainConfig, dataset: Dataset, encoder: Checkpoint | None) -> ModelConfig:
    """Description of the network. Raises ConfigError if the encoder is another network."""
    model_config = config.describe(
        dataset,
        # The BatchNorm of a frozen encoder is in eval mode and mixes no samples.
        group_norm=config.method.needs_sample_gradients and encoder is None,
        mmc=config.mmc_scale if config.method.loss == "mmc" else None,
    )
    if encoder is not None:
        wanted, there = (one.model_dump(exclude={"n_classes", "class_names"}) for one in (model_config, encoder.config))
        if differing := [name for name, value in wanted.items() if value != there[name]]:
            raise ConfigError(
                f"{encoder.path} and `train` differ in {', '.join(differing)}: give both sections the same"
            )
    return model_config.with_names(dataset.class_names)


def _network(config: TrainConfig, model_config: ModelConfig, encoder: Checkpoint | None) -> nn.Module:
    network = model_config.build()
    if encoder is None and config.lipschitz is None:
        return network
    return Probe(network, model_config, encoder, config.lipschitz)


def _train(
    model: nn.Module,
    model_config: ModelConfig,
    drops: Drops,
    config: TrainConfig,
    dataset: Dataset,
    test: Dataset | None,
    pca: PCA | None,
    snapshots: Snapshots | None,
    compute: Compute,
) -> list[dict[str, float]]:
    generators = {name: compute.generator("train", name, world()[0]) for name in ("augment", "denoise", "adversary")}
    channels = dataset.image_shape[0]
    mean, std = (values * channels if len(values) == 1 else values for values in (config.mean, config.std))
    objective = robust_objective(config.method, compute, InputSpace.images(mean, std), drops, generators["adversary"])
    held_out = _held_out(test, config.cache_bytes) if test else None

    def measure(network: nn.Module) -> dict[str, float]:
        if test is None or held_out is None:
            return {}
        logits = partial(predict, network, transform=model_config.normalise, compute=compute)
        (correct,) = count_correct([logits], held_out(), test.n_classes)
        return {"test_accuracy": correct.share}

    return fit_classifier(
        model,
        model_config,
        config,
        dataset,
        compute,
        description="train",
        stream="train",
        generator=generators["augment"],
        pixels=_pixels(config.denoise, pca, generators["denoise"], compute),
        objective=objective,
        measure=measure,
        snapshots=snapshots,
        carried=generators | {"dropped": drops.dropped_N, "seen": drops.seen_N},
        name_of=partial(_name_of, dataset),
    )


def _pixels(
    config: PCANoiseConfig | None, pca: PCA | None, generator: torch.Generator, compute: Compute
) -> Callable[[Tensor], Tensor]:
    """Function from uint8 images to training images on [0, 1]."""
    if config is None or pca is None:
        return lambda images_BCHW: images_BCHW.float() / 255
    modify = PCANoise(config, pca.components, compute.torch_device)

    def modified(images_BCHW: Tensor) -> Tensor:
        xi_Bm = torch.randn(len(images_BCHW), modify.n_noise, generator=generator).to(images_BCHW.device)
        return modify(images_BCHW.float() / 255, xi_Bm)

    return modified


def _held_out(test: Dataset, cache_bytes: int) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    """Function that returns batches of images and labels; decoded once if they fit into `cache_bytes`."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.images_BCHW, batch.labels_B) for batch in test.batches(512))

    held = list(batches()) if buffer_bytes(test, cache_bytes) is None else None
    return batches if held is None else lambda: held


def _name_of(dataset: Dataset, row: int) -> str:
    """SHARD/KEY of a usable sample by its row."""
    first = first_rows(dataset)
    place = bisect_right(list(first.values()), row) - 1  # the last shard that begins there: earlier ones are empty
    shard = list(first)[place]
    return f"{shard}/{usable_rows(dataset, shard)['key'][row - first[shard]]}"


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
