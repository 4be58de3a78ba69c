"""What a repair works with, and what it gives back.

A method is one file: a frozen config with `kind`, `needs` and one pure function,

    class CLPConfig(BaseModel):
        kind: Literal["clp"] = "clp"
        needs: ClassVar[Needs] = "nothing"

        def repair(self, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired: ...

which leaves the model it is given as it was. The union of all methods is `RepairConfig`. No method ever sees the data
that ACC and ASR are measured on. Shapes: B batch, N samples, C H W image.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.loop import predict
from sanitize.measure import accuracy
from sanitize.models.config import ModelConfig

Needs = Literal["untrusted", "clean", "nothing"]


class UntrustedBatch(NamedTuple):
    """Samples of the training data that may be poisoned.

    Attributes:
        images_BCHW: uint8.
        labels_B: int64, as given.
        hashes: a keyed 64-bit hash of each sample: what bounded samples are picked by, whatever the order.
        poisoned_B: the truth, bool, where it is known; for the report alone, no method may decide by it.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    hashes: list[int]
    poisoned_B: Tensor | None = None


class CleanImages(NamedTuple):
    """A few images that are known to be good, uint8, with labels, in two parts that share no image.

    Attributes:
        images_NCHW, labels_N: what a method learns from.
        held_out_MCHW, held_out_labels_M: what guards the clean accuracy: when to stop, which candidate to take.
    """

    images_NCHW: Tensor
    labels_N: Tensor
    held_out_MCHW: Tensor
    held_out_labels_M: Tensor


class RepairInputs(NamedTuple):
    """What there is to repair with.

    Attributes:
        config: describes the network: its input, normalisation and classes.
        untrusted: starts a new pass over the training data; None where it is not there.
        clean: None where there are no clean images.
    """

    config: ModelConfig
    untrusted: Callable[[], Iterator[UntrustedBatch]] | None = None
    clean: CleanImages | None = None

    def untrusted_batches(self) -> Iterator[UntrustedBatch]:
        """A new pass. Raises ConfigError where there is no untrusted data."""
        if self.untrusted is None:
            raise ConfigError("this method reads the data the model was trained on: give its shards")
        return self.untrusted()

    def clean_images(self) -> CleanImages:
        """Raises ConfigError where there are none, or too few to learn from some and hold out others."""
        if self.clean is None or not len(self.clean.labels_N) or not len(self.clean.held_out_labels_M):
            raise ConfigError("this method learns from a few clean images: give shards of them")
        return self.clean


class Repaired(NamedTuple):
    """What a repair gives back.

    Attributes:
        model: a repaired copy of the network, in eval mode, on the CPU.
        done: what was done, as JSON has it; the same for the same inputs, config and seed.
        seconds: what took how long; not in `done`, for a digest must not depend on it.
    """

    model: nn.Module
    done: dict[str, Any]
    seconds: Mapping[str, float] = MappingProxyType({})


class RepairMethod(Protocol):
    """What every method's config is."""

    needs: Needs

    def repair(self, model: nn.Module, inputs: RepairInputs, compute: Compute) -> Repaired:
        """Repair a copy of `model` (eval mode, takes normalised images)."""
        ...


def split_clean(
    images_NCHW: Tensor, labels_N: Tensor, held_out_fraction: float, generator: torch.Generator
) -> CleanImages:
    """Hold out round(N held_out_fraction) images chosen at random, one at least."""
    order_N = torch.randperm(len(labels_N), generator=generator)
    n_held_out = max(1, round(len(labels_N) * held_out_fraction))
    held_out, rest = order_N[:n_held_out].sort().values, order_N[n_held_out:].sort().values
    return CleanImages(images_NCHW[rest], labels_N[rest], images_NCHW[held_out], labels_N[held_out])


def held_out_accuracy(model: nn.Module, inputs: RepairInputs, compute: Compute) -> float:
    """Accuracy of the network on the clean images that are held out."""
    clean = inputs.clean_images()
    logits_MK = predict(model, clean.held_out_MCHW, inputs.config.normalise, compute)
    return accuracy(logits_MK, clean.held_out_labels_M)


def in_memory(
    images_NCHW: Tensor, labels_N: Tensor, poisoned_N: Tensor | None = None, batch_size: int = 256
) -> Callable[[], Iterator[UntrustedBatch]]:
    """Untrusted data that is held as it is; a sample's hash is that of its row."""
    hashes = [
        int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "big") for i in range(len(labels_N))
    ]

    def batches() -> Iterator[UntrustedBatch]:
        for start in range(0, len(labels_N), batch_size):
            rows = slice(start, start + batch_size)
            truth_B = None if poisoned_N is None else poisoned_N[rows]
            yield UntrustedBatch(images_NCHW[rows], labels_N[rows], hashes[rows], truth_B)

    return batches
