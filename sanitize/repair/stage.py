"""Repair a model: the only place where the methods meet files."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.artifacts import Part, Recipe, make
from sanitize.attack import OneAttack, Poisoned
from sanitize.compute import Compute
from sanitize.data.chosen import chosen_images
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError
from sanitize.loop import predict
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.progress import track
from sanitize.repair.drr import DRRConfig
from sanitize.repair.material import CleanImages, Material, UntrustedBatch, split_clean
from sanitize.repair.methods import RepairConfig


class RepairModelConfig(BaseModel):
    """A method, and what it is given.

    Attributes:
        method: one of the methods; see docs/methods.md for which needs what.
        batch_size: images of the untrusted data in one forward pass.
        max_clean_images: clean images held in memory, chosen by a keyed hash.
        held_out_fraction: of them, to decide when to stop; nothing is learned from these.
        trigger: the attack, where it is known; the attack success rate on the test shards is measured with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: RepairConfig = DRRConfig()
    batch_size: int = Field(default=256, ge=1)
    max_clean_images: int = Field(default=2000, ge=2)
    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)
    trigger: OneAttack | None = None


class RepairedModel(Checkpoint):
    """A Checkpoint with `repair.json`: what was done, how much the weights changed, and what was measured before and
    after."""

    @property
    def report(self) -> dict[str, Any]:
        """method, done, weights_changed, and where there are test shards before and after."""
        report: dict[str, Any] = self.read_json("repair.json")
        return report


def repair_model(
    config: RepairModelConfig,
    model: Checkpoint,
    out: str,
    compute: Compute,
    untrusted: Dataset | None = None,
    clean: Dataset | None = None,
    test: Dataset | None = None,
    truth: Poisoned | None = None,
) -> RepairedModel:
    """Repair a model.

    Args:
        config: the method.
        model: the suspect model; one network.
        out: folder of the artifact.
        compute: device, precision, seed.
        untrusted: what the model was trained on, for methods that read it.
        clean: samples that are known to be good, for methods that learn from a few.
        test: samples to measure on, before and after; no method sees them.
        truth: which samples of `untrusted` are poisoned, where it is known: for the report alone.

    Raises:
        ConfigError: the method needs data that is not given, or the model is an ensemble.
        NumericsError: features, or a gradient, are not finite.
    """
    compute.activate()
    if model.config.n_networks > 1:
        raise ConfigError("an ensemble of partitions cannot be repaired: its networks are certified as they are")
    given = {"untrusted": untrusted, "clean": clean}
    if config.method.needs != "nothing" and given[config.method.needs] is None:
        option = "shards" if config.method.needs == "untrusted" else "clean_shards"
        raise ConfigError(f"{config.method.kind} needs the {config.method.needs} images: give {option}")
    used = {name: of for name, of in (given | {"test": test, "truth": truth}).items() if of is not None}
    recipe = Recipe(
        stage="repair_model",
        version=2,
        config=config.model_dump(mode="json"),
        numerics=compute.numerics,
        inputs={"model": model.digest} | {name: of.digest for name, of in used.items()},
    )

    def write(part: Part) -> None:
        network = model.model()
        material = Material(
            model.config,
            None if untrusted is None else lambda: untrusted_batches(untrusted, truth, config.batch_size, compute),
            None if clean is None else clean_images(clean, config, compute),
        )
        with track("repair", 1) as advance:
            repaired = config.method.repair(network, material, compute)
            advance(1)
        report = {"method": config.method.model_dump(mode="json"), "done": repaired.done}
        report["weights_changed"] = weights_changed(network, repaired.model)
        if test is not None:
            for name, of in (("before", network), ("after", repaired.model)):
                report[name] = measured(of, model, test, config.trigger, compute)
        write_checkpoint(part, repaired.model.cpu(), model.config, [])
        part.write_json("repair.json", report)

    return make(RepairedModel, out, recipe, write)


def untrusted_batches(
    dataset: Dataset, truth: Poisoned | None, batch_size: int, compute: Compute
) -> Iterator[UntrustedBatch]:
    """One pass over the untrusted data. Samples that `truth` does not know count as clean."""
    for batch in dataset.batches(batch_size):
        positions = batch.positions_B.tolist()
        hashes = [compute.seed_for("repair", "sample", batch.shard, position) for position in positions]
        poisoned_B = None
        if truth is not None:
            rows = truth.rows(batch.shard, ["key", "poisoned"])
            wrong = set(rows.filter(rows["poisoned"])["key"].to_pylist())
            poisoned_B = torch.tensor([key in wrong for key in batch.keys])
        yield UntrustedBatch(batch.images_BCHW, batch.labels_B, hashes, poisoned_B)


def clean_images(dataset: Dataset, config: RepairModelConfig, compute: Compute) -> CleanImages:
    """At most `max_clean_images` usable samples, in two parts."""
    chosen = chosen_images(dataset, config.max_clean_images, compute)
    generator = compute.generator("repair", "held_out")
    return split_clean(chosen.images_NCHW, chosen.labels_N, config.held_out_fraction, generator)


def weights_changed(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """How many numbers differ, and by how much: the l2 norm of the change over that of all weights and buffers."""
    old, new = ({k: t.detach().cpu().double() for k, t in of.state_dict().items()} for of in (before, after))
    changed = sum(int((old[name] != new[name]).sum()) for name in old)
    squares = (sum(float(t.square().sum()) for t in of.values()) for of in (old, {k: new[k] - old[k] for k in old}))
    norm, change = (math.sqrt(square) for square in squares)
    return {"changed": changed, "of": sum(t.numel() for t in old.values()), "relative_l2": change / max(norm, 1e-12)}


def measured(
    network: nn.Module, model: Checkpoint, test: Dataset, trigger: OneAttack | None, compute: Compute
) -> dict[str, Any]:
    """Accuracy, that of each class, and the attack success rate where the trigger is known; shares in [0, 1]."""
    n_classes = model.config.n_classes
    right_K, count_K = torch.zeros(n_classes), torch.zeros(n_classes)
    n_hit = n_attacked = 0
    for batch in test.batches(512):
        predictions_B = _predicted(network, batch.images_BCHW, model, compute)
        count_K += batch.labels_B.bincount(minlength=n_classes)
        right_K += batch.labels_B[predictions_B == batch.labels_B].bincount(minlength=n_classes)
        if trigger is not None:
            wanted_B = trigger.relabel(batch.labels_B, n_classes, torch.Generator().manual_seed(0))
            hit_B = _predicted(network, trigger.apply(batch.images_BCHW), model, compute) == wanted_B
            n_hit += int(hit_B[wanted_B != batch.labels_B].sum())
            n_attacked += int((wanted_B != batch.labels_B).sum())
    found: dict[str, Any] = {"acc": float(right_K.sum() / count_K.sum())}
    found["acc_of_class"] = [float(r / n) if n else None for r, n in zip(right_K, count_K, strict=True)]
    if n_attacked:
        found["asr"] = n_hit / n_attacked
    return found


def _predicted(network: nn.Module, images_BCHW: Tensor, model: Checkpoint, compute: Compute) -> Tensor:
    return predict(network, images_BCHW, model.config.normalise, compute).argmax(1)
