"""Train the base models of Deep Partition Aggregation, many at once.

What the certificate of `partition` needs: a base model is a function of the content of its own partition. So samples
come in the order of their digests, seeds are those of the partition, and every shape (steps, batches, how many networks
are stacked) is a setting and not a count of samples. Shapes: M networks of a group, N their samples, B batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any, Literal, NamedTuple, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, nn

from sanitize.artifacts import ArtifactBuilder, Part
from sanitize.certify.partition import content_digest, partition_of
from sanitize.certify.provenance import refuse_if_void
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.tables import EmbeddingBatch
from sanitize.distributed import world
from sanitize.embed.label_free import oriented_gradients
from sanitize.errors import ConfigError
from sanitize.loop import Objective, OptimConfig, Step, TrainBatch, train
from sanitize.models.checkpoint import Architecture, Checkpoint, ModelConfig, refuse_misfits
from sanitize.models.mlp import MLPConfig
from sanitize.models.sizes import MAX_NETWORKS
from sanitize.models.stacked import Stacked
from sanitize.progress import track
from sanitize.score import LabelMarginConfig, NeighboursConfig, SpectralConfig
from sanitize.stage import Advance, Work, stage

PROVED = "partitions.json"
_NO_LABEL = -100  # what cross_entropy ignores
_INITIALISING = Lock()  # groups may be trained in threads, and layers draw their weights from a generator for all


class PartitionFilterConfig(BaseModel):
    """A filter that sees one partition at a time, and so changes no certificate.

    Attributes:
        scorer: what judges a sample among those of its partition, by its oriented gradients.
        contamination: share of the samples of each partition that is left out, the most suspicious first.
        cells: of the grid of oriented gradients, a side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["per_partition"] = "per_partition"
    scorer: LabelMarginConfig | NeighboursConfig | SpectralConfig = Field(
        default=LabelMarginConfig(), discriminator="kind"
    )
    contamination: float = Field(default=0.1, gt=0, lt=0.5)
    cells: int = Field(default=4, ge=1)


class PartitionConfig(BaseModel):
    """An ensemble whose predictions are certified against poisoned training data.

    Attributes:
        n_partitions: k; more of them certify more poisoned samples, at the price of less data for each base model. No
            radius is larger than k / 2, and with two partitions one sample decides: they are refused.
        key: of the hash that divides the samples.
        architecture: of the base models.
        mean, std: normalisation of each channel on the scale [0, 1].
        optim: how each base model is trained; what acts on all of them together (max_grad_norm) is refused.
        steps_per_epoch: batches of `optim.batch_size` samples that each base model sees in an epoch; a number, because
            it must not depend on the data.
        group_size: base models that are trained side by side; their samples are held in memory.
        filter: what is left out of each partition.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_partitions: int = Field(default=50, ge=1, le=MAX_NETWORKS)
    key: str = "sanitize"
    architecture: Architecture = MLPConfig(widths=(64,))
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)
    optim: OptimConfig = OptimConfig(optimizer="adam", learning_rate=2e-3, weight_decay=1e-3, epochs=30, batch_size=25)
    steps_per_epoch: int = Field(default=8, ge=1)
    group_size: int = Field(default=250, ge=1)
    filter: PartitionFilterConfig | None = None

    @model_validator(mode="after")
    def _something_can_be_certified(self) -> Self:
        if self.n_partitions < 3:
            raise ConfigError(
                f"with {self.n_partitions} partitions one poisoned sample decides between two classes: take 3 or more. "
                "The largest radius there can be is half of them, rounded down, in training samples"
            )
        return self

    @property
    def groups(self) -> dict[str, range]:
        """Name and partitions of each group."""
        starts = range(0, self.n_partitions, self.group_size)
        ranges = (range(start, min(start + self.group_size, self.n_partitions)) for start in starts)
        return {f"{of.start:05d}-{of.stop - 1:05d}": of for of in ranges}


class PartitionEnsemble(Checkpoint):
    """A Checkpoint in pieces: `config.json` and `groups/GROUP.safetensors`; `partitions.json`: what its votes prove;
    `groups/GROUP.json`: the history of each group, and of each partition how many samples it has and how many its base
    model was trained on."""

    def weight_files(self) -> list[str]:
        """One a group, in the order of the partitions."""
        return sorted(name for name in self.manifest().files if name.endswith(".safetensors"))

    def _state(self, expected: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The weights of all groups, stacked."""
        states = [self.read_tensors(name) for name in self.weight_files()]
        first_rows = [
            {f"networks.{name}": tensor[:1] if tensor.ndim else tensor for name, tensor in state.items()}
            for state in states
        ]
        one = first_rows[0] if expected is None else {name: tensor[:1] for name, tensor in expected.items()}
        for file, rows in zip(self.weight_files(), first_rows, strict=True):
            refuse_misfits(one, rows, self.url(file))
        return {f"networks.{name}": torch.cat([state[name] for state in states]) for name in states[0]}


