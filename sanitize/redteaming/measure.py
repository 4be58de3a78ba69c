"""Measures of one case: removals compared with the truth, and models trained before and after cleaning.

Every measure is a share, kept as two counts so that repeats can be pooled. C H W image, N samples.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.attack import AttackConfig, Poisoned, triggered
from sanitize.compute import Compute
from sanitize.data.chosen import read_chosen
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.tables import Selection
from sanitize.errors import DataError
from sanitize.loop import predict
from sanitize.measure import count_correct, detection
from sanitize.models.checkpoint import Checkpoint
from sanitize.progress import track
from sanitize.stage import Work, stage

MEASURES = {
    "recall": "share of the poisoned samples that was removed",
    "precision": "share of the removed samples that is poisoned",
    "false_removals": "share of the clean samples that was removed",
    "acc_before": "clean accuracy of a model trained on all samples",
    "acc_after": "clean accuracy of a model trained on the samples that were kept",
    "asr_before": "attack success rate with a model trained on all samples",
    "asr_after": "attack success rate with a model trained on the samples that were kept",
    "asr_baseline": "attack success rate with a model trained on unpoisoned data: the baseline",
}
_AT_ONCE = 256
_N_PICTURES = 8


class Measured(Artifact):
    """`counts.json`: measure -> [part, whole]. `pictures.png`: test images without and with the trigger."""

    @cached_property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Measure -> (part, whole): a share as two counts."""
        return {measure: (part, whole) for measure, (part, whole) in self.read_json("counts.json").items()}

    @property
    def pictures(self) -> bytes | None:
        """PNG of two rows of images; None where the attack has no trigger."""
        return self.read("pictures.png") if "pictures.png" in self.manifest().files else None


@stage(Measured, version=3)
def measure_case(
    config: AttackConfig | None,
    selection: Selection,
    models: Mapping[str, Checkpoint],
    test: Dataset,
    out: str,
    compute: Compute,
    truth: Poisoned | None = None,
) -> Work:
    """Compare verdicts with the truth, and models before with models after.

    Args:
        config: the attack; None for unpoisoned data.
        selection: verdicts of the pipeline.
        models: `before` and `after`; for an attack with a trigger also `baseline`, trained on unpoisoned data.
        test: samples that no model was trained on.
        out: folder of the artifact.
        compute: device and precision.
        truth: poisoned samples; None for unpoisoned data.

    Raises:
        ConfigError: the target of the attack is no class.
        DataError: verdicts and truth are not about the same samples.
    """
    if config is not None:
        config.check_classes(test.n_classes)
    n_triggers = 0 if config is None else sum(attack.has_trigger for attack in config.attacks)

    def write(part: Part) -> None:
        counts = count_removals(selection, truth)
        with track("measure", (1 + n_triggers) * test.n_samples) as advance:
            clean = ((batch.images_BCHW, batch.labels_B) for batch in test.batches(_AT_ONCE))
            trained = {f"acc_{when}": models[when] for when in ("before", "after")}
            counts |= _count_correct(trained, clean, test.n_classes, compute, advance)
            if config is not None and config.has_trigger:
                batches = triggered(config, test, test.n_classes, _AT_ONCE)
                attacked = ((batch.images_BCHW, batch.wanted_B) for batch in batches)
                trained = {f"asr_{when}": model for when, model in models.items()}
                counts |= _count_correct(trained, attacked, test.n_classes, compute, advance)
        part.write_json("counts.json", counts)
        if config is not None and config.has_trigger and (pictures := _pictures(config, test)) is not None:
            part.write("pictures.png", pictures)

    settings = {"attack": None if config is None else config.model_dump(mode="json")}
    inputs = {"selection": selection.digest, "test": test.digest}
    inputs |= {name: model.digest for name, model in models.items()}
    inputs |= {} if truth is None else {"truth": truth.digest}
    return Work(write=write, config=settings, inputs=inputs)


def count_removals(selection: Selection, truth: Poisoned | None) -> dict[str, tuple[int, int]]:
    """recall and precision, where there is a truth, and false_removals.

    Unreadable samples are left out, and so are cover samples: they have the trigger and their true label, so that
    removing one is neither recall nor a false removal.

    Raises:
        DataError: verdicts and truth are not about the same samples.
    """
    removed, poisoned = [], []
    for shard in selection.shards:
        status_N = selection.rows(shard, ["status"])["status"].to_numpy()
        truth_N, is_cover_N = np.zeros(len(status_N), bool), np.zeros(len(status_N), bool)
        if truth is not None:
            truth_N, is_cover_N = truth.rows(shard, ["poisoned"])["poisoned"].to_numpy(), truth.is_cover(shard)
        if len(truth_N) != len(status_N):
            raise DataError(f"shard {shard}: {len(status_N)} verdicts on {len(truth_N)} samples")
        is_counted_N = np.isin(status_N, ("kept", "quarantined")) & ~is_cover_N
        removed.append(status_N[is_counted_N] == "quarantined")
        poisoned.append(truth_N[is_counted_N])
    found = detection(np.concatenate(removed), np.concatenate(poisoned))
    false_removals = {"false_removals": (found.n_false_removals, found.n_clean)}
    if truth is None:
        return false_removals
    recall, precision = (found.n_found, found.n_poisoned), (found.n_found, found.n_removed)
    return {"recall": recall, "precision": precision} | false_removals


def _count_correct(
    models: Mapping[str, Checkpoint],
    batches: Iterator[tuple[Tensor, Tensor]],
    n_classes: int,
    compute: Compute,
    advance: Callable[[int], None],
) -> dict[str, tuple[int, int]]:
    """Correct predictions, and samples, by name of the model."""
    logits = [
        partial(predict, model.model(), transform=model.config.normalise, compute=compute) for model in models.values()
    ]

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        for images_BCHW, labels_B in batches:
            yield images_BCHW, labels_B
            advance(len(labels_B))

    correct = count_correct(logits, counted(), n_classes)
    return {name: found.total for name, found in zip(models, correct, strict=True)}


def _pictures(attack: AttackConfig, test: Dataset) -> bytes | None:
    """PNG of a few test images as a model reads them, and below them the same with the first trigger; None where all
    test images have the attacker's label."""
    batch = next(triggered(attack, test, test.n_classes, _N_PICTURES), None)
    if batch is None:
        return None
    chosen = read_chosen(test, batch.shard, set(batch.positions), _N_PICTURES)
    untouched = [images.images_BCHW for images in chosen]
    rows = [torch.cat(list(images_BCHW), dim=2) for images_BCHW in (torch.cat(untouched), batch.images_BCHW)]
    return encode_png(torch.cat(rows, dim=1))
