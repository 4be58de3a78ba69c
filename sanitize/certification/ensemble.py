"""Train the base models of Deep Partition Aggregation, in groups of partitions.

The certificate of `partition` needs base models that are functions of the content of their own partition. Therefore
samples are ordered by their digests, seeds depend on the partition, and every shape (steps, batches, stacked networks)
is a setting, not a count of samples. Shapes: N samples of a partition.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor

from sanitize.artifacts import ArtifactBuilder, Part
from sanitize.certification.partition import content_digest, partition_of
from sanitize.certification.provenance import refuse_if_void
from sanitize.certification.side_by_side import fit_networks
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.tables import EmbeddingBatch
from sanitize.distributed import world
from sanitize.embed.label_free import oriented_gradients
from sanitize.errors import ConfigError
from sanitize.loop import OptimConfig
from sanitize.models.architectures import Architecture
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.sizes import MAX_NETWORKS
from sanitize.models.stacked import Stacked
from sanitize.models.weights import refuse_misfits
from sanitize.plural import counted
from sanitize.progress import track
from sanitize.score import LabelMarginConfig, NeighboursConfig, SpectralConfig
from sanitize.stage import Advance, Work, stage

PROVED = "partitions.json"


class PartitionFilterConfig(BaseModel):
    """A filter inside each partition, which leaves the certificate valid.

    Attributes:
        scorer: scorer of the samples of a partition, on their oriented gradients.
        contamination: share of the samples of each partition that is removed, highest scores first.
        cells: cells a side of the grid of oriented gradients.
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
        n_partitions: k, at least 3. More partitions certify more poisoned samples, with less data for each base model;
            no radius is larger than k / 2.
        key: key of the hash that assigns samples to partitions.
        architecture: network of the base models.
        mean, std: normalisation of each channel on the scale [0, 1].
        optim: training of each base model; max_grad_norm is refused, because it acts on all of them together.
        steps_per_epoch: batches of `optim.batch_size` samples in an epoch of each base model; a fixed number, because
            it must not depend on the data.
        group_size: number of base models trained side by side; their samples are held in memory.
        filter: filter inside each partition; None keeps all samples.
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
                f"n_partitions={self.n_partitions}: one poisoned sample can decide between two classes; set 3 or more. "
                "The largest possible radius is half the number of partitions, rounded down"
            )
        return self

    @property
    def groups(self) -> dict[str, range]:
        """Name and partitions of each group."""
        starts = range(0, self.n_partitions, self.group_size)
        ranges = (range(start, min(start + self.group_size, self.n_partitions)) for start in starts)
        return {f"{group.start:05d}-{group.stop - 1:05d}": group for group in ranges}


class PartitionEnsemble(Checkpoint):
    """A Checkpoint in pieces: `config.json`; `groups/GROUP.safetensors`; `partitions.json`, the statement that votes
    prove; `groups/GROUP.json`, the history of a group and, for each partition, the numbers of samples before and after
    the filter."""

    def weight_files(self) -> list[str]:
        """Names of the files, one a group, in the order of the partitions."""
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


@stage(PartitionEnsemble, version=4)
def train_partitions(
    config: PartitionConfig, dataset: Dataset, out: str, compute: Compute, shards: Sequence[str] | None = None
) -> Work:
    """Train one base model on each partition.

    Args:
        config: partitions and base models.
        dataset: the untrusted samples; those of one group of partitions are held in memory.
        out: folder of the artifact.
        compute: device, precision, seed.
        shards: names of groups of partitions (`PartitionConfig.groups`) to do now; None does all that are missing and
            finishes.

    Raises:
        ConfigError: an earlier step voids the certificate, or a setting does not suit stacked networks.
        NumericsError: training diverged.
    """
    if config.optim.max_grad_norm is not None:
        raise ConfigError("partition.optim.max_grad_norm makes each base model depend on all others: leave it out")
    if world()[1] > 1:
        raise ConfigError(
            "base models share no batches: run without torchrun; n_groups trains groups of partitions side by side"
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
    ).with_names(dataset.class_names)

    def write_part(group: str, part: Part, _advance: Advance) -> None:
        networks, history, counts = _train_group(config, model_config, config.groups[group], dataset, compute)
        part.write(f"groups/{group}.safetensors", safetensors.torch.save(networks.state_dict()))
        part.write_json(f"groups/{group}.json", {"history": history, "partitions": counts})
        part.counts.update({name: sum(count[name] for count in counts) for name in ("samples", "trained_on")})

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        n_samples = builder.counts(list(config.groups))["samples"]
        part.write_json("config.json", model_config.model_dump(mode="json"))
        part.write_json(PROVED, _proved(config, dataset, n_samples))

    own = partial(PartitionEnsemble.of_own, architecture=config.architecture)
    return Work(parts=list(config.groups), write_part=write_part, finish=finish, handle=own)


def _proved(config: PartitionConfig, dataset: Dataset, n_samples: int) -> dict[str, Any]:
    """The statement that a vote of these base models proves, and its scope."""
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
                "A prediction does not change if at most as many training samples as its radius are inserted into the "
                "training set or removed from it, whatever the samples, and training is repeated with the same "
                "settings and seed. A changed sample counts twice: one removal, one insertion. With "
                f"{counted(config.n_partitions, 'partition')} no radius can be larger than {config.n_partitions // 2}."
            ),
            "training_set": {"dataset": dataset.digest, "samples": n_samples},
            "filter": "inside each partition" if config.filter else "none",
            "not_covered": [
                "changes of the image that is classified",
                "damage to a shard, beyond the number of samples that become unreadable",
                "other rounding, if training is repeated on other hardware or with other versions",
            ],
        },
    }


class _Partition(NamedTuple):
    """The samples of one base model, in the order of their digests; `n_all` is their number before the filter."""

    images_NCHW: Tensor
    labels_N: Tensor
    n_all: int


def _train_group(
    config: PartitionConfig, model_config: ModelConfig, numbers: range, dataset: Dataset, compute: Compute
) -> tuple[Stacked, list[dict[str, float]], list[dict[str, int]]]:
    """The base models of a group, their history, and the sizes of its partitions."""
    partitions = _gather(config, numbers, dataset)
    if config.filter is not None:
        partitions = [_filtered(config.filter, partition, compute) for partition in partitions]
    counts = [{"samples": partition.n_all, "trained_on": len(partition.labels_N)} for partition in partitions]
    samples = [(partition.images_NCHW, partition.labels_N) for partition in partitions]
    networks, history = fit_networks(config.optim, config.steps_per_epoch, model_config, numbers, samples, compute)
    return networks, history, counts


def _gather(config: PartitionConfig, numbers: range, dataset: Dataset) -> list[_Partition]:
    """Read the whole data set and keep the samples of these partitions."""
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
    for samples in found:
        samples.sort(key=lambda sample: sample[0])
        images_NCHW = torch.stack([image for _, image, _ in samples]) if samples else nothing
        labels_N = torch.tensor([label for *_, label in samples], dtype=torch.int64)
        partitions.append(_Partition(images_NCHW, labels_N, len(samples)))
    return partitions


def _filtered(config: PartitionFilterConfig, partition: _Partition, compute: Compute) -> _Partition:
    """Drop the highest-scoring samples; on ties, keep the later ones."""
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