@stage(PartitionEnsemble, version=2)
def train_partitions(
    config: PartitionConfig, dataset: Dataset, out: str, compute: Compute, shards: Sequence[str] | None = None
) -> Work:
    """Train one base model on each partition.

    Args:
        config: partitions and base models.
        dataset: the untrusted samples. Memory: those of one group of partitions.
        out: folder of the artifact.
        compute: device, precision, seed.
        shards: names of groups of partitions (`PartitionConfig.groups`) to do now; None does all that are missing and
            finishes.

    Raises:
        ConfigError: what was done before voids the certificate; or settings that do not go with stacked networks.
        NumericsError: training diverged.
    """
    if config.optim.max_grad_norm is not None:
        raise ConfigError("partition.optim.max_grad_norm would make each base model depend on all: leave it out")
    if world()[1] > 1:
        raise ConfigError(
            "base models share no batches: run without torchrun, groups of partitions side by side (n_groups)"
        )
    refuse_if_void(dataset)
    model_config = ModelConfig(
        architecture=config.architecture,
        group_norm=True,
        n_classes=dataset.n_classes,
        image_shape=dataset.image_shape,
        mean=config.mean,
        std=config.std,
        n_networks=config.n_partitions,
    )

    def write_part(group: str, part: Part, _advance: Advance) -> None:
        networks, history, counts = _train_group(config, model_config, config.groups[group], dataset, compute)
        part.write(f"groups/{group}.safetensors", safetensors.torch.save(networks.state_dict()))
        part.write_json(f"groups/{group}.json", {"history": history, "partitions": counts})
        part.counts.update({name: sum(of[name] for of in counts) for name in ("samples", "trained_on")})

    def finish(part: Part, workshop: ArtifactBuilder) -> None:
        n_samples = workshop.counts(list(config.groups))["samples"]
        part.write_json("config.json", model_config.model_dump(mode="json"))
        part.write_json(PROVED, _proved(config, dataset, n_samples))

    own = partial(PartitionEnsemble.of_own, architecture=config.architecture)
    return Work(parts=list(config.groups), write_part=write_part, finish=finish, handle=own)


def _proved(config: PartitionConfig, dataset: Dataset, n_samples: int) -> dict[str, Any]:
    """What a vote of these base models proves, and about what: the statement of its certificates."""
    return {
        "kind": "partitions",
        "source": "Deep Partition Aggregation, Levine & Feizi 2021",
        "radius_unit": "training samples",
        "integral": True,
        "open": False,
        "confidence": 1.0,
        "largest_radius": config.n_partitions // 2,
        "parameters": config.model_dump(mode="json", include={"n_partitions", "key", "filter"}),
        "scope": {
            "threat": "poisoned training data",
            "statement": (
                "A prediction stays what it is while no more training samples than its radius are inserted into the "
                "training set or removed from it, whichever they are, and training is repeated with the same settings "
                "and seed. A sample that is changed counts twice: one is removed, one inserted. With "
                f"{config.n_partitions} partitions no radius can be larger than {config.n_partitions // 2}."
            ),
            "training_set": {"dataset": dataset.digest, "samples": n_samples},
            "filter": "inside each partition" if config.filter else "none",
            "not_covered": [
                "changes of the image that is classified",
                "damage to a shard, beyond the number of samples that it makes unreadable",
                "other roundings, where training is repeated on other hardware or with other versions",
            ],
        },
    }


