"""What a pipeline did in one case: which samples it removed, and what models learned before and after.

Every measure is a share, kept as two counts so that repeats can be pooled. B batch, C H W image.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from sanitize.artifacts import Artifact, Part
from sanitize.attack import AttackConfig, Poisoned, refuse_targets, triggered, triggers_of
from sanitize.compute import Compute
from sanitize.data.chosen import read_chosen
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.tables import Selection
from sanitize.errors import DataError
from sanitize.loop import predict
from sanitize.models.checkpoint import Checkpoint
from sanitize.progress import track
from sanitize.stage import Work, stage

MEASURES = {
    "recall": "share of the poisoned samples that was removed",
    "precision": "share of what was removed that is poisoned",
    "false_removals": "share of the clean samples that was removed",
    "acc_before": "accuracy on clean test samples, learned from the data as it came",
    "acc_after": "accuracy on clean test samples, learned from what the pipeline kept",
    "asr_before": "share of triggered test samples that get the attacker's label, learned from the data as it came",
    "asr_after": "share of triggered test samples that get the attacker's label, learned from what the pipeline kept",
    "asr_untouched": "the same of a model that never saw the attack: less cannot be asked for",
}
_AT_ONCE = 256
_N_PICTURES = 8


class Measured(Artifact):
    """`counts.json`: measure -> [how many, of how many]. `pictures.png`: test images as they are, and triggered."""

    @cached_property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each measure of the case how many there were, and of how many."""
        return {measure: (part, whole) for measure, (part, whole) in self.read_json("counts.json").items()}

    @property
    def pictures(self) -> bytes | None:
        """PNG of two rows of images; None where the attack has no trigger."""
        return self.read("pictures.png") if "pictures.png" in self.manifest().files else None


@stage(Measured, version=2)
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
        config: the attack; None where there was none.
        selection: the verdicts of the pipeline.
        models: `before` and `after`; where there is a trigger, `untouched` may be a model that never saw the attack.
        test: samples that no model learned from.
        out: folder of the artifact.
        compute: device and precision.
        truth: which samples are poisoned; None where none is.

    Raises:
        ConfigError: the target of the attack is no class.
        DataError: verdicts and truth are not about the same samples.
    """
    triggers = () if config is None else triggers_of(config)
    refuse_targets(triggers, test.n_classes)

    def write(part: Part) -> None:
        counts = count_removals(selection, truth)
        with track("measure", (1 + len(triggers)) * test.n_samples) as advance:
            clean = ((batch.images_BCHW, batch.labels_B) for batch in test.batches(_AT_ONCE))
            learned = {when: models[when] for when in ("before", "after")}
            counts |= {f"acc_{when}": of for when, of in _answers(learned, clean, compute, advance).items()}
            if config is not None and triggers:
                attacked = triggered(config, test, test.n_classes, _AT_ONCE)
                images = ((batch.images_BCHW, batch.wanted_B) for batch in attacked)
                counts |= {f"asr_{when}": of for when, of in _answers(models, images, compute, advance).items()}
        part.write_json("counts.json", counts)
        if config is not None and triggers and (pictures := _pictures(config, test)) is not None:
            part.write("pictures.png", pictures)

    settings = {"attack": None if config is None else config.model_dump(mode="json")}
    inputs = {"selection": selection.digest, "test": test.digest}
    inputs |= {name: model.digest for name, model in models.items()}
    inputs |= {} if truth is None else {"truth": truth.digest}
    return Work(write=write, config=settings, inputs=inputs)


def count_removals(selection: Selection, truth: Poisoned | None) -> dict[str, tuple[int, int]]:
    """recall and precision where something is poisoned, and false_removals; what cannot be read is left out.

    Raises:
        DataError: verdicts and truth are not about the same samples.
    """
    counted: Counter[tuple[bool, str]] = Counter()  # is poisoned, what became of it
    for shard in selection.shards:
        verdicts = selection.rows(shard, ["status"])["status"].to_pylist()
        poisoned = [False] * len(verdicts) if truth is None else truth.rows(shard, ["poisoned"])["poisoned"].to_pylist()
        if len(poisoned) != len(verdicts):
            raise DataError(f"shard {shard}: {len(verdicts)} verdicts on {len(poisoned)} samples")
        counted.update(zip(poisoned, verdicts, strict=True))
    found, missed = counted[True, "quarantined"], counted[True, "kept"]
    lost, spared = counted[False, "quarantined"], counted[False, "kept"]
    false_removals = {"false_removals": (lost, lost + spared)}
    if truth is None:
        return false_removals
    return {"recall": (found, found + missed), "precision": (found, found + lost)} | false_removals


def _answers(
    models: Mapping[str, Checkpoint],
    images: Iterator[tuple[Tensor, Tensor]],
    compute: Compute,
    advance: Callable[[int], None],
) -> dict[str, tuple[int, int]]:
    """Of each model how many answers are the wanted ones, and of how many."""
    networks = {name: (checkpoint.model(), checkpoint.config.normalise) for name, checkpoint in models.items()}
    hits, n = dict.fromkeys(models, 0), 0
    for images_BCHW, wanted_B in images:
        for name, (network, normalise) in networks.items():
            logits_BK = predict(network, images_BCHW, normalise, compute)
            hits[name] += int((logits_BK.argmax(1) == wanted_B).sum())
        n += len(wanted_B)
        advance(len(wanted_B))
    return {name: (hits[name], n) for name in models}


def _pictures(attack: AttackConfig, test: Dataset) -> bytes | None:
    """A few test images as a model reads them, and below them the same with the first trigger; None if there are none
    to put it on."""
    batch = next(triggered(attack, test, test.n_classes, _N_PICTURES), None)
    if batch is None:
        return None
    untouched = [of.images_BCHW for of in read_chosen(test, batch.shard, set(batch.positions), _N_PICTURES)]
    rows = [torch.cat(list(images_BCHW), dim=2) for images_BCHW in (torch.cat(untouched), batch.images_BCHW)]
    return encode_png(torch.cat(rows, dim=1))
