"""Canaries: copies of a few samples with triggers that a run plants itself, to find out what it would have seen.

They join the training of the suspect model and nothing else: no shard is written with them.
"""

from functools import cached_property
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.data.dataset import ImageBatch
from sanitize.errors import ArtifactError

SHARD = "canaries"  # name of the table of their embeddings


class Canary(NamedTuple):
    """A trigger that a run plants.

    Attributes:
        kind: name of the trigger.
        label: label that its samples carry.
        n: number of samples.
        rate: n as a share of the samples that the suspect model learns from.
    """

    kind: str
    label: int
    n: int
    rate: float


class Canaries(Artifact):
    """`canaries.json`: what was planted, or why nothing was; `canaries.safetensors`: images, labels, kinds."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """canaries.json: `planted`, a list of objects with the fields of `Canary`; `why` nothing was, or ""."""
        return self.read_object("canaries.json", "planted", "why")

    @cached_property
    def planted(self) -> list[Canary]:
        """The triggers, in the order of `kinds`. Raises ArtifactError where the file is damaged."""
        try:
            rows = [Canary(**row) for row in self.info["planted"]]
            return [Canary(str(c.kind), int(c.label), int(c.n), float(c.rate)) for c in rows]
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{self.url('canaries.json')} is damaged: {error}") from error

    @property
    def n_samples(self) -> int:
        """Number of all copies."""
        return sum(canary.n for canary in self.planted)

    def images(self) -> tuple[Tensor, Tensor]:
        """All copies: images uint8 (M, C, H, W), and labels int64 (M,), trigger after trigger."""
        tensors = self.read_tensors("canaries.safetensors", "images", "labels")
        images_MCHW, labels_M = tensors["images"], tensors["labels"]
        is_sound = images_MCHW.dtype == torch.uint8 and images_MCHW.dim() == 4 and labels_M.dtype == torch.int64
        if not is_sound or not len(images_MCHW) == len(labels_M) == self.n_samples or labels_M.dim() != 1:
            raise ArtifactError(f"{self.url('canaries.safetensors')} does not hold {self.n_samples} images and labels")
        return images_MCHW, labels_M

    def kinds(self) -> list[str]:
        """Name of the trigger of each copy."""
        return [canary.kind for canary in self.planted for _ in range(canary.n)]

    def batch(self) -> ImageBatch:
        """All copies as one batch, as if they were a shard."""
        images_MCHW, labels_M = self.images()
        keys = [f"{kind}-{i:05d}" for i, kind in enumerate(self.kinds())]
        return ImageBatch(SHARD, torch.arange(len(keys)), keys, labels_M, images_MCHW)


def write_canaries(part: Part, planted: list[Canary], images_MCHW: Tensor, why: str = "") -> None:
    """Write the files of `Canaries`.

    Args:
        part: files of the artifact.
        planted: the triggers.
        images_MCHW: their images, uint8, trigger after trigger.
        why: the reason, where nothing is planted.
    """
    labels = [canary.label for canary in planted for _ in range(canary.n)]
    tensors = {"images": images_MCHW.contiguous(), "labels": torch.tensor(labels, dtype=torch.int64)}
    part.write("canaries.safetensors", safetensors.torch.save(tensors))
    part.write_json("canaries.json", {"planted": [canary._asdict() for canary in planted], "why": why})
    part.counts["samples"] = len(labels)
