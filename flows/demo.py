"""The demo: real digits, a planted backdoor, the clean flow, and a model trained before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flows.clean import CleanConfig, run_clean
from sanitize.attack import BadNetsConfig, Poisoned, poison_shards
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Selection
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.loop import OptimConfig, predict
from sanitize.measure import accuracy, attack_success_rate, detection
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.select import Shards

ATTACK = BadNetsConfig(rate=0.02, target=0, size=3)
MODEL = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32, 64)), optim=OptimConfig(epochs=30, batch_size=64))
N_HELD_OUT = 2  # shards no model is trained on; their untouched originals are the test set


def demo(out: Path, seed: int, direct: bool) -> dict[str, Any]:
    """Plant a backdoor, clean, and measure; everything is written below `out`."""
    compute = Compute(seed=seed, device="cpu")
    digits = write_digits(str(out / "digits"), compute)
    honest = _index(digits.shards(), out / "index", compute)
    poisoned = poison_shards(ATTACK, honest, str(out / "poisoned"), compute)

    config = CleanConfig(shards=tuple(poisoned.shard_paths()), embedder=MODEL, compute=compute)
    result = run_clean(config, out / "clean", direct)

    test = _index(digits.shards()[-N_HELD_OUT:], out / "index-test", compute)
    models = compute.model_copy(update={"seed": seed + 1})  # not the suspect model: fresh ones, as a user would train
    before = _train(poisoned.shard_paths()[:-N_HELD_OUT], out / "model-before", models)
    after = _train(Shards.load(out / "clean" / "50-shards").clean()[:-N_HELD_OUT], out / "model-after", models)
    return {
        **_found(poisoned, Selection.load(out / "clean" / "40-selection")),
        **_measured("before", before, test, compute),
        **_measured("after", after, test, compute),
        "report": result["report"],
    }


def _index(shards: Sequence[str], out: Path, compute: Compute) -> Dataset:
    return index_shards(IndexConfig(n_classes=10), shards, str(out), compute)


def _train(shards: Sequence[str], out: Path, compute: Compute) -> Checkpoint:
    dataset = _index(shards, out / "index", compute)
    return train_embedder(MODEL, dataset, str(out / "model"), compute)


def _measured(when: str, checkpoint: Checkpoint, test: Dataset, compute: Compute) -> dict[str, float]:
    images_NCHW, labels_N = test.images()
    model = checkpoint.model()
    clean_NK = predict(model, images_NCHW, checkpoint.config.normalise, compute)
    triggered_NK = predict(model, ATTACK.apply(images_NCHW), checkpoint.config.normalise, compute)
    targets_N = ATTACK.relabel(labels_N, test.n_classes, torch.Generator())
    return {
        f"acc_{when}": accuracy(clean_NK, labels_N),
        f"asr_{when}": attack_success_rate(triggered_NK, labels_N, targets_N),
    }


def _found(poisoned: Poisoned, selection: Selection) -> dict[str, Any]:
    removed, truth = [], []
    for shard in poisoned.shards:
        truth += poisoned.rows(shard, ["poisoned"])["poisoned"].to_pylist()
        removed += [not keep for keep in selection.rows(shard, ["keep"])["keep"].to_pylist()]
    removed_N, poisoned_N = np.array(removed), np.array(truth)
    of = detection(removed_N, poisoned_N)
    found = int((removed_N & poisoned_N).sum())
    return {
        "poisoned": of.n_poisoned,
        "found": found,
        "missed": of.n_poisoned - found,
        "recall": of.recall,
        "clean_samples": of.n_clean,
        "clean_lost": of.n_removed - found,
        "clean_lost_fraction": of.false_positive_rate,
    }