class _Partition(NamedTuple):
    """What one base model is trained on, in the order of the digests; n_all is their number before the filter."""

    images_NCHW: Tensor
    labels_N: Tensor
    n_all: int


def _train_group(
    config: PartitionConfig, model_config: ModelConfig, numbers: range, dataset: Dataset, compute: Compute
) -> tuple[Stacked, list[dict[str, float]], list[dict[str, int]]]:
    """The base models of a group, their history, and the sizes of its partitions."""
    partitions = _gather(config, numbers, dataset)
    if config.filter is not None:
        partitions = [_filtered(config.filter, of, compute) for of in partitions]
    counts = [{"samples": of.n_all, "trained_on": len(of.labels_N)} for of in partitions]
    samples = [(of.images_NCHW, of.labels_N) for of in partitions]
    networks, history = fit_networks(config, model_config, numbers, samples, compute)
    return networks, history, counts


def fit_networks(
    config: PartitionConfig,
    model_config: ModelConfig,
    numbers: Sequence[int],
    samples: Sequence[tuple[Tensor, Tensor]],
    compute: Compute,
) -> tuple[Stacked, list[dict[str, float]]]:
    """Train base models side by side.

    Args:
        config: how.
        model_config: of one of them.
        numbers: of their partitions.
        samples: of each its images (n, C, H, W), uint8, and labels (n,); there may be none.
        compute: device, precision, seed.

    Returns:
        The networks, and the means over them of loss and accuracy in each epoch.
    """
    networks = stacked_networks(model_config, numbers, compute)
    data = PartitionBatches(samples, numbers, config.optim.batch_size, config.steps_per_epoch, compute)
    with track(f"train {len(numbers)} partitions", config.optim.epochs * data.samples_per_epoch) as advance:
        history = train(
            networks,
            data.epoch,
            config.steps_per_epoch,
            config.optim,
            compute,
            model_config.normalise,
            lambda n: advance(n * len(numbers)),
            side_by_side(compute),
            unit=model_config.pixel_unit,
        )
    return networks, history


def _gather(config: PartitionConfig, numbers: range, dataset: Dataset) -> list[_Partition]:
    """Read the whole data set, and keep what belongs to these partitions."""
    found: list[list[tuple[bytes, Tensor, int]]] = [[] for _ in numbers]
    key = config.key.encode()
    with track(f"read partitions {numbers.start}-{numbers.stop - 1}", dataset.n_samples) as advance:
        for batch in dataset.batches(512):
            for image_CHW, label in zip(batch.images_BCHW, batch.labels_B.tolist(), strict=True):
                digest = content_digest(image_CHW, label, key)
                number = partition_of(digest, config.n_partitions)
                if number in numbers:
                    found[number - numbers.start].append((digest, image_CHW.clone(), label))
            advance(len(batch.keys))
    nothing = torch.zeros(0, *dataset.image_shape, dtype=torch.uint8)
    partitions = []
    for of in found:
        of.sort(key=lambda sample: sample[0])
        images_NCHW = torch.stack([image for _, image, _ in of]) if of else nothing
        partitions.append(
            _Partition(images_NCHW, torch.tensor([label for *_, label in of], dtype=torch.int64), len(of))
        )
    return partitions


