"""Canaries from shards to scorer.json: found where they are learned, and without influence on what the data get."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sanitize.compute import Compute
from sanitize.data.canaries import Canaries
from sanitize.data.dataset import Dataset
from sanitize.data.digits import write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings
from sanitize.embed import (
    CanaryConfig,
    EmbedConfig,
    EmbedderConfig,
    embed_canaries,
    embed_shards,
    plant_canaries,
    train_embedder,
)
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.score import FittedScorer, ToxicDirectionConfig, fit_scorer
from sanitize.score.scorer import row_hashes
from sanitize.score.toxic_direction.scorer import ClassSamples


class Made(NamedTuple):
    dataset: Dataset
    canaries: Canaries
    embedder: Checkpoint
    embeddings: Embeddings
    embedded: Embeddings


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> tuple[Dataset, Canaries]:
    home = tmp_path_factory.mktemp("canary")
    digits = write_digits(str(home / "digits"), compute, n_shards=3)
    dataset = index_shards(IndexConfig(n_classes=10), digits.shards(), str(home / "index"), compute)
    return dataset, plant_canaries(CanaryConfig(), dataset, str(home / "canaries"), compute)


def make(indexed: tuple[Dataset, Canaries], home: Path, epochs: int, is_beside: bool) -> Made:
    """A suspect model that was trained with or without canaries, and all embeddings."""
    (dataset, canaries), compute = indexed, Compute(device="cpu")
    config = EmbedderConfig(
        architecture=ConvNetConfig(widths=(16, 32, 64)),
        optim=OptimConfig(epochs=epochs),
        min_steps=1,
        max_steps=1,
    )
    beside = canaries if is_beside else None
    embedder = train_embedder(config, dataset, str(home / "embedder"), compute, canaries=beside)
    embeddings = embed_shards(EmbedConfig(), dataset, embedder, str(home / "embeddings"), compute)
    embedded = embed_canaries(EmbedConfig(), canaries, embedder, str(home / "embedded"), compute)
    return Made(dataset, canaries, embedder, embeddings, embedded)


def fit(made: Made, out: Path, is_looked_for: bool = True) -> FittedScorer:
    canaries, embedded = (made.canaries, made.embedded) if is_looked_for else (None, None)
    return fit_scorer(
        ToxicDirectionConfig(),
        made.embeddings,
        str(out),
        Compute(device="cpu"),
        dataset=made.dataset,
        model=made.embedder,
        canaries=canaries,
        embedded_canaries=embedded,
    )


@pytest.fixture(scope="module")
def learned(indexed: tuple[Dataset, Canaries], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(indexed, tmp_path_factory.mktemp("learned"), 45, True)


def test_learned_canaries_are_found_and_change_nothing_of_the_scorer(learned: Made, tmp_path: Path) -> None:
    fitted, plain = fit(learned, tmp_path / "with"), fit(learned, tmp_path / "without", False)
    found = fitted.info["canaries"]
    assert found["why"] == ""
    assert [canary["kind"] for canary in found["planted"]] == ["noise", "patch"]
    for canary in found["planted"]:
        assert canary["learned"] > 0.9
        assert canary["recall"] > 0.6
        assert (canary["n"], canary["missed"]) == (30, "")
    assert "canaries" not in plain.info
    for name in ("finding", "classes"):
        assert fitted.info[name] == plain.info[name]
    files = (one.manifest().files["state.safetensors"] for one in (fitted, plain))
    assert next(files) == next(files)


def test_canaries_that_the_model_has_not_learned_count_as_missed(
    indexed: tuple[Dataset, Canaries], tmp_path: Path
) -> None:
    found = fit(make(indexed, tmp_path, 15, False), tmp_path / "scorer").info
    for canary in found["canaries"]["planted"]:
        assert canary["learned"] < 0.4
        assert canary["missed"] == "not learned"


def test_a_bounded_sample_holds_canaries_at_the_rate_of_the_training(embeddings: Embeddings) -> None:
    sample = ClassSamples()
    for batch in embeddings.batches("pooled"):
        sample.update(batch, row_hashes(batch, 0))
    n = sum(batch.z_BD.shape[0] for batch in embeddings.batches("pooled"))
    assert sample.n_of(0, 0.05) == round(0.05 * n)
    assert sample.n_of(77, 0.05) == 0
    for one in sample._of_class.values():
        one.shrink(len(one) // 2)
    assert abs(sample.n_of(0, 0.05) - 0.025 * n) <= 1
    assert torch.isfinite(sample.rows()[0]).all()
