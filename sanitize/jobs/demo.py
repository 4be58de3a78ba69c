"""The demo: real digits, a planted backdoor, the clean flow, and a model trained before and after."""

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
from sanitize.redteam import Measured, measure_case
from sanitize.select import Shards

ATTACK = BadNetsConfig(rate=0.02, target=0, size=3)
MODEL = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32, 64)), optim=OptimConfig(epochs=30, batch_size=64))
N_HELD_OUT = 2  # shards no model is trained on; their untouched originals are the test set


def demo(out: Path, seed: int, run: Callable[[CleanConfig, str], dict[str, Any]] = run_job) -> dict[str, Any]:
    """Plant a backdoor, clean, and measure; everything is written below `out`.

    Args:
        out: a folder.
        seed: of every random choice.
        run: runs the job of cleaning, given its config and its run folder.
    """
    compute = Compute(seed=seed, device="cpu")
    digits = write_digits(str(out / "digits"), compute)
    honest = _index(digits.shards(), out / "index", compute)
    poisoned = poison_shards(ATTACK, honest, str(out / "poisoned"), compute)

    config = CleanConfig(shards=tuple(poisoned.shard_paths()), embedder=MODEL, compute=compute)
    result = run(config, str(out / "clean"))

    test = _index(digits.shards()[-N_HELD_OUT:], out / "index-test", compute)
    models = compute.model_copy(update={"seed": seed + 1})  # not the suspect model: fresh ones, as a user would train
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
    """Counts and shares, named for a reader."""
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