def _filtered(config: PartitionFilterConfig, partition: _Partition, compute: Compute) -> _Partition:
    """Without the most suspicious; of equals the later ones stay."""
    n_out = int(config.contamination * len(partition.labels_N))
    if n_out == 0:
        return partition
    z_ND = oriented_gradients(partition.images_NCHW, config.cells)
    positions_N = torch.arange(len(z_ND))
    rows = EmbeddingBatch("", positions_N, list(map(str, positions_N.tolist())), partition.labels_N, z_ND)
    scorer = config.scorer.build()
    scorer.fit(lambda _name: [rows], compute)
    keep_N = torch.ones(len(z_ND), dtype=torch.bool)
    keep_N[scorer.score(rows).argsort(descending=True, stable=True)[:n_out]] = False
    return _Partition(partition.images_NCHW[keep_N], partition.labels_N[keep_N], partition.n_all)


def stacked_networks(model_config: ModelConfig, numbers: Sequence[int], compute: Compute) -> Stacked:
    """New base models for these partitions; each has the seed of its partition."""
    networks = []
    with _INITIALISING:
        for number in numbers:
            compute.seed_global("partition", number, "init")
            networks.append(model_config.build_one())
    return Stacked.of(networks)


class PartitionBatches:
    """Batches for networks that are trained side by side, each on samples of its own.

    Args:
        samples: of each network its images (n, C, H, W) and labels (n,); there may be none.
        numbers: of the networks, for their random streams.
        batch_size: B, samples of one network in a step.
        steps_per_epoch: steps; a network with fewer samples sees them again, in another order.
        compute: device and seed.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Tensor, Tensor]],
        numbers: Sequence[int],
        batch_size: int,
        steps_per_epoch: int,
        compute: Compute,
    ) -> None:
        image_shape = samples[0][0].shape[1:]
        # One more that is nobody's: networks without samples are shown it, and learn nothing from it.
        images = [images for images, _ in samples] + [torch.zeros(1, *image_shape, dtype=torch.uint8)]
        labels = [labels for _, labels in samples] + [torch.tensor([_NO_LABEL])]
        device = compute.torch_device
        self.images_NCHW, self.labels_N = torch.cat(images).to(device), torch.cat(labels).to(device)
        self.sizes = [len(labels) for _, labels in samples]
        self.numbers, self.batch_size, self.steps_per_epoch, self.compute = (
            numbers,
            batch_size,
            steps_per_epoch,
            compute,
        )

    @property
    def samples_per_epoch(self) -> int:
        """Samples that are seen in an epoch, by all networks."""
        return self.steps_per_epoch * self.batch_size * len(self.sizes)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, M, C, H, W), uint8, and labels (B, M); -100 for networks without samples."""
        rows_VM = torch.stack(self._rows(number), 1).to(self.images_NCHW.device)
        for rows_BM in rows_VM.split(self.batch_size):
            yield self.images_NCHW[rows_BM], self.labels_N[rows_BM]

    def _rows(self, epoch: int) -> list[Tensor]:
        """Of each network the rows it visits, whole random orders of its samples one after another, (V,)."""
        n_visits, start, rows = self.steps_per_epoch * self.batch_size, 0, []
        for number, size in zip(self.numbers, self.sizes, strict=True):
            generator = self.compute.generator("partition", number, "order", epoch)
            orders = [torch.randperm(size, generator=generator) for _ in range(-(-n_visits // size) if size else 0)]
            none_V = torch.full((n_visits,), len(self.labels_N) - 1)
            rows.append(torch.cat(orders)[:n_visits] + start if size else none_V)
            start += size
        return rows


def side_by_side(compute: Compute) -> Objective:
    """The sum over networks of each one's mean cross-entropy: every network is trained as if it were alone."""

    def objective(model: nn.Module, batch: TrainBatch, _epoch: int) -> Step:
        with compute.autocast():
            logits_BMK = model(batch.x_B).float()
        logits_NK, labels_N = logits_BMK.flatten(0, 1), batch.y_B.flatten()
        loss = nn.functional.cross_entropy(logits_NK, labels_N, ignore_index=_NO_LABEL, reduction="sum")
        n_networks = batch.y_B.shape[1]
        correct = (logits_NK.argmax(1) == labels_N).sum()
        return Step(loss / len(batch.y_B), {"loss": loss.detach() / n_networks, "accuracy": correct / n_networks})

    return objective
