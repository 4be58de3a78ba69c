"""The demo: real digits, a planted backdoor, job `clean`, and a model trained before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import field_validator

from sanitize.attack import BadNetsConfig, poison_shards
from sanitize.compute import Compute
from sanitize.data.digits import write_digits
from sanitize.data.index import index_shards
from sanitize.data.index_config import IndexConfig
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.jobs.clean import CleanConfig, CleanRun, clean_inside
from sanitize.jobs.job import JobConfig, job
from sanitize.jobs.result import JobRun
from sanitize.jobs.run import Run
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.redteaming import Measured, measure_case

ATTACK = BadNetsConfig(rate=0.02, target=0, size=3)
MODEL = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32, 64)), optim=OptimConfig(epochs=30, batch_size=64))
N_HELD_OUT = 2  # shards that no model is trained on; the test set is their unpoisoned originals
INDEX = IndexConfig(n_classes=10)


class DemoConfig(JobConfig):
    """Config of a demo.

    Attributes:
        compute: seed of every random choice; the device is the CPU unless another is given.
    """

    compute: Compute = Compute(device="cpu")

    @field_validator("compute")
    @classmethod
    def _on_the_cpu(cls, compute: Compute) -> Compute:
        return compute if "device" in compute.model_fields_set else compute.model_copy(update={"device": "cpu"})


@dataclass(frozen=True)
class DemoRun(JobRun):
    """A finished demo; `summary` has its numbers."""

    kind = DemoConfig

    @property
    def cleaned(self) -> CleanRun:
        """The run of `clean` on the poisoned digits."""
        return CleanRun.open(self._in("clean"))


@job(DemoConfig, DemoRun)
def demo(config: DemoConfig, run: Run) -> dict[str, Any]:
    """Plant a backdoor in real digits, clean, and measure.

    Returns:
        Numbers of poisoned samples found and missed and of clean samples lost, recall, share of clean samples lost,
        accuracy and ASR of a model before and after, and the path of the report.
    """
    digits = run.stage("digits", write_digits)
    dataset = run.stage("index", index_shards, INDEX, digits.shards())
    poisoned = run.stage("poisoned", poison_shards, ATTACK, dataset)

    pipeline = CleanConfig(shards=tuple(poisoned.shard_paths()), embedder=MODEL, compute=run.compute)
    cleaned = clean_inside(pipeline, run.inside("clean", run.compute))

    test = run.stage("index-test", index_shards, INDEX, digits.shards()[-N_HELD_OUT:])
    models = run.compute.model_copy(update={"seed": run.compute.seed + 1})  # fresh models, not the suspect model
    trained = {
        "before": _train(poisoned.shard_paths()[:-N_HELD_OUT], run.inside("model-before", models)),
        "after": _train(cleaned.shards.clean()[:-N_HELD_OUT], run.inside("model-after", models)),
    }
    measured = run.stage("measured", measure_case, ATTACK, cleaned.selection, trained, test, truth=poisoned)
    return run.finish(config, _summary(measured) | {"report": cleaned.report.url("index.html")})


def _train(shards: Sequence[str], run: Run) -> Checkpoint:
    dataset = run.stage("index", index_shards, INDEX, shards)
    model = run.stage("model", train_embedder, MODEL, dataset)
    run.save("finished")
    return model


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
