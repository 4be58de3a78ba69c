"""What a repair is (`BaseRepairConfig`, `Repair`), its inputs and its result.

To add a repair: one file with its config, a subclass of `BaseRepairConfig`, and the function that repairs; and the
config's name in the union `RepairConfig` (`methods.py`).

    class CLPConfig(BaseRepairConfig):
        kind: Literal["clp"] = "clp"
        needs: ClassVar[Needs] = "nothing"

        def build(self) -> Repair:
            return partial(repair, self)

    def repair(config: CLPConfig, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired: ...

No repair sees the data on which ACC and ASR are measured. Shapes: B batch, N samples, M held-out samples, C H W image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count, islice
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.errors import ConfigError
from sanitize.loop import predict
from sanitize.measure import accuracy
from sanitize.models.config import ModelConfig

Needs = Literal["untrusted", "clean", "nothing"]


class UntrustedBatch(NamedTuple):
    """Samples of the training data that may be poisoned.

    Attributes:
        images_BCHW: uint8.
        labels_B: given labels, int64.
        hashes: keyed 64-bit hash of each sample, by which bounded samples are chosen in any order of the data.
        poisoned_B: True for poisoned samples, bool, where the truth is known; for the report alone, not for decisions.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    hashes: list[int]
    poisoned_B: Tensor | None = None


class CleanImages(NamedTuple):
    """A few trusted images, uint8, with labels, int64, in two parts that share no image.

    Attributes:
        images_NCHW, labels_N: images to learn from.
        held_out_MCHW, held_out_labels_M: images to measure the clean accuracy on, for stopping and for the choice among
            candidates.
    """

    images_NCHW: Tensor
    labels_N: Tensor
    held_out_MCHW: Tensor
    held_out_labels_M: Tensor


class RepairInputs(NamedTuple):
    """Data for a repair.

    Attributes:
        config: description of the network: its input, normalisation and classes.
        untrusted: function that starts a new pass over the training data; None without training data.
        clean: the clean images; None without them.
    """

    config: ModelConfig
    untrusted: Callable[[], Iterator[UntrustedBatch]] | None = None
    clean: CleanImages | None = None

    def untrusted_batches(self) -> Iterator[UntrustedBatch]:
        """A new pass over the training data. Raises ConfigError where there is none."""
        if self.untrusted is None:
            raise ConfigError("this method reads the data the model was trained on: give its shards")
        return self.untrusted()

    def clean_images(self) -> CleanImages:
        """The clean images. Raises ConfigError where one of the two parts is empty."""
        if self.clean is None or not len(self.clean.labels_N) or not len(self.clean.held_out_labels_M):
            raise ConfigError("this method learns from a few clean images: give shards of them")
        return self.clean

    def clean_batches(
        self, n_steps: int, batch_size: int, compute: Compute, *stream: str | int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of clean images (B, C, H, W), uint8, and labels (B,), on the device, shuffled in each epoch.

        Args:
            n_steps: number of batches.
            batch_size: B.
            compute: device and seed.
            stream: name of the random stream of the order.
        """
        clean, device = self.clean_images(), compute.torch_device
        data = Resident(
            clean.images_NCHW.to(device),
            clean.labels_N.to(device),
            batch_size,
            lambda epoch: compute.generator("repair", *stream, "shuffle", epoch),
        )
        batches = chain.from_iterable(map(data.epoch, count()))
        return ((images_BCHW, labels_B) for images_BCHW, labels_B, _ in islice(batches, n_steps))


class Repaired(NamedTuple):
    """Result of a repair.

    Attributes:
        model: repaired copy of the network, in eval mode.
        done: report on the repair, as JSON; the same for the same inputs, config and seed.
        seconds: durations of parts of the repair; not in `done`, because a digest must not depend on them.
    """

    model: nn.Module
    done: dict[str, Any]
    seconds: Mapping[str, float] = MappingProxyType({})


class Repair(Protocol):
    """A repair with its settings, a function."""

    def __call__(self, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
        """Repair a copy of `model`, which itself is not changed.

        Args:
            model: the suspect network, in eval mode, on normalised images.
            inputs: description of the network, and data.
            compute: device, precision, seed.

        Raises:
            ConfigError: data is missing, or the method cannot be applied to this network.
            NumericsError: a value is not finite.
        """
        ...


class BaseRepairConfig(BaseModel, ABC):
    """Settings of a repair.

    Attributes:
        needs: data without which the method cannot work: "untrusted" training data, "clean" images, or "nothing".
        kind: name of the repair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs: ClassVar[Needs]

    kind: str

    @abstractmethod
    def build(self) -> Repair:
        """The repair."""


def split_clean(
    images_NCHW: Tensor, labels_N: Tensor, held_out_fraction: float, generator: torch.Generator
) -> CleanImages:
    """Hold out round(N held_out_fraction) images, at least one, chosen at random."""
    order_N = torch.randperm(len(labels_N), generator=generator)
    n_held_out = max(1, round(len(labels_N) * held_out_fraction))
    held_out, rest = order_N[:n_held_out].sort().values, order_N[n_held_out:].sort().values
    return CleanImages(images_NCHW[rest], labels_N[rest], images_NCHW[held_out], labels_N[held_out])


def held_out_accuracy(model: nn.Module, inputs: RepairInputs, compute: Compute) -> float:
    """Accuracy of the network on the held-out clean images."""
    clean = inputs.clean_images()
    logits_MK = predict(model, clean.held_out_MCHW, inputs.config.normalise, compute)
    return accuracy(logits_MK, clean.held_out_labels_M)


def in_memory(
    images_NCHW: Tensor, labels_N: Tensor, poisoned_N: Tensor | None = None, batch_size: int = 256
) -> Callable[[], Iterator[UntrustedBatch]]:
    """Untrusted data from tensors; the hash of a sample is the hash of its row number."""
    hashes = [
        int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "big") for i in range(len(labels_N))
    ]

    def batches() -> Iterator[UntrustedBatch]:
        for start in range(0, len(labels_N), batch_size):
            rows = slice(start, start + batch_size)
            truth_B = None if poisoned_N is None else poisoned_N[rows]
            yield UntrustedBatch(images_NCHW[rows], labels_N[rows], hashes[rows], truth_B)

    return batches
