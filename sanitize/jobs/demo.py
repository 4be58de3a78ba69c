"""The demo: real digits, a planted backdoor, job `clean`, and a model trained before and after."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sanitize.attack import BadNetsConfig, poison_shards
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Selection
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.job import run_job
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.redteaming import Measured, measure_case
from sanitize.select import Shards

ATTACK = BadNetsConfig(rate=0.02, target=0, size=3)
MODEL = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32, 64)), optim=OptimConfig(epochs=30, batch_size=64))
N_HELD_OUT = 2  # shards that no model is trained on; the test set is their unpoisoned originals


def demo(out: str | Path, seed: int = 0, run: Callable[[CleanConfig, str], dict[str, Any]] = run_job) -> dict[str, Any]:
    """Plant a backdoor in real digits, clean, and measure.

    Args:
        out: folder for everything that is written.
        seed: seed of every random choice.
        run: function that runs job `clean`, given its config and its run folder.

    Returns:
        Numbers of poisoned samples found and missed and of clean samples lost, recall, share of clean samples lost,
        accuracy and ASR of a model before and after, and the path of the report.
    """
    out = Path(out)
    compute = Compute(seed=seed, device="cpu")
    digits = write_digits(str(out / "digits"), compute)
    clean = _index(digits.shards(), out / "index", compute)
    poisoned = poison_shards(ATTACK, clean, str(out / "poisoned"), compute)

    config = CleanConfig(shards=tuple(poisoned.shard_paths()), embedder=MODEL, compute=compute)
    result = run(config, str(out / "clean"))

    test = _index(digits.shards()[-N_HELD_OUT:], out / "index-test", compute)
    models = compute.model_copy(update={"seed": seed + 1})  # fresh models, not the suspect model
    kept = Shards.load(out / "clean" / "50-shards").clean()
    trained = {
        "before": _train(poisoned.shard_paths()[:-N_HELD_OUT], out / "model-before", models),
        "after": _train(kept[:-N_HELD_OUT], out / "model-after", models),
    }
    selection = Selection.load(out / "clean" / "40-selection")
    measured = measure_case(ATTACK, selection, trained, test, str(out / "measured"), compute, truth=poisoned)
    return _summary(measured) | {"report": result["report"]}


def _index(shards: Sequence[str], out: Path, compute: Compute) -> Dataset:
    return index_shards(IndexConfig(n_classes=10), shards, str(out), compute)


def _train(shards: Sequence[str], out: Path, compute: Compute) -> Checkpoint:
    dataset = _index(shards, out / "index", compute)
    return train_embedder(MODEL, dataset, str(out / "model"), compute)


def _summary(measured: Measured) -> dict[str, Any]:
    """Counts and shares of the demo by name."""
    counts = measured.counts
    (found, n_poisoned), (lost, n_clean) = counts["recall"], counts["false_removals"]
    of_models = ("acc_before", "asr_before", "acc_after", "asr_after")
    return {
        "poisoned": n_poisoned,
        "found": found,
        "missed": n_poisoned - found,
        "recall": found / n_poisoned,
        "clean_samples": n_clean,
        "clean_lost": lost,
        "clean_lost_fraction": lost / n_clean,
        **{measure: counts[measure][0] / counts[measure][1] for measure in of_models},
    }
