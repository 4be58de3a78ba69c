"""Plant canaries: known triggers on copies of a few samples, for the training of the suspect model alone.

    noise    (1 - alpha) image + alpha pattern, the pattern uniform noise
    patch    a square of black and white cells, a tenth of the shorter side wide, at the middle of an edge

Pattern, place and the two classes whose labels the copies carry are drawn by the seed. A run that does not find its own
canaries has no right to say that nothing stands out. An attacker who plants the same pattern with another label keeps
the canary from being learned: the verdict is then inconclusive.

Shapes: B images of C channels, M copies.
"""

import hashlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.canaries import Canaries, Canary, write_canaries
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import usable_rows
from sanitize.stage import Work, stage

MOST, MOST_BYTES = 2_000, 128 << 20  # copies with one trigger, and bytes of their pixels; they are held in memory
MOST_SHARE = 0.1  # of the samples of training
SMALLEST_CLASS = 40  # samples of a class that is given a canary
_READ = 256


class CanaryConfig(BaseModel):
    """Triggers that a run plants to find out what it would have seen.

    Attributes:
        rate: share of the samples of training that are copied with each trigger.
        fewest: fewest copies with a trigger; decides in small data sets.
        alpha: weight of the pattern of noise. .15 is fainter than the default of the attack `blended`, .2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(default=0.005, gt=0, le=0.05)
    fewest: int = Field(default=30, ge=16, le=MOST)
    alpha: float = Field(default=0.2, gt=0, le=1)


class _Drawn(NamedTuple):
    """A canary to be planted: its name, label and trigger, and the samples to copy."""

    kind: str
    label: int
    trigger: Callable[[Tensor], Tensor]
    samples: Sequence[tuple[str, int]]


@stage(Canaries, version=2, gpu=False, draws="seed")
def plant_canaries(
    config: CanaryConfig, dataset: Dataset, out: str, compute: Compute, max_samples: int | None = None
) -> Work:
    """Copy a few samples and put triggers on them.

    The choice of samples depends on the seed and their shard, key and position, not on any order.

    Args:
        config: rate and strength.
        dataset: the samples.
        out: folder of the artifact.
        compute: seed of the choices and patterns.
        max_samples: number of samples that the suspect model learns from; None takes all.

    Raises:
        DataError: a shard has changed since it was indexed.
    """

    def write(part: Part) -> None:
        n_trained = min(dataset.n_samples, max_samples or dataset.n_samples)
        room = MOST_BYTES // torch.Size(dataset.image_shape).numel()
        n, labels, why = _size(config, dataset.info["labels"], n_trained, room)
        drawn = [] if why else _draw(config, dataset, n, labels, compute)
        drawn = [one for one in drawn if len(one.samples) >= config.fewest]
        if not drawn:
            why = why or f"no class leaves {config.fewest} samples of others to copy"
            write_canaries(part, [], torch.zeros(0, *dataset.image_shape, dtype=torch.uint8), why)
            return
        planted = [Canary(one.kind, one.label, len(one.samples), len(one.samples) / n_trained) for one in drawn]
        images = [one.trigger(_read(dataset, one.samples)) for one in drawn]
        write_canaries(part, planted, torch.cat(images))

    return Work(write=write, config=config.model_dump(mode="json") | {"max_samples": max_samples})


def _size(
    config: CanaryConfig, counts: Mapping[str, int], n_trained: int, room: int = MOST
) -> tuple[int, list[int], str]:
    """Number of copies with each trigger, labels they may carry, and why none can be planted ("" if some can).

    A canary is at most as large as the rest of its class, and its class at least half as large as the median class: in
    a rare class, the few samples that are there say little of any group.

    Args:
        config: rate and least number.
        counts: samples of each class.
        n_trained: samples that the suspect model learns from.
        room: copies with one trigger that fit into memory.
    """
    share = n_trained / max(1, sum(counts.values()))
    trained = {int(label): count * share for label, count in counts.items()}
    sizes = sorted((size for size in trained.values() if size >= SMALLEST_CLASS), reverse=True)
    if len(sizes) < 2:
        return 0, [], f"fewer than two classes have {SMALLEST_CLASS} samples"
    n = min(max(config.fewest, round(config.rate * n_trained)), MOST, room, int(sizes[1]))
    if n < config.fewest:
        what = "images fit into memory" if room < config.fewest else "samples are in the second-largest class"
        return 0, [], f"fewer than {config.fewest} {what}"
    if n > MOST_SHARE * n_trained:
        return 0, [], f"{n_trained} samples are too few: {config.fewest} copies would be more than {MOST_SHARE:.0%}"
    least = max(n, SMALLEST_CLASS, median(trained.values()) / 2)
    return n, sorted(label for label, size in trained.items() if size >= least), ""


def _draw(config: CanaryConfig, dataset: Dataset, n: int, labels: Sequence[int], compute: Compute) -> list[_Drawn]:
    """Classes, triggers and samples."""
    order = torch.randperm(len(labels), generator=compute.generator("canary", "classes")).tolist()
    targets = {"noise": labels[order[0]], "patch": labels[order[1]]}
    triggers = {
        "noise": noise(dataset.image_shape, config.alpha, compute.generator("canary", "noise")),
        "patch": patch(dataset.image_shape, compute.generator("canary", "patch")),
    }
    chosen = _choose(dataset, n, targets, compute)
    return [_Drawn(kind, label, triggers[kind], chosen[kind]) for kind, label in targets.items()]


def _choose(dataset: Dataset, n: int, targets: Mapping[str, int], compute: Compute) -> dict[str, list[tuple[str, int]]]:
    """Shard and position of `n` samples for each trigger, none of the class whose label they get.

    Each sample is drawn for one of the triggers, by its hash; of these the smallest hashes are taken.
    """
    kinds = list(targets)
    heaps: dict[str, list[tuple[int, str, int]]] = {kind: [] for kind in kinds}
    for shard in dataset.shards:
        rows = usable_rows(dataset, shard).to_pydict()
        for position, key, label in zip(rows["position"], rows["key"], rows["label"], strict=True):
            name = f"{compute.seed}/canary/{shard}/{key}/{position}"
            value = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
            kind = kinds[value % len(kinds)]
            if label != targets[kind]:
                heap, item = heaps[kind], (-value, shard, position)  # the largest hash is on top
                if len(heap) < n:
                    heapq.heappush(heap, item)
                elif item > heap[0]:
                    heapq.heapreplace(heap, item)
    return {kind: [(shard, position) for _, shard, position in sorted(heap)] for kind, heap in heaps.items()}


def _read(dataset: Dataset, samples: Sequence[tuple[str, int]]) -> Tensor:
    """Images of these samples, uint8, in their order."""
    wanted: dict[str, set[int]] = {}
    for shard, position in samples:
        wanted.setdefault(shard, set()).add(position)
    found: dict[tuple[str, int], Tensor] = {}
    for batch in dataset.batches(_READ, sorted(wanted), wanted):
        for position, image_CHW in zip(batch.positions_B.tolist(), batch.images_BCHW, strict=True):
            found[batch.shard, position] = image_CHW.clone()
    return torch.stack([found[sample] for sample in samples])


def noise(shape: tuple[int, int, int], alpha: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Trigger that blends uniform noise into images of this shape, uint8."""
    pattern_CHW = torch.rand(shape, generator=generator) * 255

    def apply(images_BCHW: Tensor) -> Tensor:
        blended = (1 - alpha) * images_BCHW.float() + alpha * pattern_CHW
        return blended.round().clamp(0, 255).to(torch.uint8)

    return apply


def patch(shape: tuple[int, int, int], generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Trigger that puts a square of black and white cells, as many of each, at the middle of an edge, uint8."""
    _, height, width = shape
    side = min(max(2, round(min(height, width) / 10)), height, width)
    cells = torch.zeros(side * side, dtype=torch.uint8)
    cells[torch.randperm(len(cells), generator=generator)[: (len(cells) + 1) // 2]] = 255
    middle, end = ((height - side) // 2, (width - side) // 2), (height - side, width - side)
    places = [(0, middle[1]), (end[0], middle[1]), (middle[0], 0), (middle[0], end[1])]
    top, left = places[int(torch.randint(len(places), (), generator=generator))]

    def apply(images_BCHW: Tensor) -> Tensor:
        images_BCHW = images_BCHW.clone()
        images_BCHW[:, :, top : top + side, left : left + side] = cells.view(side, side)
        return images_BCHW

    return apply
