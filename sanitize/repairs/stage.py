"""The stage of all repairs: reads models and data, repairs, measures, writes."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from sanitize.artifacts import Part
from sanitize.attack import AttackConfig, Poisoned, triggered
from sanitize.compute import Compute
from sanitize.data.chosen import chosen_images
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError
from sanitize.loop import predict
from sanitize.measure import count_correct
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.progress import track
from sanitize.repairs.drr import DRRConfig
from sanitize.repairs.inputs import CleanImages, RepairInputs, UntrustedBatch, split_clean
from sanitize.repairs.methods import RepairConfig
from sanitize.stage import Work, stage


class RepairModelConfig(BaseModel):
    """A method and its data.

    Attributes:
        method: one of the repairs; docs/methods.md lists the data each one needs.
        batch_size: images of the untrusted data in one forward pass.
        max_clean_images: largest number of clean images in memory, chosen by a keyed hash.
        held_out_fraction: share of the clean images on which the clean accuracy is measured; not used for learning.
        trigger: the attack, or several, where it is known, to measure the attack success rate on the test shards. As
            in `poison_shards`, the trigger is put on images as they are stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: RepairConfig = DRRConfig()
    batch_size: int = Field(default=256, ge=1)
    max_clean_images: int = Field(default=2000, ge=2)
    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)
    trigger: AttackConfig | None = None

    @model_validator(mode="after")
    def _the_attack_has_a_trigger(self) -> Self:
        if self.trigger is not None and not self.trigger.has_trigger:
            raise ConfigError(
                "trigger: label noise has no trigger, so that its success cannot be measured; leave it out"
            )
        return self


class RepairedModel(Checkpoint):
    """A Checkpoint with `repair.json`: the report on the repair, the change of the weights, and the measurements before
    and after."""

    @property
    def report(self) -> dict[str, Any]:
        """method, done, weights_changed; with test shards also before and after."""
        return self.read_object("repair.json", "method", "weights_changed")


@stage(RepairedModel, version=3)
def repair_model(
    config: RepairModelConfig,
    model: Checkpoint,
    out: str,
    compute: Compute,
    untrusted: Dataset | None = None,
    clean: Dataset | None = None,
    test: Dataset | None = None,
    truth: Poisoned | None = None,
) -> Work:
    """Repair a model.

    Args:
        config: the method.
        model: the suspect model; one network.
        out: folder of the artifact.
        compute: device, precision, seed.
        untrusted: training data of the model, for methods that read it.
        clean: trusted samples, for methods that learn from a few.
        test: samples to measure on before and after the repair; no method sees them.
        truth: artifact with the poisoned samples of `untrusted`, where it is known; for the report alone.

    Raises:
        ConfigError: data that the method needs is missing, the model is an ensemble, its images have another shape than
            the test samples, or the target of the trigger is no class.
        NumericsError: features, or a gradient, are not finite.
    """
    if model.config.is_ensemble:
        raise ConfigError("an ensemble of partitions cannot be repaired: its certificates hold for its networks alone")
    if config.trigger is not None:
        config.trigger.check_classes(model.config.n_classes)
    if test is not None and test.image_shape != model.config.image_shape:
        raise ConfigError(
            f"test images are {test.image_shape}, the model takes {model.config.image_shape}: set index.image"
        )
    given = {"untrusted": untrusted, "clean": clean}
    if config.method.needs != "nothing" and given[config.method.needs] is None:
        option = "shards" if config.method.needs == "untrusted" else "clean_shards"
        raise ConfigError(f"{config.method.kind} needs the {config.method.needs} images: give {option}")

    def write(part: Part) -> None:
        network = model.model()
        inputs = RepairInputs(
            model.config,
            None if untrusted is None else lambda: untrusted_batches(untrusted, truth, config.batch_size, compute),
            None if clean is None else clean_images(clean, config, compute),
        )
        with track("repair", 1) as advance:
            repaired = config.method.build()(network, inputs, compute)
            advance(1)
        report = {"method": config.method.model_dump(mode="json"), "done": repaired.done}
        report["weights_changed"] = weights_changed(network, repaired.model)
        if test is not None:
            networks = {"before": network, "after": repaired.model}
            report |= measured(networks, model.config, test, config.trigger, compute)
        write_checkpoint(part, repaired.model.cpu(), model.config, [])
        part.write_json("repair.json", report)

    return Work(write=write, handle=partial(RepairedModel.trusted_like, model=model))


def untrusted_batches(
    dataset: Dataset, truth: Poisoned | None, batch_size: int, compute: Compute
) -> Iterator[UntrustedBatch]:
    """One pass over the untrusted data. Samples that are not in `truth` count as clean."""
    for batch in dataset.batches(batch_size):
        positions = batch.positions_B.tolist()
        hashes = [compute.seed_for("repair", "sample", batch.shard, position) for position in positions]
        poisoned_B = None
        if truth is not None:
            rows = truth.rows(batch.shard, ["key", "poisoned"])
            poisoned_keys = set(rows.filter(rows["poisoned"])["key"].to_pylist())
            poisoned_B = torch.tensor([key in poisoned_keys for key in batch.keys])
        yield UntrustedBatch(batch.images_BCHW, batch.labels_B, hashes, poisoned_B)


def clean_images(dataset: Dataset, config: RepairModelConfig, compute: Compute) -> CleanImages:
    """At most `max_clean_images` clean images, split in two parts."""
    chosen = chosen_images(dataset, config.max_clean_images, compute)
    generator = compute.generator("repair", "held_out")
    return split_clean(chosen.images_NCHW, chosen.labels_N, config.held_out_fraction, generator)


def weights_changed(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """Number of changed values, number of all values, and l2 norm of the change relative to that of all weights and
    buffers."""
    old, new = ({k: t.detach().cpu().double() for k, t in m.state_dict().items()} for m in (before, after))
    changed = sum(int((old[name] != new[name]).sum()) for name in old)
    difference = {name: new[name] - old[name] for name in old}
    norm, change = (math.sqrt(sum(float(t.square().sum()) for t in state.values())) for state in (old, difference))
    return {"changed": changed, "of": sum(t.numel() for t in old.values()), "relative_l2": change / max(norm, 1e-12)}


def measured(
    networks: Mapping[str, nn.Module],
    model_config: ModelConfig,
    test: Dataset,
    trigger: AttackConfig | None,
    compute: Compute,
) -> dict[str, dict[str, Any]]:
    """Accuracy `acc` of each network, accuracy of each class, and, with a known trigger, attack success rate `asr`.

    The attack success rate is the share of triggered samples that are predicted as the attacker's label, among samples
    with another label; it is missing where there are none.
    """
    n_classes = model_config.n_classes
    logits = [
        partial(predict, network, transform=model_config.normalise, compute=compute) for network in networks.values()
    ]
    clean = ((batch.images_BCHW, batch.labels_B) for batch in test.batches(512))
    found: dict[str, dict[str, Any]] = {}
    for name, (correct_K, count_K) in zip(networks, count_correct(logits, clean, n_classes), strict=True):
        of_class = [float(c / n) if n else None for c, n in zip(correct_K, count_K, strict=True)]
        found[name] = {"acc": float(correct_K.sum() / count_K.sum()), "acc_of_class": of_class}
    if trigger is None:
        return found
    attacked = ((batch.images_BCHW, batch.wanted_B) for batch in triggered(trigger, test, n_classes))
    for name, success in zip(networks, count_correct(logits, attacked, n_classes), strict=True):
        if success.total[1]:
            found[name]["asr"] = success.share
    return found
